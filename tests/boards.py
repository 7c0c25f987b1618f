"""Reads TensorBoard's files."""

from __future__ import annotations

from pathlib import Path


def scalars(folder: Path, name: str = "loss") -> dict[int, float]:
    """The values of `name` that TensorBoard shows, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {event.step: event.value for event in reader.Scalars(name)}
