"""Tokens to text as they come."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm.data.tokenizer import ChatTokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no whole character decode to


class TextStream:
    """Text of a growing list of ids, piece by piece; a character whose bytes have not all come is held back."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        # Some decoders treat a text's first token otherwise, so each piece is decoded behind the one before.
        self.context, self.told = 0, 0

    def push(self, token: int) -> str:
        """What can be told now that `token` has come; nothing for the token that ends an answer."""
        if token in self.tokenizer.ends:
            return ""
        self.ids.append(token)
        return self._more(hold=self._text().endswith(_BROKEN))

    def flush(self) -> str:
        """What was held back, at the end."""
        return self._more(hold=False)

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids[self.context :])

    def _more(self, hold: bool) -> str:
        if hold:
            return ""
        before = self.tokenizer.decode(self.ids[self.context : self.told])
        piece = self._text()[len(before) :]
        self.context, self.told = self.told, len(self.ids)
        return piece


def words(ids: Sequence[int], tokenizer: ChatTokenizer) -> str:
    """The text of an answer, without the token that ends it."""
    return tokenizer.decode(ids[:-1] if ids and ids[-1] in tokenizer.ends else ids)
