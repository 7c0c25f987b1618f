"""Reads the names of a checkpoint's tensors without torch.

torch.distributed.checkpoint stores them in a pickle. Nothing in it is imported or run here: every class is replaced
by a stand-in, and only names are used.
"""

from __future__ import annotations

import pickle
from pathlib import Path

from nvlm.config.values import problem


class _StandIn:
    def __init__(self, *_, **__) -> None:
        self.state: object = {}

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        return _StandIn


def tensor_names(folder: Path) -> list[str]:
    """Keys of the tensors in a step folder or in a folder of frozen weights; empty without a checkpoint."""
    path = folder / ".metadata"
    if not path.is_file():
        return []
    try:
        with open(path, "rb") as file:
            return list(_Unpickler(file).load().state["state_dict_metadata"])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, ValueError, IndexError):
        fix = "use another one, or restore it from a copy"
        raise problem(f"checkpoint {folder}", "a damaged .metadata", "the file as it was written", fix) from None
