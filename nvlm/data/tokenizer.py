"""A Hugging Face `tokenizer.json`, read by the tokenizers library, with the ids that ChatML needs."""

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

TINY = Path(__file__).parent / "tiny_tokenizer" / "tokenizer.json"


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """Text to ids and back. Text never yields a control token: `<|im_end|>` in a user's words stays words."""

    tokenizer: Tokenizer
    im_start: int
    im_end: int
    bos: int | None = None  # begins every conversation
    others: frozenset[int] = frozenset()  # with which the model may end an answer, too

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text, no special tokens added."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids) if text else ()

    def decode(self, ids) -> str:
        """Text of `ids`, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    @property
    def ends(self) -> frozenset[int]:
        """Each of these ends an answer: the template's end of turn, and those that came with the tokenizer."""
        return self.others | {self.im_end}

    @property
    def vocab(self) -> int:
        """Number of ids, added tokens included."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)


def tokenizer_file(where: str | None) -> Path:
    """The file that `where` means: a folder with tokenizer.json, such a file, or "tiny" for the one in this package."""
    path = TINY if where == "tiny" else Path(where or "")
    return path / "tokenizer.json" if path.is_dir() else path


@lru_cache(maxsize=4)
def load_tokenizer(where: str, bos: str | None = None, key: str = "llm.tokenizer") -> ChatTokenizer:
    """Read the tokenizer that `where` means (see `tokenizer_file`).

    The files that stand beside a tokenizer.json say which tokens end an answer (`nvlm.data.ends`).
    `bos`: the token that begins every conversation; `key`: the setting that named it. Raises ConfigError.
    """
    path = tokenizer_file(where)
    if not path.is_file():
        raise problem(key, named(where), "a folder with tokenizer.json", f"{key}=DIR")
    try:
        tokenizer = Tokenizer.from_str(json.dumps(stateless(json.loads(path.read_text("utf-8")), bos)))
    except Exception as error:  # the library's own error type is Exception itself
        reason = f"{path}, which does not read: {error}"
        raise problem(key, reason, "a tokenizer.json of the tokenizers library", "fetch it anew") from None
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
            expected = f"a tokenizer for which {name} in a text is text"
            raise problem(f"{key}={where}", f"one whose vocabulary finds {name} in a text", expected, "use another")
    others = end_tokens(path.parent, tokenizer, key) if path.name == "tokenizer.json" else frozenset()
    return ChatTokenizer(tokenizer, marks["<|im_start|>"], marks["<|im_end|>"], first, others)


def stateless(values: dict[str, Any], bos: str | None = None) -> dict[str, Any]:
    """What a tokenizer.json holds, without the state that its last user left in it.

    Truncation, padding and dropout of merges are switched off. Control tokens (`bos`, and all that begin with `<|`) are
    marked as special, so that the library can be told to read them as text.
    """
    added = [
        token | {"special": token.get("special") or token["content"] == bos or token["content"].startswith("<|")}
        for token in values.get("added_tokens", ())
    ]
    model = values["model"] | ({"dropout": None} if "dropout" in values["model"] else {})
    return values | {"truncation": None, "padding": None, "added_tokens": added, "model": model}
