"""Records from a sequence in memory."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from nvlm.arch.registry import placement_rule
from nvlm.data.forms.tasks import task_form
from nvlm.data.outline import build_processor
from nvlm.data.record import BadRecord, Record
from nvlm.data.samples import encode
from nvlm.data.sources import memory

TALK = [{"role": "user", "content": "<image>\nWhat colour?"}, {"role": "assistant", "content": "red"}]


class Squares:
    """A sequence that makes its rows, with pictures of all kinds."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        picture = Image.new("RGB", (60, 40), "red")
        file = io.BytesIO()
        picture.save(file, "PNG")
        return {"messages": TALK, "image": (picture, file.getvalue(), "a.png")[index]}


def test_rows_and_pictures_of_all_kinds_give_the_same_sample(tmp_path, configured):
    Squares()[0]["image"].save(tmp_path / "a.png")
    processor = build_processor(configured("arch=decoder"), placement_rule("decoder"))
    records = memory.records(Squares(), root=tmp_path)
    assert len(records) == 3 and records.files == () and records.name(2) == "[2]"
    samples = [encode(records[index], processor) for index in range(3)]
    for sample in samples[1:]:
        assert sample.tokens.equal(samples[0].tokens) and sample.pixels.equal(samples[0].pixels)
    assert samples[0].pixels[:, 0].min() > 250


def test_records_pass_as_they_are_and_rows_take_any_form(tmp_path):
    record = Record("mine", TALK, [])
    assert memory.records([record])[0] is record
    rows = [{"image": "a.png", "question": "?", "answer": "yes"}]
    asked = memory.records(rows, tmp_path, task_form("vqa", 0))[0]
    assert asked.messages[1]["content"] == "yes" and asked.images == [tmp_path / "a.png"]
    with pytest.raises(BadRecord, match="a number, expected an object"):
        memory.records([7])[0]


def test_the_example_of_the_page_loads_a_step(tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    (example,) = [text.split("```")[0] for text in page.split("```python")[1:] if "memory.records" in text]
    (tmp_path / "images").mkdir()
    Squares()[0]["image"].save(tmp_path / "images" / "a.png")
    monkeypatch.chdir(tmp_path)
    names = {"rows": Squares()}
    exec(example, names)
    batch = names["batch"]
    drawn = sorted(name for row in batch.ids for name in row)
    assert 0 < len(drawn) <= 8 and set(drawn) == {"[0]", "[1]", "[2]"}
    assert batch.pixels.dtype == torch.uint8 and len(batch.pixels) == len(batch.tile_tokens) >= len(drawn)
    assert batch.num_trained > 0 and not names["steps"][0].skipped
