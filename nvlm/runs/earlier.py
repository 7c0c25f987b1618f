"""What earlier versions wrote into a run's config.yaml, as it is written now. Imports no torch."""

from __future__ import annotations

# Keys that they did not write, by group, as they would have.
_ADDED = {
    "logging": {"name": "none", "project": None, "entity": None, "mode": "online"},
    "vision": {"encoder": "internvit"},
}
# Keys of a group that steered nothing by themselves: what was chosen of them stands under data and train.
_DROPPED = {"llm": ("seq_length", "cross_length", "steps")}
# Keys that a source did not have.
_ADDED_TO_SOURCE = {"jsonl": {"root": None}}
# Keys of `data` that a source was given although they are those of another one.
_OF_OTHERS = {"pages": ("path", "heldout_path"), "jsonl": ("records", "heldout_records", "questions")}


def as_written_now(values: dict) -> dict:
    """The mapping of a config.yaml, written by any version, as this version writes it. `values` stay as they are."""
    return {**_ADDED, **{group: _converted(group, keys) for group, keys in values.items()}}


def _converted(group: str, keys: object) -> object:
    if not isinstance(keys, dict):
        return keys
    source = keys.get("source") if group == "data" else None
    added = _ADDED_TO_SOURCE.get(source, {}) if group == "data" else _ADDED.get(group, {})
    dropped = _OF_OTHERS.get(source, ()) if group == "data" else _DROPPED.get(group, ())
    return added | {key: value for key, value in keys.items() if key not in dropped}
