"""lmms-eval's questions as conversations. tests/e2e/test_lmms.py tests its own classes, where it is installed."""

from __future__ import annotations

import pytest

from nvlm.config.values import ConfigError
from nvlm.lmms.backend import Prompt, opened


@pytest.mark.parametrize(
    ("text", "images", "content"),
    [
        ("What?", 0, "What?"),
        ("What?", 1, "<image>\nWhat?"),
        ("What?", 2, "<image>\n<image>\nWhat?"),
        ("<image> or <image>?", 2, "<image> or <image>?"),
        ("Is <image> a mark?", 0, "Is \\<image> a mark?"),
        ("Is <image> a mark?", 2, "<image>\n<image>\nIs \\<image> a mark?"),
    ],
)
def test_a_prompt_has_a_mark_for_each_image(text, images, content):
    assert Prompt(text, (object(),) * images).messages == [{"role": "user", "content": content}]


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ConfigError, match="python -m lmms_eval, without torchrun or accelerate"),
        opened(tmp_path, (), None),
    ):
        pass


def test_an_export_takes_no_other_arguments(tmp_path):
    (tmp_path / "modeling_nvlm.py").touch()
    with pytest.raises(ConfigError, match="leave them out"), opened(tmp_path, ["precision=fp32"], None):
        pass
