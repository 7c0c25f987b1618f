"""A sample's text stream as boxes: each token with its text and the part of the conversation that it belongs to.

A box usually is one token. Tokens that together make up one character share a box, and so do all tokens of a tile.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from nvlm.data.messages import Turn
from nvlm.data.outline import Outline
from nvlm.data.text.assemble import Run
from nvlm.data.text.tokenizer import ChatTokenizer
from nvlm.generate.text import TextStream
from nvlm.tiling.placement import Piece, RowEnd

FORMAT, TAG, TILE, LEARNED = "format", "tag", "tile", "learned"
KINDS = ("system", "user", "assistant", "document", FORMAT, TAG, TILE, LEARNED)
"""An assistant's or a document's box that is not learned is only context. The chat format's own text belongs to no
message."""


@dataclass(frozen=True, slots=True)
class Box:
    """Some tokens of the stream, from `position` on. `ids`: none for tile tokens, of which there are `count`; `image`,
    `tile`: what a tag names or tile tokens show, numbered from 0."""

    text: str
    kind: str
    position: int
    ids: tuple[int, ...] = ()
    count: int = 1
    image: int | None = None
    tile: int | None = None


def boxes(sketch: Outline, turns: Sequence[Turn], tokenizer: ChatTokenizer) -> list[Box]:
    """The stream of `sketch`, the outline of a record with these `turns`."""
    texts = [list(_texts(run.ids, tokenizer)) for run in sketch.runs]
    roles = _roles(["".join(text for text, _ in parts) for parts in texts], turns)
    found: list[Box] = []
    position = 0
    for run, parts, role in zip(sketch.runs, texts, roles):
        made = _of_run(run, parts, role, position)
        if run.image is not None:
            made = _of_image(sketch.placements[run.image].stream, run.image, tokenizer, position)
        found += made
        position += sum(box.count for box in made)
    return found


def key_boxes(sketch: Outline, tokenizer: ChatTokenizer) -> list[Box]:
    """The cross-attended keys of `sketch`, image by image."""
    found: list[Box] = []
    for image, placement in enumerate(sketch.placements):
        found += _of_image(placement.cross, image, tokenizer, sum(box.count for box in found))
    return found


def _of_run(run: Run, parts: Sequence[tuple[str, tuple[int, ...]]], roles: Sequence[str], position: int) -> list[Box]:
    """`roles`: of each character of the run's text."""
    ends = [0, *accumulate(len(text) for text, _ in parts)]
    places = [position, *accumulate((len(ids) for _, ids in parts), initial=position)][1:]
    kinds = [LEARNED if run.trained else (roles[end] if end < len(roles) else FORMAT) for end in ends]
    if run.trained and position == 0:
        kinds[0] = roles[0]  # nothing predicts the first token
    return [Box(text, kind, at, ids, len(ids)) for (text, ids), kind, at in zip(parts, kinds, places)]


def _of_image(pieces: Sequence[Piece], image: int, tokenizer: ChatTokenizer, position: int) -> list[Box]:
    found = []
    for piece in pieces:
        if piece.tiles:
            found.append(Box("", TILE, position, (), piece.length, image, piece.tile))
        elif isinstance(piece.content, RowEnd):
            found.append(Box("separator", TAG, position, (), 1, image, piece.tile))
        else:
            parts = _texts(piece.content.ids, tokenizer)
            places = position
            for text, ids in parts:
                found.append(Box(text, TAG, places, ids, len(ids), image, piece.tile))
                places += len(ids)
        position += piece.length
    return found


def _texts(ids: Sequence[int], tokenizer: ChatTokenizer) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The text of each token of a run, and the token; several where they are one character."""
    special = tokenizer.tokenizer.get_added_tokens_decoder()
    stream, held = TextStream(tokenizer), []
    for number in ids:
        if number in special:
            if held:
                yield stream.flush(), tuple(held)
            yield special[number].content, (number,)
            stream, held = TextStream(tokenizer), []
            continue
        held.append(number)
        if text := stream.push(number):
            yield text, tuple(held)
            held = []
    if held:
        yield stream.flush(), tuple(held)


def _roles(runs: Sequence[str], turns: Sequence[Turn]) -> list[list[str]]:
    """The role to which each character of each run belongs. Messages are searched for in the order of the `turns`:
    first a run that is the message's text, else its first occurrence."""
    starts = [0, *accumulate(map(len, runs))]
    whole = "".join(runs)
    found = [FORMAT] * len(whole)
    after = 0
    for turn in turns:
        for text in filter(None, turn.texts):
            at, length = _place(text, runs, starts, whole, after)
            if at >= 0:
                found[at : at + length] = [turn.role] * length
                after = at + length
    return [found[start:end] for start, end in zip(starts, starts[1:])]


def _place(text: str, runs: Sequence[str], starts: Sequence[int], whole: str, after: int) -> tuple[int, int]:
    """Where `text` begins at or behind `after`, and its length; -1 if it is not there. Chat formats may strip it."""
    first = bisect_right(starts, after - 1)
    exact = next((start for start, run in zip(starts[first:], runs[first:]) if run == text), -1)
    if exact >= 0:
        return exact, len(text)
    kept = text if text in whole[after:] else text.strip()
    return (whole.find(kept, after), len(kept)) if kept else (-1, 0)
