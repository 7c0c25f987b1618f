"""Initial weights of a stage: from published folders or the previous stage's checkpoint; new modules start random."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.core import parallel_state

from nvlm.arch.base import VisionLanguageModel
from nvlm.config.values import Config, problem
from nvlm.inputs.sources import model_source
from nvlm.processes import groups as ranks
from nvlm.runs.folder import ENCODER, find_checkpoint
from nvlm.train.checkpoint.restore import load_weights
from nvlm.vision.source import encoder_of_run, trained_before, trained_encoder
from nvlm.vision.trained import write_trained
from nvlm.weights.load import read


def begin(parts: Sequence[VisionLanguageModel], config: Config) -> dict[str, str]:
    """Fill `parts` with the weights that config.init names; returns where each module group's weights come from.

    A collective call. The encoder is not part of the model: vision.path reads it.
    """
    origins = dict.fromkeys(("projector", "xattn", "llm"), "random")
    origins["vision"] = config.init.vision or config.init.release or ""
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    if source := model_source(config):
        groups = [group for group in source.parts if group != "vision"]
        ours = {name: tensor for part in parts for name, tensor in part.weights().items()}
        read(source, groups, ours, rank, size)
        origins |= dict.fromkeys(groups, source.folder)
    if config.init.checkpoint:
        folder = find_checkpoint(Path(config.init.checkpoint), "init.checkpoint")
        trained = trained_encoder(folder)
        origins["vision"] = str(trained or origins["vision"] or encoder_of_run(folder))
        absent = load_weights(parts, folder, config.stage.new)
        origins |= {group: str(folder) for group in ("projector", "xattn", "llm") if group not in absent}
    return origins


def own_encoder(config: Config, run_dir: Path, resumed: bool) -> Path | None:
    """The run's file of an encoder that learned in an earlier stage, and does not learn in this one. A new run writes
    it, so that it does not depend on the earlier stage's checkpoints. A collective call."""
    file = run_dir / ENCODER
    trained = None if resumed or config.stage.train_vision else trained_before(config)

    def write() -> None:
        try:
            file.unlink(missing_ok=True)
            if trained is not None:
                run_dir.mkdir(parents=True, exist_ok=True)
                write_trained(trained, config.vision, file)
        except OSError as error:
            raise problem(str(file), error.strerror or error, "room for the trained encoder", "free space") from None

    if not resumed:
        ranks.raised_together(write)
    return file if file.is_file() else None
