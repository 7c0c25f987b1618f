"""MathVista (arXiv 2310.02255): mathematics with images, free answers or multiple choice. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nvlm.config.values import problem
from nvlm.data.images import image_path
from nvlm.data.sources.rows import Row, Rows
from nvlm.tasks.asked import Asked, images_of, letters, text_of, texts_of, word_of
from nvlm.tasks.layouts.parquet import parquet
from nvlm.tasks.release import Release
from nvlm.tasks.rows import Listed, as_row, read_json


def of_json(row: Row, name: str, root: Path) -> Asked:
    """A row of testmini.json, with its `query` from query.json if that is there."""
    return _asked(row, (image_path(root, Path(text_of(row, "image")).name),))


def of_parquet(row: Row, name: str, root: Path) -> Asked:
    """A row of AI4Math/MathVista."""
    return _asked(row, images_of(row, root, "decoded_image"))


def _asked(row: Row, images: tuple) -> Asked:
    """The question is the published `query`, which has a hint about the form of the answer and the choices."""
    options = texts_of(row, "choices")
    metadata = row.get("metadata") if isinstance(row.get("metadata"), dict) else {}
    return Asked(
        id=text_of(row, "pid"),
        text=word_of(row, "query") or _query(row, options),
        references=tuple(answer for answer in texts_of(row, "answer") if answer),  # the test split has none
        images=images,
        options=options,
        type=_type(row),
        category=word_of(metadata, "task"),
    )


def _type(row: Row) -> str:
    """What the metric must know: "multi_choice", or the type of the answer, as "float:2" with its decimal places."""
    if word_of(row, "question_type") == "multi_choice":
        return "multi_choice"
    kind, places = word_of(row, "answer_type"), row.get("precision")
    return f"{kind}:{int(places)}" if kind == "float" and isinstance(places, int | float) else kind


def _query(row: Row, options: Sequence[str]) -> str:
    unit = word_of(row, "unit")
    question = f"Question: {text_of(row, 'question')}" + (f" (Unit: {unit})" if unit else "")
    if not options:
        return question
    listed = "\n".join(f"({letter}) {option}" for letter, option in zip(letters(len(options)), options))
    return f"{question}\nChoices:\n{listed}"


def _open(files: Sequence[Sequence[Path]], key: str) -> Rows:
    (path,) = files[0]
    rows, queries = read_json(path, key), path.with_name("query.json")
    asked = read_json(queries, key) if queries.is_file() else {}
    if not isinstance(rows, dict) or not isinstance(asked, dict):
        raise problem(key, f"{path}, which is no JSON object", "an object with a row for each problem", f"{key}=FOLDER")
    more = {number: {"query": asked[number]} if number in asked else {} for number in rows}
    filled = [{"pid": number, **as_row(row), **more[number]} for number, row in rows.items()]
    return Listed((path,), filled, [f"{path.name}[{number}]" for number in rows])


RELEASES = (
    Release(
        files=(("{split}.json", "data/{split}.json", "annot_{split}.json"),),
        images=("images", "data/images"),
        rows=_open,
        ask=of_json,
    ),
    parquet(of_parquet),
)
