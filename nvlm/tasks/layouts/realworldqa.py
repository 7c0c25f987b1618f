"""RealWorldQA (x.ai, Grok-1.5 Vision): questions about photographs of everyday scenes. Imports no torch."""

from __future__ import annotations

import re
import string
from pathlib import Path

from nvlm.data.sources.rows import Row
from nvlm.tasks.asked import Asked, images_of, text_of
from nvlm.tasks.layouts.parquet import parquet

_OPTION = re.compile(r"^([A-Z])\. *(.+)$", re.MULTILINE)


def of_parquet(row: Row, name: str, root: Path) -> Asked:
    """A row of xai-org/RealworldQA or lmms-lab/RealWorldQA. Its question says how to answer and lists its options."""
    text, answer = text_of(row, "question"), text_of(row, "answer").strip()
    return Asked(
        id=name,
        text=text,
        references=(answer,) if answer else (),
        images=images_of(row, root, "image"),
        options=_options(text) if len(answer) == 1 and answer in string.ascii_uppercase else (),
    )


def _options(text: str) -> tuple[str, ...]:
    """The options that a question lists as A, B, C, ..., one a line."""
    found = _OPTION.findall(text)
    listed = [letter for letter, _ in found] == list(string.ascii_uppercase[: len(found)])
    return tuple(option.strip() for _, option in found) if listed else ()


RELEASES = (parquet(of_parquet),)
