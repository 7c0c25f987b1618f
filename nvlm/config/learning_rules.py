"""Rules about what learns in a stage, and how fast. Imports no torch."""

from __future__ import annotations

from nvlm.config.values import GROUPS, Config, problem

PROFILED = 6  # steps needed for a complete trace


def _schedule(config: Config) -> None:
    if config.optim.warmup >= config.train.steps:
        fix = f"optim.warmup={config.train.steps // 10}"
        raise problem("optim.warmup", config.optim.warmup, f"fewer than train.steps={config.train.steps}", fix)
    if config.optim.min_lr > config.optim.lr:
        expected = f"at most optim.lr={config.optim.lr:g}, from which it falls"
        raise problem("optim.min_lr", config.optim.min_lr, expected, f"optim.min_lr={config.optim.lr / 10:g}")
    learning = _groups_that_learn(config)
    for group in GROUPS:
        if getattr(config.optim.lr_of, group) is not None and group not in learning:
            key, expected = f"optim.lr_of.{group}", f"a group that this stage trains ({', '.join(sorted(learning))})"
            raise problem(
                key, f"a rate of a group that stage={config.stage.name} leaves as it is", expected, f"{key}=null"
            )
    if config.profile and config.train.steps < PROFILED:
        raise problem("profile", True, f"train.steps of at least {PROFILED}, its last ones are traced", "profile=false")


def _groups_that_learn(config: Config) -> set[str]:
    """Module groups that the stage trains, of those that the model has."""
    return set(config.stage.trainable) - (set() if config.arch.cross_every else {"xattn"})


def _stage(config: Config) -> None:
    if not _groups_that_learn(config):
        raise problem(
            "stage", "nothing to train", "at least one module group that learns", "stage.train_projector=true"
        )
    if config.stage.train_vision and config.precision.encoder:
        expected = "false where the encoder learns: it is trained in bf16"
        raise problem("precision.encoder", True, expected, "precision.encoder=false, or stage.train_vision=false")


def _peft(config: Config) -> None:
    peft = config.peft
    if peft.name == "none":
        return
    learns = _groups_that_learn(config).intersection(("llm", "xattn")).difference(config.stage.new)
    if learns.isdisjoint(peft.targets):
        expected = f"a group that stage={config.stage.name} trains and does not declare new ({', '.join(learns)})"
        none = f"a stage with adapters: stage={config.stage.name} trains new groups alone, and those learn in full"
        fix = f"peft.targets=[{','.join(sorted(learns))}]" if learns else "peft=none, or stage=sft"
        raise problem("peft.targets", list(peft.targets), expected if learns else none, fix)


LEARNING = (_schedule, _stage, _peft)
