"""Weights & Biases, where `logging=wandb` asks for it. What fails behind its start costs a line, not the run."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvlm.config.values import Config, problem
from nvlm.runs.files import write_whole
from nvlm.runs.sinks import reason, say


class Tracker:
    """Rows of one run, in the first process. A resumed run goes on in the same place: its id is in the run folder.

    Raises ConfigError where no run can be opened.
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
                config=dataclasses.asdict(config),
            )
            # Not its own count of steps, which refuses those that a resumed run does again.
            self.run.define_metric("*", step_metric="step")
        except Exception as error:  # whatever it raises, from a missing login to a proxy's
            fix = "wandb login, or logging.mode=offline, or logging=none"
            raise problem("logging=wandb", reason(error), "a run of Weights & Biases", fix) from None
        self.told = False

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
            if not self.told:
                say(f"Weights & Biases fails ({reason(error)}): training goes on")
            self.told = True


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
