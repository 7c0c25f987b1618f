"""Weights & Biases, with `logging=wandb`. A failure after its start is reported in one line; training goes on."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvlm.config.mapping import to_mapping
from nvlm.config.values import Config, problem
from nvlm.runs.files import write_whole
from nvlm.runs.sinks import reason, say


class Tracker:
    """Logs the rows of one run, on the first rank. A resumed run continues under its id, which is in the run folder.

    Raises ConfigError if Weights & Biases cannot open a run.
    """

    def __init__(self, config: Config, run_dir: Path, resumed: bool) -> None:
        import wandb

        settings = config.logging
        try:
            self.run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=config.name,
                id=_identity(run_dir, resumed),
                resume="allow",
                mode=settings.mode,
                dir=str(run_dir),
                config=to_mapping(config),
            )
            # wandb's own step counter would refuse the steps that a resumed run repeats.
            self.run.define_metric("*", step_metric="step")
        except Exception as error:  # it may raise anything, from a missing login to a proxy's error
            fix = "wandb login, or logging.mode=offline, or logging=none"
            raise problem("logging=wandb", reason(error), "a run of Weights & Biases", fix) from None
        self.reported = False

    def log(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        self._try(lambda: self.run.log(dict(row)))

    def close(self) -> None:
        """Send what is left."""
        self._try(self.run.finish)

    def _try(self, act) -> None:
        try:
            act()
        except Exception as error:
            if not self.reported:
                say(f"Weights & Biases failed ({reason(error)}): training goes on")
            self.reported = True


class Silent:
    """No tracker."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


SILENT = Silent()


def build_tracker(config: Config, run_dir: Path, resumed: bool) -> Tracker | Silent:
    """The tracker that `config` asks for."""
    return Tracker(config, run_dir, resumed) if config.logging.name == "wandb" else SILENT


def _identity(run_dir: Path, resumed: bool) -> str:
    path = run_dir / "wandb_id"
    if resumed and path.is_file():
        return path.read_text().strip()
    identity = uuid.uuid4().hex[:8]
    write_whole(path, identity + "\n")
    return identity
