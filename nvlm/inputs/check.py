"""Whether the weights that a configuration names are there, and are what they should be. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from nvlm.config.values import Config
from nvlm.inputs import identity
from nvlm.inputs.sources import model_source
from nvlm.runs.folder import check_same_model, find_checkpoint, latest
from nvlm.vision.source import vision_source


def check_weights(config: Config, run_dir: Path | None = None) -> None:
    """Raise ConfigError where config.init names something that is not what it should be, or where encoder and tokenizer
    are not those that a checkpoint's run was trained with. Reads headers and samples.

    A run that goes on from a checkpoint in `run_dir` needs the encoder alone.
    """
    if not config.dry_run or config.init.vision or config.init.release:
        vision_source(config)
    if config.resume == "auto" and run_dir is not None and latest(run_dir) is not None:
        identity.check_model(config, run_dir)
        return
    model_source(config)
    if config.init.checkpoint:
        folder = find_checkpoint(Path(config.init.checkpoint), "init.checkpoint")
        check_same_model(config, folder)
        identity.check_model(config, folder.parent.parent)
