"""Checks that an export can be read: its readers open it, by headers only, before it gets its final name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nvlm.config.values import Config, ConfigError, problem
from nvlm.export.modeling_nvlm import NVLM
from nvlm.inputs.sources import model_source
from nvlm.vision.source import vision_source


def check_readable(folder: Path, config: Config, out: Path) -> None:
    """Raise ConfigError if `folder`, an export of `config` to be named `out`, cannot be read by its own code or as
    init.release of a run."""
    try:
        if (folder / "modeling_nvlm.py").is_file():
            model, _ = NVLM.opened(folder)
            if config.llm.tokenizer:
                assert model.ends
        again = replace(config, init=replace(config.init, llm=None, vision=None, checkpoint=None, release=str(folder)))
        model_source(again)
        vision_source(again)
    except (ConfigError, ValueError, TypeError, AttributeError, LookupError) as error:
        got = f"an export that its own reader refuses ({str(error).splitlines()[0]})"
        raise problem(f"out={out}", got, "one that it takes", "report it with the run's config.yaml") from None
