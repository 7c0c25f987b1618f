"""Questions about the digits of a built-in page, and their answers. Digits are arrays [rows, cols].

Questions about "tags" name a tile by its 1-D tag and a row by its number. Those about "positions" use letters, which no
tile tag contains: "row B, column C" is nearest to what 2-D tags say, "place D", counted in reading order, to what 1-D
tags say. Of these, only "Sort the page." does not depend on where the digits stand.
"""

from __future__ import annotations

from string import ascii_uppercase as LETTERS

import numpy as np

KINDS = ("tile", "row", "page", "count")
SHARES = {  # of each kind, where the page allows it
    "tags": dict(zip(KINDS, (0.4, 0.25, 0.25, 0.1))),
    "positions": {"cell": 0.25, "place": 0.25, "row": 0.15, "page": 0.2, "sort": 0.15},
}
MOST = {"tags": 12, "positions": 5}  # distinct questions about a page of one tile


def write_out(digits: np.ndarray, about: str = "tags") -> str:
    """The digits as text, such as "row 1: 35" and "row 2: 41" on lines of their own."""
    names = LETTERS if about == "positions" else "123456"
    return "".join(f"row {name}: {_text(row)}\n" for name, row in zip(names, digits))


def ask(kind: str, digits: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """One question of that kind, about tags, and its answer."""
    rows, cols = digits.shape
    if kind == "tile":  # tiles are numbered from 1, row by row, as their tags are
        tile = rng.integers(digits.size)
        return f"What stands in <tile_{tile + 1}>?", str(digits.flat[tile])
    if kind == "row":
        row = rng.integers(rows)
        return f"Read row {row + 1}.", _text(digits[row])
    if kind == "page":
        return "Read the page.", _text(digits)
    present = rng.random() < 0.75
    digit = rng.choice(np.unique(digits) if present else np.setdiff1d(np.arange(10), digits))
    return f"How many times is there a {digit}?", str(np.count_nonzero(digits == digit))


def ask_position(kind: str, digits: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """One question of that kind, about positions, and its answer."""
    place = rng.integers(digits.size)
    row, col = divmod(int(place), digits.shape[1])
    return {
        "cell": (f"Read row {LETTERS[row]}, column {LETTERS[col]}.", str(digits[row, col])),
        "place": (f"Read place {LETTERS[place]}.", str(digits[row, col])),
        "row": (f"Read row {LETTERS[row]}.", _text(digits[row])),
        "page": ("Read the page.", _text(digits)),
        "sort": ("Sort the page.", _text(np.sort(digits, axis=None))),
    }[kind]


def ask_several(
    about: str, digits: np.ndarray, count: int, tiles: bool, rng: np.random.Generator
) -> dict[str, tuple[str, str]]:
    """`count` distinct questions in random order, each with its answer and kind. `tiles`: whether tiles have tags."""
    shares = SHARES[about]
    weights = np.array([share * (tiles or kind != "tile") for kind, share in shares.items()])
    one = ask if about == "tags" else ask_position
    turns: dict[str, tuple[str, str]] = {}
    while len(turns) < count:
        kind = str(rng.choice(list(shares), p=weights / weights.sum()))
        question, answer = one(kind, digits, rng)
        turns.setdefault(question, (answer, kind))
    return turns


def _text(digits: np.ndarray) -> str:
    return "".join(map(str, digits.flat))
