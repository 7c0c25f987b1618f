"""Checks that the weights named by a configuration exist and fit. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nvlm.arch.registry import description
from nvlm.config.values import Config, ConfigError, problem
from nvlm.inputs import identity
from nvlm.inputs.sources import model_source
from nvlm.runs.folder import find_checkpoint, latest, read_run_config
from nvlm.vision.encoders.registry import description_of
from nvlm.vision.source import trained_encoder, vision_source


def check_weights(config: Config, run_dir: Path | None = None) -> None:
    """Raise ConfigError if the sources in config.init do not fit, or if the encoder or tokenizer is not the one that a
    checkpoint's run was trained with. Reads only headers and samples.

    A run that resumes from a checkpoint in `run_dir` needs only the encoder, and that only if it never learned.
    """
    newest = latest(run_dir) if config.resume == "auto" and run_dir is not None else None
    before = newest
    if newest is None and config.init.checkpoint:
        before = find_checkpoint(Path(config.init.checkpoint), "init.checkpoint")
    needed = not config.dry_run and (before is None or trained_encoder(before) is None)
    if needed or config.init.vision or config.init.release:
        vision_source(config)
    if newest is not None:
        identity.check_model(config, newest, resumed=True)
        return
    model_source(config)
    if config.stage.parent and before is None and not (config.init.release or config.dry_run):
        expected = f"a run of {' or '.join(config.stage.parent)}, which this stage continues, or a released model"
        raise problem("init.checkpoint", "nothing", expected, "init.checkpoint=RUN, or init.release=DIR")
    if before is not None:
        check_same_model(config, before)
        identity.check_model(config, before)


# Fields that make another model. Some change no tensor's name or shape; the encoder's description adds more.
_OF_A_MODEL = (
    "llm.layers llm.hidden llm.heads llm.kv_heads llm.head_dim llm.ffn llm.vocab llm.rope_theta llm.rope_scaling "
    "llm.norm_eps llm.qkv_bias llm.qk_norm llm.tied vision.name vision.encoder vision.downsample "
    "vision.pool vision.pads vision.order"
).split()


def check_same_model(config: Config, folder: Path) -> None:
    """Raise ConfigError if the model of the checkpoint `folder` computes something different from `config`'s."""
    before = read_run_config(folder)
    if lost := [group for group in before.adapted if group not in config.adapted]:
        raise _adapters_lost(folder, lost, before.adapted)
    check_parent(config, before, f"init.checkpoint={folder}")
    compare_models(config, before, f"init.checkpoint={folder}")


def check_parent(config: Config, before: Config, where: str) -> None:
    """Raise ConfigError if the run `before`, which `where` names, is none that the stage of `config` continues."""
    got, parents = before.stage.recipe, config.stage.parent
    if parents and got not in parents:
        said = f"a run of {got}" if got else f"a run without a recipe, of stage={before.stage.name}"
        expected = f"{' or '.join(parents)}, which {config.stage.recipe or config.name} continues"
        raise problem(f"{where}: stage.recipe", said, expected, "a run of that, or stage.parent=[], which takes any")


def compare_models(config: Config, before: Config, where: str) -> None:
    """Raise ConfigError if the model of the run `before`, which `where` names, is another one than `config`'s.

    A decoder-only model may go on as one with cross-attention, whose new layers are then random.
    """
    names = [*_OF_A_MODEL, *(f"vision.{name}" for name in description_of(config.vision).unseen)]
    if set(description(before.arch.name).groups) >= set(description(config.arch.name).groups):
        names = ["arch.name", *names]
    if before.arch.name == config.arch.name:
        names = [*names, "arch.cross_every", "arch.bind_tags", "arch.sees"]
    if before.adapted and config.adapted:
        names = [*names, "peft.alpha"]
    for name in names:
        group, key = name.split(".")
        old, new = (getattr(getattr(one, group), key) for one in (before, config))
        if old != new:
            fix = f"arch={old}" if name == "arch.name" else f"{name}={old}"
            raise problem(f"{where}: {name}", old, f"{new}, as in this run", fix)
    old, new = before.llm.rope_interpolation, config.llm.rope_interpolation
    if new < old:  # a stage may learn more positions, not forget some
        fix = f"llm.rope_interpolation={old:g}"
        raise problem(f"{where}: llm.rope_interpolation", f"{old:g}", f"at most this run's {new:g}", fix)


def _adapters_lost(folder: Path, lost: Sequence[str], adapted: Sequence[str]) -> ConfigError:
    export = f"python launch/export_hf.py checkpoint={folder.parent.parent} out=DIR"
    fix = (
        f"peft=lora peft.targets=[{','.join(adapted)}] continues them; to train all weights, merge them ({export}) "
        "and start with init.release=DIR init.vision=null"
    )
    got = f"adapters on {', '.join(lost)}, which this run does not have"
    return problem(f"init.checkpoint={folder}", got, "a run with the same adapters, or a model without any", fix)
