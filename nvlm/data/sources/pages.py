"""The built-in task: pages of handwritten digits (scikit-learn's 8x8 scans), with questions about them.

A page is made for a grid of (cols, rows) tiles from 1:6 to 6:1, with one digit somewhere in every tile. On the page's
thumbnail the digits are too small or too distorted to read, so the score depends on tiling. Training and held-out
pages draw from disjoint pools of scans. Lengths are in pixels unless a name says cells.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from nvlm.config.data import Pages
from nvlm.data.record import Record
from nvlm.data.sources.page_questions import MOST, ask_several, write_out

if TYPE_CHECKING:
    from datasets import Dataset

TILE = 112  # the tile side for which pages are laid out, px
CELLS = 4  # cells per tile side: one visual token covers one cell of 28 px
GRIDS = tuple((c, r) for c in range(1, 7) for r in range(1, 7) if c * r <= 6)  # (cols, rows), 14 of them
VERSION = 2  # part of the datasets cache key: raise it when pages or questions change

_SPLITS = {"train": 0, "heldout": 1}


@cache
def digit_pool(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Scans [n, 8, 8] float32 in 0..1 (1 is ink) and their labels [n]; every fifth scan is held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    held_out = np.arange(len(digits.target)) % 5 == 0
    chosen = held_out if _SPLITS[split] else ~held_out
    return (digits.images[chosen] / 16).astype(np.float32), digits.target[chosen]


@cache
def _grain() -> np.ndarray:
    """One sheet of paper grain [1024, 1024] float32, in grey levels; pages take windows of it."""
    return np.random.default_rng(0).normal(0, 3, (1024, 1024)).astype(np.float32)


def draw_digit(
    ink: np.ndarray, scan: np.ndarray, centre: tuple[float, float], size: tuple[float, float], rng: np.random.Generator
) -> None:
    """Draw one scan onto ink [height, width] (0..1), smoothly enlarged, slightly rotated and slanted.

    centre and size are (x, y) and (width, height) in px of the page.
    """
    left, top = (int(np.floor(c - s)) for c, s in zip(centre, size, strict=True))
    width, height = (int(np.ceil(2 * s)) for s in size)
    angle, slant = rng.normal(0, 0.07), rng.normal(0, 0.07)
    per_px = 8 / size[0], 8 / size[1]
    a, b = np.cos(angle) * per_px[0], (np.sin(angle) + slant) * per_px[0]
    d, e = -np.sin(angle) * per_px[1], np.cos(angle) * per_px[1]
    x, y = centre[0] - left, centre[1] - top
    padded = Image.fromarray(np.pad(scan, 2))
    middle = padded.width / 2
    glyph = np.asarray(
        padded.transform(
            (width, height),
            Image.Transform.AFFINE,
            (a, b, middle - a * x - b * y, d, e, middle - d * x - e * y),
            Image.Resampling.BICUBIC,
        )
    )
    x0, y0 = max(left, 0), max(top, 0)
    window = ink[y0 : max(top + height, 0), x0 : max(left + width, 0)]
    part = glyph[y0 - top : y0 - top + window.shape[0], x0 - left : x0 - left + window.shape[1]]
    np.maximum(window, part, out=window)


def on_paper(ink: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Ink [height, width] (0..1) as an RGB image: dark ink of some colour on light, grainy paper."""
    height, width = ink.shape
    paper = rng.uniform(225, 250) - rng.uniform(0, 14, 3) * (0, 0.4, 1)
    pen = rng.uniform(10, 70) + rng.uniform(0, 40, 3) * (0, 0.4, 1)
    top, left = rng.integers(0, 1024 - height + 1), rng.integers(0, 1024 - width + 1)
    light = _grain()[top : top + height, left : left + width, None]
    amount = np.clip(ink * rng.uniform(1.0, 1.3), 0, 1)[..., None]
    pixels = paper.astype(np.float32) + amount * (pen - paper).astype(np.float32) + light
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_page(
    split: str,
    grid: tuple[int, int],
    rng: np.random.Generator,
    distinct: bool = False,
    digits: np.ndarray | None = None,
) -> tuple[Image.Image, np.ndarray]:
    """A page for grid = (cols, rows) tiles and its digits [rows, cols], by default random ones; `distinct`: no digit
    twice.

    The page's size is random; tiling resizes it to (cols * TILE, rows * TILE). Its aspect ratio is close enough to
    cols / rows for the tiling rule to choose that grid.
    """
    cols, rows = grid
    scans, labels = digit_pool(split)
    zoom = rng.uniform(0.8, 1.25) * np.exp(rng.uniform(-0.02, 0.02, 2))  # page px per tile px, (x, y)
    if cols == rows:
        zoom[:] = zoom[0]  # only for a square do 1:1 and 2:2 tie, so that the area decides
    width, height = round(cols * TILE * zoom[0]), round(rows * TILE * zoom[1])
    ink = np.zeros((height, width), np.float32)
    digits = draw_digits(grid, rng, distinct) if digits is None else digits
    cell = TILE / CELLS
    for row in range(rows):
        line = rng.integers(CELLS)  # the digits of a row are on one line
        for col in range(cols):
            at = np.array([col, row]) * TILE + (np.array([rng.integers(CELLS), line]) + 0.5) * cell
            at = (at + rng.uniform(-2.5, 2.5, 2)) * zoom
            size = rng.uniform(0.8, 1.0) * np.array([rng.uniform(0.85, 1), 1]) * cell * zoom
            scan = scans[rng.choice(np.flatnonzero(labels == digits[row, col]))]
            draw_digit(ink, scan, tuple(at), tuple(size), rng)
    return on_paper(ink, rng), digits


