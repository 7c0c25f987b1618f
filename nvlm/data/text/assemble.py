"""From a conversation's layout and its messages to runs of token ids. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from nvlm.data.messages import Turn
from nvlm.data.record import BadRecord
from nvlm.data.text.formats import KEEP, Layout, Trim
from nvlm.data.text.tokenizer import ChatTokenizer, Special


@dataclass(frozen=True, slots=True)
class Run:
    """Token ids with or without loss, or an image slot (`image` is the image's number)."""

    ids: tuple[int, ...] = ()
    trained: bool = False
    image: int | None = None


def assembled(layout: Layout, turns: Sequence[Turn], tokenizer: ChatTokenizer, begins: bool) -> list[Run]:
    """The runs of a conversation; `begins`: with the tokenizer's begin token, if it has one. Raises BadRecord."""
    writer = _Writer(tokenizer, [turn.learned for turn in turns], begins)
    first_image = [0, *accumulate(turn.images for turn in turns)]
    for piece in layout.pieces:
        if piece.turn is None:
            for part in _parts(tokenizer, piece.text):
                (writer.token if isinstance(part, Special) else writer.text)(part, piece.answer)
            continue
        first, *others = stripped(turns[piece.turn].texts, layout.trims[piece.turn])
        writer.text(first, piece.answer)
        for number, text in enumerate(others, start=first_image[piece.turn]):
            writer.image(number)
            writer.text(text, piece.answer)
    writer.flush()
    return writer.runs


def stripped(texts: Sequence[str], trim: Trim) -> Sequence[str]:
    """The texts of a message without what it loses at its ends."""
    if trim == KEEP:
        return texts
    first, *others = texts
    *between, last = (first.lstrip(trim[0]), *others)
    return (*between, last.rstrip(trim[1]))


@lru_cache(maxsize=4096)
def _parts(tokenizer: ChatTokenizer, text: str) -> tuple[Special | str, ...]:
    """A format's own text as special tokens and the texts between them; the longest token where several begin."""
    names = "|".join(map(re.escape, sorted(tokenizer.specials, key=len, reverse=True))) or "(?!)"
    parts = re.split(f"({names})", text)
    return tuple(tokenizer.specials[part] if number % 2 else part for number, part in enumerate(parts) if part)


class _Writer:
    """Collects text, which is tokenised up to the next special token, image, or start or end of an answer.

    Where own text and messages are tokenised apart (`ChatFormat.together` is false), each piece of text is a run.
    """

    def __init__(self, tokenizer: ChatTokenizer, learned: Sequence[bool], begins: bool) -> None:
        self.tokenizer, self.learned = tokenizer, learned
        self.runs: list[Run] = []
        self.collected, self.answer = "", None
        self.before = "nothing"  # what the collected text follows: nothing, a token or text
        self.takes_space = False  # the last token takes the white space behind it
        self.images = 0
        if begins and tokenizer.bos is not None:
            self.runs.append(Run((tokenizer.bos,)))
            self.before = "token"

    def text(self, text: str, answer: int | None) -> None:
        """Add text, which belongs to message number `answer` if that is an assistant's."""
        if answer != self.answer or not self.tokenizer.form.together:
            self.flush()
        if self.takes_space and answer is None:
            text = text.lstrip()
        self.takes_space = self.takes_space and answer is None and not text
        self.collected, self.answer = self.collected + text, answer

    def token(self, token: Special, answer: int | None) -> None:
        """Add a special token."""
        if token.lstrip and self.answer is None:
            self.collected = self.collected.rstrip()
        self.flush()
        self.runs.append(Run((token.number,), self._learns(answer)))
        self.before, self.takes_space = "token", token.rstrip

    def image(self, number: int) -> None:
        """Add an image slot. Raises BadRecord if the images are not in the record's order."""
        if number != self.images:
            raise BadRecord("the chat format puts a message with an image before an earlier one")
        self.flush()
        encode, (opening, closing) = self.tokenizer.encode, self.tokenizer.marks
        self.runs += [Run(encode(opening)), Run(image=number), Run(encode(closing))]
        self.before, self.takes_space, self.images = "text", False, self.images + 1

    def flush(self) -> None:
        """Tokenise the collected text."""
        if self.collected:
            ids = self.tokenizer.encode_after(self.before, self.collected)
            self.runs.append(Run(ids, self._learns(self.answer)))
            self.before, self.collected = "text", ""

    def _learns(self, answer: int | None) -> bool:
        return answer is not None and self.learned[answer]
