"""Several stages in one command: each stage's words, which stages may follow each other, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvlm.commands.compose import CONF, check_overrides
from nvlm.commands.stages import check_sequence, stages_of
from nvlm.config.values import ConfigError
from nvlm.inputs.check import check_parent, check_weights

TINY = "+pipeline=tiny_two_stage"


def test_each_stage_is_a_run_that_starts_from_the_one_before():
    first, second, third = stages_of([TINY, "arch=decoder", "init.llm=DIR", "stages.tiny_sft.train.steps=70"])
    assert [stage.folder for stage in (first, second, third)] == [
        Path("runs/tiny_two_stage") / name for name in ("tiny_text", "tiny_pretrain", "tiny_sft")
    ]
    assert first.words == (
        "+experiment=tiny_text", 'name="tiny_two_stage-tiny_text"', 'hydra.run.dir="runs/tiny_two_stage/tiny_text"',
        "arch=decoder", "init.llm=DIR",
    )  # fmt: skip
    assert 'init.checkpoint="runs/tiny_two_stage/tiny_text"' in second.words and "init.llm=DIR" not in second.words
    assert third.words[-2:] == ("arch=decoder", "train.steps=70")
    [config] = check_overrides(list(third.words))
    assert (config.train.steps, config.arch.name) == (70, "decoder")
    assert config.init.checkpoint == "runs/tiny_two_stage/tiny_pretrain" and config.stage.train_llm


def test_a_name_and_a_folder_are_those_of_the_whole():
    assert stages_of([TINY, "name=mine"])[1].folder == Path("runs/mine/tiny_pretrain")
    last = stages_of([TINY, "name=mine", 'hydra.run.dir="/disk/a b"'])[2]
    assert last.folder == Path("/disk/a b/tiny_sft")
    [config] = check_overrides(list(last.words))
    assert config.name == "mine-tiny_sft" and config.init.checkpoint == "/disk/a b/tiny_pretrain"


@pytest.mark.parametrize(
    "words", [[], ["arch=decoder"], ["+experiment=tiny_sft"], ["+experiment=none"], [TINY, "--help"]], ids=str
)
def test_other_commands_have_no_stages(words):
    assert stages_of(words) == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["-m", TINY], "stages in a sweep"),
        ([TINY, "hydra/launcher=slurm"], "stages in a sweep"),
        ([TINY, "stages.tiny_stf.train.steps=1"], "stages.tiny_stf.train.steps: got no stage and key.*tiny_sft"),
        ([TINY, "stages.tiny_sft=1"], "stages.tiny_sft: got no stage and key"),
        (["+pipeline=tiny_two_stge"], "pipeline: got 'tiny_two_stge'.*Fix: .pipeline=tiny_two_stage"),
    ],
)
def test_what_cannot_be_run_in_stages_is_refused(words, reason):
    with pytest.raises(ConfigError, match=reason):
        stages_of(words)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("stages.tiny_sft.arch=decoder", "tiny_sft after tiny_pretrain: arch: got decoder, expected hybrid"),
        ("stages.tiny_pretrain.llm.hidden=64", "tiny_pretrain after tiny_text: llm.hidden: got 128, expected 64"),
        (
            "stages.tiny_sft.stage.parent=[tiny_1]",
            "tiny_sft after tiny_pretrain: stage.recipe: got a run without a recipe, of stage=pretrain, expec",
        ),
        ("arch=xattn", None),
    ],
)
def test_a_stage_that_cannot_continue_the_one_before_is_refused_before_the_first_starts(word, reason):
    stages = stages_of([TINY, word])
    configs = [config for stage in stages for config in check_overrides(list(stage.words))]
    if reason is None:
        return check_sequence(stages, configs)
    with pytest.raises(ConfigError, match=reason):
        check_sequence(stages, configs)


def test_the_papers_stages_follow_each_other():
    names = sorted(path.stem for path in (CONF / "pipeline").glob("nvlm_?_??b.yaml"))
    assert len(names) == 6
    for name in names:
        stages = stages_of([f"+pipeline={name}", "dry_run=true"])
        assert [stage.name for stage in stages] == [f"{name}_pretrain", f"{name}_sft"]
        check_sequence(stages, [config for stage in stages for config in check_overrides(list(stage.words))])


def test_a_recipe_takes_only_its_parents(configured):
    """The checkpoint of another system's stage, or of another stage of the same, is refused; so is none at all."""
    aligned, other = (configured(f"stage.recipe={name}") for name in ("vila_align", "llava_next_align"))
    own = ("stage.recipe=vila_sft", "stage.parent=[vila_align,vila_pretrain]")
    tuned = configured(*own, "init.checkpoint=RUN")
    check_parent(tuned, aligned, "init.checkpoint=RUN")
    check_parent(other, aligned, "init.checkpoint=RUN")  # it names no parent
    says = (
        "init.checkpoint=RUN: stage.recipe: got a run of llava_next_align, expected vila_align or vila_pretrain, which"
    )
    with pytest.raises(ConfigError, match=says):
        check_parent(tuned, other, "init.checkpoint=RUN")
    with pytest.raises(
        ConfigError, match="init.checkpoint: got nothing, expected a run of vila_align or vila_pretrain"
    ):
        check_weights(configured(*own))
    check_weights(configured(*own, "dry_run=true"))
    check_weights(configured(*own, "stage.parent=[]"))


def test_a_pipeline_may_be_asked_for_as_an_experiment():
    assert stages_of(["+experiment=tiny_two_stage", "seed=7"]) == stages_of([TINY, "seed=7"])


def test_a_command_for_one_configuration_wants_one_of_the_stages():
    with pytest.raises(ConfigError, match="stages: got tiny_text, tiny_pretrain, tiny_sft.*Fix: .experiment=tiny_sft"):
        check_overrides([TINY])
