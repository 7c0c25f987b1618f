"""The words of a sweep: lists of an experiment file, the sweep's folder, the names of its runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from nvlm.commands import swept as module
from nvlm.commands.compose import CONF, compose_config, runs
from nvlm.commands.swept import swept
from nvlm.commands.words import plain_words
from nvlm.config.data import Blend
from nvlm.config.values import ConfigError

TAGS = "+experiment=ablate_tags"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that makes +experiment=mine of a text."""

    def write(text: str) -> str:
        (tmp_path / "experiment").mkdir(exist_ok=True)
        (tmp_path / "experiment" / "mine.yaml").write_text(text)
        return "+experiment=mine"

    monkeypatch.setattr(module, "CONF", tmp_path)
    return write


def combinations(*words):
    return list(runs(swept(plain_words(words)).words))


def test_an_experiment_sweeps_over_its_lists(written):
    mine = written("sweep: {seed: [1, 2], train.save_frozen: [true, false], optim.lr: [0.5]}")
    expected = [(f"seed={s}", f"train.save_frozen={b}", "optim.lr=0.5") for s in (1, 2) for b in (True, False)]
    assert [one[:3] for one in combinations("-m", mine)] == expected
    assert all(one[3:] == (mine, "resume=auto") for one in combinations("-m", mine))


def test_the_command_line_replaces_a_list(written):
    mine = written("sweep: {seed: [1, 2], optim.lr: [0.5, 1]}")
    found = combinations("-m", mine, "seed=4,5,6", "resume=never")
    assert {(one[0], one[2]) for one in found} == {(f"optim.lr={v}", f"seed={s}") for v in (0.5, 1) for s in (4, 5, 6)}
    assert {one[3] for one in found} == {"resume=never"}


SWEPT = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if "\nsweep:" in path.read_text())


@pytest.mark.parametrize("name", SWEPT)
def test_every_sweep_of_the_project_composes(name):
    found = combinations("-m", f"+experiment={name}")
    for words in (found[0], found[-1]):  # they differ in the value of every list
        assert compose_config(*words, "dry_run=true")
    assert len(set(found)) == len(found) > 1


def test_the_paper_s_comparison_has_five_tilings_and_three_architectures_with_three_seeds():
    found = combinations("-m", TAGS)
    values = {
        k: {word for one in found for word in one if word.startswith(f"{k}=")} for k in ("tiling", "arch", "seed")
    }
    assert values["tiling"] == {f"tiling={name}" for name in ("single", "untagged", "1d", "2d_grid", "2d_bbox")}
    assert values["arch"] == {"arch=decoder", "arch=xattn", "arch=hybrid"} and len(values["seed"]) == 3
    assert len(set(found)) == len(found) == 5 * 3 * 3


@pytest.mark.parametrize(
    ("name", "fixed", "runs", "sources"),
    [
        ("tags", "tiling=untagged", 3, 1),
        ("tags_quick", "tiling=1d", 2, 1),
        ("bind", "tiling=1d", 3, 1),
        ("llm", "arch=hybrid", 1, 1),
        ("frozen", "arch=hybrid", 2, 1),
        ("text", "arch=hybrid", 1, 1),
    ],
)
def test_an_ablation_s_runs_draw_the_same_samples_about_positions(name, fixed, runs, sources):
    found = combinations("-m", f"+experiment=ablate_{name}", "seed=1", fixed)
    configs = [compose_config(*words) for words in found]
    assert len(configs) == len(set(configs)) == runs
    assert len({(one.train, one.optim, one.evaluate) for one in configs}) == 1
    data = [one.data.source for one in configs]
    assert len({repr(one) for one in data}) == sources
    asked = [part.source for one in data if isinstance(one, Blend) for part in one.sources.values()] or data
    assert {one.about for one in asked} == {"positions"}


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ([TAGS], "runs/sweep/ablate_tags"),
        ([TAGS, "name=mine"], "runs/sweep/mine"),
        ([TAGS, "train.steps=9"], "runs/sweep/ablate_tags"),  # so that the change is noticed
        ([TAGS, "hydra.sweep.dir=here/x"], "here/x"),
        (["seed=1,2", "arch=xattn", "resume=auto"], "runs/sweep/arch=xattn,seed=1,2"),
        (["arch=xattn", "seed=1,2"], "runs/sweep/arch=xattn,seed=1,2"),
        (["name=a,b"], "runs/sweep/name=a,b"),
        (["name=../x", "seed=1,2"], None),
    ],
)
def test_the_folder_of_a_sweep(words, folder):
    found = swept(plain_words(["-m", *words])).folder
    assert found == Path(folder) if folder else found.parent == Path("runs/sweep")


