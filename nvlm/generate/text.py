"""Turns tokens into text as they arrive."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm.data.text.tokenizer import ChatTokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what an incomplete character decodes to


class TextStream:
    """The text of a growing list of ids, in pieces. Incomplete characters are held back until complete."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        # Some decoders treat a text's first token differently, so each piece is decoded after the previous one.
        self.context, self.done = 0, 0
        self.lead = tokenizer.form.lead  # what the chat format puts before an answer

    def push(self, token: int) -> str:
        """The text that `token` completes; empty for the token that ends an answer."""
        if token in self.tokenizer.ends:
            return ""
        self.ids.append(token)
        return self._more(hold=self._text().endswith(_BROKEN))

    def flush(self) -> str:
        """What is still held back at the end."""
        return self._more(hold=False)

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids[self.context :])

    def _more(self, hold: bool) -> str:
        if hold:
            return ""
        before = self.tokenizer.decode(self.ids[self.context : self.done])
        piece = self._text()[len(before) :]
        self.context, self.done = self.done, len(self.ids)
        self.lead, lead = self.lead if not piece else "", self.lead
        return piece.removeprefix(lead)


def words(ids: Sequence[int], tokenizer: ChatTokenizer) -> str:
    """The text of an answer, without the token that ends it and what the chat format puts before an answer."""
    text = tokenizer.decode(ids[:-1] if ids and ids[-1] in tokenizer.ends else ids)
    return text.removeprefix(tokenizer.form.lead)
