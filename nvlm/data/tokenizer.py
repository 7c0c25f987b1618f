"""A Hugging Face `tokenizer.json`, read by the tokenizers library, with the ids that ChatML needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from nvlm.config import problem

TINY = Path(__file__).parent / "tiny_tokenizer" / "tokenizer.json"


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """Text to ids and back. Text never yields a special token: `<|im_end|>` in a user's words stays words."""

    tokenizer: Tokenizer
    im_start: int
    im_end: int
    bos: int | None = None  # begins every conversation

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text, no special tokens added."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids) if text else ()

    def decode(self, ids) -> str:
        """Text of `ids`, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

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

    `bos`: the token that begins every conversation; `key`: the setting that named it. Raises ConfigError.
    """
    path = tokenizer_file(where)
    if not path.is_file():
        raise problem(key, repr(where), "a folder with tokenizer.json", f"{key}=DIR")
    try:
        tokenizer = Tokenizer.from_file(str(path))
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
    return ChatTokenizer(tokenizer, marks["<|im_start|>"], marks["<|im_end|>"], first)