def draw_digits(grid: tuple[int, int], rng: np.random.Generator, distinct: bool = False) -> np.ndarray:
    """The digits [rows, cols] of a page for grid = (cols, rows); `distinct`: no digit twice."""
    if distinct:
        return rng.permutation(10)[: grid[0] * grid[1]].reshape(grid[::-1])
    # Some pages have few different digits, so that counts other than 0 and 1 occur.
    palette = rng.permutation(10)[: rng.integers(2, 11)]
    return rng.choice(palette, grid[::-1])


def make_page(
    split: str, seed: int, index: int, questions: int, form: str = "picture", about: str = "tags"
) -> dict[str, Any]:
    """Record number `index`: a page (PIL image), or in the form "text" no image, and so many distinct questions. In the
    forms "pictures" and "document" the page is a line of digits, each on a picture of its own; a document has each
    digit as text after its picture, and no questions.

    If they are about "positions", no digit is twice on the page: every answer but a sorted page's needs the position.
    """
    if not 1 <= questions <= MOST[about]:
        raise ValueError(f"questions per page, got {questions}, expected 1 to {MOST[about]}")
    if form in ("pictures", "document"):
        return _make_pictures(split, seed, index, questions, form, about)
    textual, positions = form == "text", about == "positions"
    rng = np.random.default_rng([_SPLITS[split], seed, index, *([textual, positions] if positions else [1] * textual)])
    grid = GRIDS[rng.integers(len(GRIDS))]
    if textual:
        images, digits = [], draw_digits(grid, rng, positions)
        before = write_out(digits, about)
    else:
        page, digits = draw_page(split, grid, rng, positions)
        images, before = [page], "<image>\n"
    # Neither a one-tile page nor a text has numbered tags, so nothing is asked about their tiles.
    turns = ask_several(about, digits, questions, digits.size > 1 and not textual, rng)
    return {
        "id": f"{split}-{seed}-{index}" + "-positions" * positions + "-text" * textual,
        "messages": _conversation(before, turns),
        "images": images,
        "kinds": [kind for _, kind in turns.values()],
    }


