"""A run's files are checked before it starts: paths, first records, held-out answers."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tarfile

import pytest
from PIL import Image

from nvlm.arch.registry import placement_rule
from nvlm.config.values import Config, ConfigError
from nvlm.data.look import check_data
from nvlm.data.sources.json_rows import records_of

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
ASKED = {"messages": GOOD["messages"][:1]}


def looked_at(config: Config) -> None:
    check_data(config, placement_rule(config.arch.name))


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def look(configured, tmp_path):
    def check(train=(GOOD,), heldout=None, *overrides):
        paths = [f"data.path={write(tmp_path / 'r.jsonl', *train)}"]
        if heldout is not None:
            paths.append(f"data.heldout_path={write(tmp_path / 'h.jsonl', *heldout)}")
        looked_at(configured("data=jsonl", *paths, *overrides))

    return check


def test_good_files_and_runs_without_files_pass(look, configured):
    look()
    look((GOOD,), (GOOD,))
    look(({}, GOOD), (ASKED, GOOD))  # one that can be used is enough: the others are skipped and named later
    look((GOOD,), (ASKED,), "evaluate=none")
    with pytest.raises(ConfigError, match="its first record is unusable"):
        look((GOOD,), (ASKED, GOOD), "evaluate.questions=1")  # the only one that is asked
    looked_at(configured())


def test_held_out_records_whose_loss_is_measured_need_no_question_but_something_to_learn(look):
    measured = ("evaluate=none", "evaluate.losses=1")
    document = {"messages": [{"role": "document", "content": "text"}]}
    look((GOOD,), (document,), *measured)
    with pytest.raises(ConfigError, match="data.heldout_path: got .*h.jsonl: its first record is unusable"):
        look((GOOD,), (ASKED, GOOD), *measured)


@pytest.mark.parametrize(
    ("heldout", "reason"),
    [
        ((ASKED,), "its first record is unusable .h.jsonl:1: no assistant turn with an answer"),
        (
            (ASKED, ASKED),
            "its first 2 records are all unusable .h.jsonl:1: no assistant turn with an answer to compare",
        ),
        ((GOOD | {"images": ["gone.png"]},), "h.jsonl:1: gone.png: no such image"),
        (("\n \n",), "only blank lines"),
        (("",), "which is empty"),
    ],
)
def test_held_out_records_that_could_not_be_scored_are_refused_at_once(look, heldout, reason):
    with pytest.raises(ConfigError, match=f"^data.heldout_path: got .*{reason}"):
        look((GOOD,), heldout)


def test_a_held_out_path_that_is_not_there_is_called_by_its_key(configured, tmp_path):
    good = write(tmp_path / "r.jsonl", GOOD)
    config = configured("data=jsonl", f"data.path={good}", "data.heldout_path=nosuch.jsonl")
    with pytest.raises(ConfigError, match=f"data.heldout_path: got 'nosuch.jsonl' in {os.getcwd()}, expected a .jsonl"):
        looked_at(config)


def test_a_root_that_is_no_folder_is_called_by_its_key(look, tmp_path):
    for root in (tmp_path / "none", tmp_path / "r.jsonl"):
        with pytest.raises(
            ConfigError, match=f"data.root: got '{root}', expected a folder that exists. Fix: data.root="
        ):
            look((GOOD,), None, f"data.root={root}")


def test_training_records_none_of_which_can_be_used_are_refused_at_once(look):
    sound = {"audio": "a.mp3", "conversations": [{"from": "human", "value": "?"}]}
    with pytest.raises(ConfigError, match="its first 20 records are all unusable .r.jsonl:1: key `audio`"):
        look((sound,) * 30)
    with pytest.raises(ConfigError, match="the text takes .* tokens, data.seq_length is"):
        look(({"messages": [{"role": "user", "content": "word " * 9000}, GOOD["messages"][1]]},))


def test_the_fixes_of_unusable_records_name_the_task_and_the_root_of_the_source(tmp_path, configured):
    plain = write(tmp_path / "plain.jsonl", [{"question": "?", "answer": "2"}])
    with pytest.raises(ConfigError, match="but question and answer: data.task=vqa"):
        looked_at(configured("data=jsonl", f"data.path={plain}"))
    source = f"data.sources={{a: {{source: jsonl, path: '{plain}', weight: 1}}}}"
    with pytest.raises(ConfigError, match="data.sources.a.path=FILE, or data.sources.a.root=DIR"):
        looked_at(configured("data=blend", source))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "a gzip file within another, .*gunzip"),
        (b"PAR1" + bytes(9), "a Parquet file, .*Fix: data=parquet"),
        (tarfile.TarInfo("0.png").tobuf(), "a tar file, .*Fix: data=webdataset"),
    ],
)
def test_other_kinds_of_files_are_called_by_their_name(tmp_path, content, reason):
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        records_of(str(tmp_path / "r.jsonl"))


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "r.jsonl")
    with pytest.raises(ConfigError, match="data.path: got .*: a named pipe, not a regular file"):
        records_of(str(tmp_path / "r.jsonl"))
    with pytest.raises(ConfigError, match="a named pipe, not a regular file"):
        records_of(str(tmp_path))


@pytest.mark.parametrize("blank", ["\n", "  \t\n", "\r\n"])
def test_blank_lines_are_no_records_and_names_are_those_of_lines(tmp_path, blank):
    records = records_of(str(write(tmp_path / "r.jsonl", blank, GOOD, blank, GOOD | {"id": 3}, blank, blank)))
    assert len(records) == 2
    assert [records.name(i) for i in range(2)] == ["r.jsonl:2", "r.jsonl:4"]
    assert [records[i].id for i in range(2)] == ["r.jsonl:2", "3"]
    unbroken = records_of(str(write(tmp_path / "s.jsonl", GOOD, " " + json.dumps(GOOD))))
    assert [unbroken.name(i) for i in range(len(unbroken))] == ["s.jsonl:1", "s.jsonl:2"]
    assert unbroken[1].messages == GOOD["messages"]


def test_looking_loads_no_torch(tmp_path):
    Image.new("RGB", (300, 100)).save(tmp_path / "a.png")
    write(tmp_path / "r.jsonl", GOOD | {"images": ["a.png"]})
    code = (
        "import sys; from nvlm.arch.registry import placement_rule; from nvlm.commands.compose import compose_config\n"
        "from nvlm.data.look import check_data\n"
        f"config = compose_config('data=jsonl', 'data.path={tmp_path}/r.jsonl')\n"
        "check_data(config, placement_rule(config.arch.name))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
