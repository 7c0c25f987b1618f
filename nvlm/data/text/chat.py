"""A conversation's text stream: messages become runs of token ids, with or without loss, and image slots between them.

The run's chat format (`formats`, or `template` for the tokenizer's own) lays the conversation out; the loss is on an
assistant's text and the token that ends it. Special tokens come from the format's own text alone. A document is its
text, all with loss, and the token that ends a text.

`<Image>`, tags and `</Image>` are tokenised apart from other text, as in NVLM's training, unless data.tokenize says
otherwise (`joined`). An assistant's text is always apart from what stands before it, where generation starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nvlm.data.messages import DOCUMENT, Turn
from nvlm.data.record import BadRecord
from nvlm.data.text.assemble import Run, assembled
from nvlm.data.text.formats import KEEP, Layout, Piece
from nvlm.data.text.joined import with_first_tags
from nvlm.data.text.tokenizer import ChatTokenizer


def runs(
    turns: Sequence[Turn],
    tokenizer: ChatTokenizer,
    system: str | None = None,
    tokenize: str = "apart",
    first_tags: Sequence[str] = (),
    reply: bool = False,
) -> list[Run]:
    """The conversation as runs; with `reply` as a prompt, up to where an answer starts, or to the end of a document's
    text. Raises BadRecord.

    `system` is put first unless the conversation has its own system turn. `first_tags`: the first tag in each image's
    slot, which is part of the text unless `tokenize` is apart.
    """
    if reply and turns[-1].role == "assistant":
        raise BadRecord("the last turn is the assistant's, expected a user's")
    if turns[0].role == DOCUMENT:
        if tokenize != "apart" and turns[0].images:
            raise BadRecord(f"a document with images, which data.tokenize={tokenize} does not support")
        return assembled(_document(tokenizer, reply), turns, tokenizer, begins=True)
    form = tokenizer.form
    if system and turns[0].role != "system" and form.system != "none":
        turns = [Turn("system", (system,)), *turns]
    if tokenize != "apart":
        return with_first_tags(turns, tokenizer, tokenize, first_tags, reply)
    if form.captions:
        turns = [_captioned(turn) for turn in turns]
    return assembled(form.layout(turns, reply), turns, tokenizer, begins=form.begins)


def answer_ids(text: str, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """The tokens of an answer as they follow a prompt, without the token that ends it. Raises BadRecord."""
    turns = [Turn("user", ("", "")), Turn("assistant", (text,), learned=True)]
    *answer, _ = (number for run in runs(turns, tokenizer) if run.trained for number in run.ids)
    return tuple(answer)


def _document(tokenizer: ChatTokenizer, reply: bool) -> Layout:
    text, end = Piece(turn=0, answer=0), Piece(tokenizer.end_of_text, answer=0)
    return Layout((text,) if reply else (text, end), (KEEP,))


def _captioned(turn: Turn) -> Turn:
    """A user's turn without its words. Raises BadRecord if nothing is left."""
    if turn.role != "user":
        return turn
    if not turn.images:
        raise BadRecord("no image: llm.chat=plain leaves out the words of a question")
    return replace(turn, texts=("",) * len(turn.texts))
