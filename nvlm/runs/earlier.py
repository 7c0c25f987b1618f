"""Converts a run's config.yaml from the form of earlier versions. Imports no torch."""

from __future__ import annotations

# Keys that earlier versions did not write, by group, with the value they implied.
_ADDED = {
    "logging": {"name": "none", "project": None, "entity": None, "mode": "online"},
    "vision": {"encoder": "internvit", "pool": "concat", "pads": False},
    "llm": {"chat": "chatml"},
    "projector": {"name": "nvlm", "kind": None, "norm": True, "bias": False, "inner": "ffn"},
    "arch": {"sees": "before"},
    "parallel": {"userbuffers": False, "gradients": "fp32"},
    "optim": {"lr_of": {}},
}
# Values that are written otherwise now, by group and key.
_WRITTEN = {("arch", "bind_tags"): {True: "mean", False: "none"}}
# Keys that are no longer written. They were only tables of defaults; the chosen values are under data and train.
_DROPPED = {"llm": ("seq_length", "cross_length", "steps")}
# Keys of other data sources, which earlier versions wrote with every source.
_OF_OTHERS = {"pages": ("path", "heldout_path"), "jsonl": ("records", "heldout_records", "questions")}


def as_written_now(values: dict) -> dict:
    """The mapping of a config.yaml written by any version, in the form of this version. `values` is not changed."""
    return {**_ADDED, **{group: _converted(group, keys) for group, keys in values.items()}}


def _converted(group: str, keys: object) -> object:
    if not isinstance(keys, dict):
        return keys
    source = keys.get("source") if group == "data" else None
    added = _ADDED.get(group, {})
    dropped = _OF_OTHERS.get(source, ()) if group == "data" else _DROPPED.get(group, ())
    return added | {key: value_now(group, key, value) for key, value in keys.items() if key not in dropped}


def value_now(group: str, key: str, value: object) -> object:
    """The value of `group`.`key`, which any version wrote, in the form of this version."""
    return next((new for old, new in _WRITTEN.get((group, key), {}).items() if value is old), value)
