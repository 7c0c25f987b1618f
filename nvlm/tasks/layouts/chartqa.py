"""ChartQA (arXiv 2203.10244): questions about charts, written by people or made by a model. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from nvlm.data.images import image_path
from nvlm.data.sources.rows import Joined, Row, Rows
from nvlm.tasks.asked import Asked, images_of, text_of, texts_of, word_of
from nvlm.tasks.layouts.parquet import parquet
from nvlm.tasks.release import Release
from nvlm.tasks.rows import With, json_rows

_KINDS = {"0": "human", "1": "augmented"}  # HuggingFaceM4/ChartQA's human_or_machine


def of_json(row: Row, name: str, root: Path) -> Asked:
    """A row of SPLIT_human.json or SPLIT_augmented.json, to which the reader adds its file's kind."""
    image = image_path(root, text_of(row, "imgname"))
    return Asked(
        id=name,
        text=text_of(row, "query"),
        references=texts_of(row, "label"),
        images=(image,),
        category=row["kind"],
    )


def of_parquet(row: Row, name: str, root: Path) -> Asked:
    """A row of HuggingFaceM4/ChartQA, or of lmms-lab/ChartQA, which says "human_test" or "augmented_test"."""
    kind = word_of(row, "human_or_machine", "type")
    return Asked(
        id=name,
        text=text_of(row, "query", "question"),
        references=texts_of(row, "label", "answer"),
        images=images_of(row, root, "image"),
        category=_KINDS.get(kind, kind.partition("_")[0]),
    )


def _open(files: Sequence[Sequence[Path]], key: str) -> Rows:
    kind = lambda path: path.stem.rpartition("_")[2]  # noqa: E731
    return Joined([With(json_rows([path], key), {"kind": kind(path)}) for path in chain.from_iterable(files)])


_PLACES = ("{short}/", "*/{short}/")
RELEASES = (
    Release(
        files=tuple(tuple(f"{place}{{short}}_{kind}.json" for place in _PLACES) for kind in ("human", "augmented")),
        images=tuple(f"{place}png" for place in _PLACES),
        rows=_open,
        ask=of_json,
    ),
    parquet(of_parquet),
)