def test_hydra_would_name_the_runs_as_we_do():
    """Runs as jobs of a cluster are in the same folders as runs on this machine."""
    given = ["-m", TAGS, "data=jsonl", "data.path=é b.jsonl", "arch=xattn", "tiling=1d", "seed=1", "optim.lr=0.5,0.1"]
    sweep = swept(plain_words(given))
    ours, named = next(runs(sweep.words)), next(runs(sweep.for_hydra()))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=[*named], return_hydra_config=True)
    HydraConfig.instance().set_config(composed)
    assert Path(composed.hydra.sweep.dir) == sweep.folder == Path("runs/sweep/ablate_tags")
    assert composed.hydra.sweep.subdir == sweep.name(ours) == "arch=xattn,optim.lr=0.5,seed=1,tiling=1d"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([TAGS], "-m, since it is a sweep, or one value of seed, tiling, arch. Fix: python launch/train.py -m"),
        (["jobs=2"], "jobs: got no sweep"),
        (["-m"], "-m: got no key with several values"),
        (["-m", "seed=1"], "Fix: add one, or leave -m out"),
        (["-m", f"{TAGS},tiny_sft"], "got the sweep ablate_tags in a sweep"),
        (["-m", "seed=1,2", "jobs=many"], "jobs: got 'many', expected a number"),
        (["-m", "seed=1,2", "hydra/launcher=slurm", "jobs=2"], "array_parallelism"),
        (["-m", "seed=1,2", "hydra.sweep.subdir=x"], "Fix: leave it out"),
    ],
)
def test_what_is_no_sweep_is_refused(words, says):
    with pytest.raises(ConfigError) as caught:
        swept(plain_words(words))
    assert says in str(caught.value) and "Fix: " in str(caught.value)


@pytest.mark.parametrize("text", ["sweep:", "sweep: {}", "sweep: [seed]", "sweep: {seed: []}", "sweep: {seed: 3}"])
def test_an_empty_or_misspelt_sweep_is_refused(written, text):
    with pytest.raises(ConfigError, match="mine.yaml.*expected a list of values for each key. Fix: "):
        swept(["-m", written(text)])


def test_single_runs_are_no_sweep():
    assert swept(["seed=1"]) is None
    assert swept(["-m", "seed=1,2", "--cfg", "job"]) is None
    assert swept([TAGS, "seed=1", "tiling=1d", "arch=xattn"]) is None  # one run of the sweep, by itself
    assert swept(["-m", "seed=1", "hydra/launcher=slurm"]) is not None  # Hydra wants -m for a single job, too


def test_a_key_without_values_is_refused():
    with pytest.raises(ConfigError, match="seed: got no values in 'seed=range.1,1.', .* Fix: seed=A,B"):
        combinations("-m", "seed=range(1,1)", "optim.lr=1,2")


def test_an_unknown_experiment_is_named_also_without_values_to_sweep_over():
    with pytest.raises(ConfigError, match="experiment: got 'ablate_tag', .*Fix: .experiment=ablate_tags"):
        swept(plain_words(["-m", "+experiment=ablate_tag"]))
