"""Where runs go: folder names of sweeps, and folders that cannot be created."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvlm.config.values import ConfigError
from nvlm.runs.place import check_place, sweep_folder


@pytest.mark.parametrize("plain", ["arch=xattn,seed=2", "tiling.tag=2d_grid", "stage.new=[projector,xattn]", "n" * 200])
def test_a_plain_name_stays_as_it_is(plain):
    assert sweep_folder(plain) == plain


def test_marks_in_front_of_keys_are_no_part_of_a_name():
    assert sweep_folder("++data.sources.text.weight=1,+x=2,seed=3") == "data.sources.text.weight=1,x=2,seed=3"
    assert sweep_folder("a=1,b=+2,c=++") == "a=1,b=+2,c=++"


def test_true_and_false_are_written_as_in_yaml():
    """Hydra writes Python's words."""
    assert sweep_folder("a=True,seed=1,b=False") == sweep_folder("a=true,seed=1,b=false") == "a=true,seed=1,b=false"
    assert sweep_folder("name=Truest,b=xFalse") == "name=Truest,b=xFalse"


LONG = ",".join(f"llm.something_{i}=1" for i in range(30))
ODD = ["data.path=/a/b/c.jsonl", 'name="é"', LONG, "é" * 150, "a\0b", "../x", "/", "", "..", "a\nb", ".hidden"]


@pytest.mark.parametrize("odd", ODD)
def test_any_other_name_is_one_folder(odd, tmp_path):
    name = sweep_folder(odd)
    (tmp_path / "sweep" / name).mkdir(parents=True)
    assert os.listdir(tmp_path / "sweep") == [name]
    assert name == sweep_folder(odd)


def test_two_names_stay_two():
    alike = [*ODD, "data.path=/a/b_c.jsonl", "data.path=/a_b/c.jsonl", "data.path=_a_b_c.jsonl", f"{LONG},"]
    assert len({sweep_folder(name) for name in alike}) == len(alike)


def test_a_place_that_is_there_or_can_be_made_is_well(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "a" / "b", tmp_path / "link" / "a"):
        check_place(folder, "hydra.run.dir")
    assert os.listdir(tmp_path) == ["link"]


def test_a_place_that_cannot_be_made_says_what_is_in_the_way(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("/nowhere/else")
    (tmp_path / "runs").touch()
    monkeypatch.chdir(tmp_path)
    expected = {
        "file": f"{tmp_path}/file, a file",
        "file/run": f"{tmp_path}/file, a file",
        "dangling": f"{tmp_path}/dangling, a link to /nowhere/else, which does not exist",
        "runs/name": f"{tmp_path}/runs, a file",
    }
    for folder, says in expected.items():
        with pytest.raises(ConfigError) as caught:
            check_place(Path(folder), "hydra.run.dir")
        assert f"run folder {folder}: got {says}" in str(caught.value)


def test_a_folder_of_somebody_else_s(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the user of the tests may write anywhere
    with pytest.raises(ConfigError, match="may not write"):
        check_place(tmp_path / "run", "hydra.run.dir")
