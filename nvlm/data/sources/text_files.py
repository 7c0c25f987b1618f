"""Plain text files: each is a row with one key, `text`. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nvlm.config.fields import named
from nvlm.config.values import problem
from nvlm.data.images import open_regular
from nvlm.data.record import BadRecord

_LONGEST = 1 << 26  # bytes


class TextFiles:
    """The texts of `files`, one row each. `key`: the setting that named them. Raises ConfigError if one is missing."""

    def __init__(self, files: Sequence[Path], key: str) -> None:
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise problem(key, named(missing), "a text file that exists", f"{key}=FILE.txt")
        self.files = tuple(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, str]:
        with open_regular(self.files[index]) as file:
            data = file.read(_LONGEST + 1)
        if len(data) > _LONGEST:
            raise BadRecord(f"more than {_LONGEST >> 20} MiB of text: split it into documents")
        try:
            return {"text": data.decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            raise BadRecord(f"not UTF-8 at byte {error.start}") from None

    def name(self, index: int) -> str:
        """The file's name."""
        return self.files[index].name
