"""Reads a Hugging Face `tokenizer.json` with the tokenizers library, and finds the ids that ChatML needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nvlm.config.fields import named
from nvlm.config.values import problem
from nvlm.data.ends import end_tokens

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # Qwen and Yi, Llama 3, Llama 2 and Mistral
TINY = Path(__file__).parent / "tiny_tokenizer" / "tokenizer.json"


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """Text to ids and back. Text never becomes a control token: `<|im_end|>` in a user's message stays text."""

    tokenizer: Tokenizer
    im_start: int
    im_end: int
    bos: int | None = None  # starts every conversation
    others: frozenset[int] = frozenset()  # other tokens that may end an answer
    last: int | None = None  # ends a document

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text, without added special tokens."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids) if text else ()

    def decode(self, ids) -> str:
        """Text of `ids`, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer: the template's end of turn, and those from the tokenizer's folder."""
        return self.others | {self.im_end}

    @property
    def end_of_text(self) -> int:
        """The token that ends a document. Raises ConfigError if the tokenizer has none of the known ones."""
        if self.last is None:
            expected = f"one with {' or '.join(END_OF_TEXT)} for documents"
            raise problem("llm.tokenizer", "one without an end-of-text token", expected, "use another tokenizer")
        return self.last

    @property
    def vocab(self) -> int:
        """Number of ids, including added tokens."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)


def tokenizer_file(where: str | None) -> Path:
    """The file that `where` refers to: a folder with tokenizer.json, such a file, or "tiny" for this package's own."""
    path = TINY if where == "tiny" else Path(where or "")
    return path / "tokenizer.json" if path.is_dir() else path


@lru_cache(maxsize=4)
def load_tokenizer(where: str, bos: str | None = None, key: str = "llm.tokenizer") -> ChatTokenizer:
    """Read the tokenizer that `where` refers to (see `tokenizer_file`).

    Files in the same folder say which tokens end an answer (`nvlm.data.ends`). `bos`: the token that starts every
    conversation; `key`: the setting that `where` came from. Raises ConfigError.
    """
    path = tokenizer_file(where)
    if not path.is_file():
        raise problem(key, named(where), "a folder with tokenizer.json", f"{key}=DIR")
    try:
        tokenizer = Tokenizer.from_str(json.dumps(stateless(json.loads(path.read_text("utf-8")), bos)))
    except Exception as error:  # the library's own error type is Exception itself
        reason = f"{path}, which cannot be read: {error}"
        raise problem(key, reason, "a tokenizer.json of the tokenizers library", "download it again") from None
    marks = {name: tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>")}
    for name, number in marks.items():
        if number is None:
            raise problem(f"{key}={where}", f"no token {name}", "a ChatML tokenizer", "use a chat model's")
    first = None if bos is None else tokenizer.token_to_id(bos)
    if bos is not None and first is None:
        raise problem("llm.bos", repr(bos), f"a token of {path}", "llm.bos=null for none")
    tokenizer.encode_special_tokens = True
    for name in (*marks, *([] if bos is None else [bos])):
        if tokenizer.token_to_id(name) in tokenizer.encode(name, add_special_tokens=False).ids:
            expected = f"a tokenizer that can treat {name} as text"
            raise problem(f"{key}={where}", f"one that always finds {name} in a text", expected, "use another")
    others = end_tokens(path.parent, tokenizer, key) if path.name == "tokenizer.json" else frozenset()
    last = next((number for number in map(tokenizer.token_to_id, END_OF_TEXT) if number is not None), None)
    return ChatTokenizer(tokenizer, marks["<|im_start|>"], marks["<|im_end|>"], first, others, last)


def stateless(values: dict[str, Any], bos: str | None = None) -> dict[str, Any]:
    """The contents of a tokenizer.json, without state left over from earlier use.

    Truncation, padding and dropout of merges are switched off. Control tokens (`bos`, and all that start with `<|`) are
    marked as special, so that the library can be configured to read them as text.
    """
    added = [
        token | {"special": token.get("special") or token["content"] == bos or token["content"].startswith("<|")}
        for token in values.get("added_tokens", ())
    ]
    model = values["model"] | ({"dropout": None} if "dropout" in values["model"] else {})
    return values | {"truncation": None, "padding": None, "added_tokens": added, "model": model}