def _make_pictures(split: str, seed: int, index: int, questions: int, form: str, about: str) -> dict[str, Any]:
    rng = np.random.default_rng([_SPLITS[split], seed, index, 2])
    digits = draw_digits((int(rng.integers(2, 7)), 1), rng, about == "positions")
    images = [draw_page(split, (1, 1), rng, digits=digit.reshape(1, 1))[0] for digit in digits[0]]
    if form == "document":
        content = "".join(f"<image>\n{digit}\n" for digit in digits[0])
        messages, kinds = [{"role": "document", "content": content}], ["document"]
    else:
        turns = ask_several(about, digits, questions, False, rng)
        messages, kinds = _conversation("<image>\n" * digits.size, turns), [kind for _, kind in turns.values()]
    return {"id": f"{split}-{seed}-{index}-{form}", "messages": messages, "images": images, "kinds": kinds}


def _conversation(before: str, turns: Mapping[str, tuple[str, str]]) -> list[dict[str, str]]:
    """The questions with their answers; `before` comes before the first."""
    messages = [
        {"role": role, "content": content}
        for question, (answer, _) in turns.items()
        for role, content in (("user", question), ("assistant", answer))
    ]
    messages[0]["content"] = before + messages[0]["content"]
    return messages


def _records(
    split: str, indices: list[int], seed: int, questions: int, form: str, about: str, version: int
) -> Iterator[dict[str, Any]]:
    """The records with these indices, their pages as JPEG bytes; version is only part of the cache key."""
    for index in indices:
        record = make_page(split, seed, index, questions, form, about)
        yield record | {"images": [{"bytes": _jpeg(page), "path": None} for page in record["images"]]}


def _jpeg(page: Image.Image) -> bytes:
    data = io.BytesIO()
    page.save(data, "JPEG", quality=90)
    return data.getvalue()


def build(source: Pages, seed: int, heldout: bool) -> PageRecords:
    """The pages of a run; held-out ones have one question each."""
    import datasets

    datasets.disable_progress_bars()
    if heldout:
        return PageRecords(build_pages("heldout", source.heldout_records, seed, 1, source.form, source.about))
    return PageRecords(build_pages("train", source.records, seed, source.questions, source.form, source.about))


def first(source: Pages, heldout: bool) -> None:
    """The pages need no check, since they are generated."""


class PageRecords:
    """Pages in a Hugging Face dataset: columns id, messages, images (not decoded until used) and kinds."""

    files = ()  # pages are generated, not read

    def __init__(self, dataset) -> None:
        from datasets import Image as ImageFeature
        from datasets import Sequence as SequenceFeature

        self.dataset = dataset.cast_column("images", SequenceFeature(ImageFeature(decode=False)))

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return str(self.dataset[index]["id"])

    def kind(self, index: int) -> str:
        return self.dataset[index]["kinds"][0]

    def __getitem__(self, index: int) -> Record:
        row = self.dataset[index]
        return Record(str(row["id"]), row["messages"], [image["bytes"] or image["path"] for image in row["images"]])


def build_pages(
    split: str,
    count: int,
    seed: int = 0,
    questions_per_page: int = 4,
    form: str = "picture",
    about: str = "tags",
) -> Dataset:
    """Pages 0..count-1 of a split ("train" or "heldout") with columns id, messages, images and kinds.

    kinds holds the kind of each question, in the order of the turns. Record i depends only on (split, seed, i),
    questions_per_page, form and about. Built once (about 2.5 ms and 10 kB per page), then read from the datasets cache.
    """
    from datasets import Dataset, Features, Image, Sequence, Value

    features = Features(
        {
            "id": Value("string"),
            "messages": [{"role": Value("string"), "content": Value("string")}],
            "images": Sequence(Image()),
            "kinds": Sequence(Value("string")),
        }
    )
    arguments = {
        "split": split,
        "indices": list(range(count)),
        "seed": seed,
        "questions": questions_per_page,
        "form": form,
        "about": about,
        "version": VERSION,
    }
    return Dataset.from_generator(_records, features=features, gen_kwargs=arguments)
