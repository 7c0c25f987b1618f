"""Reads a Hugging Face `tokenizer.json` with the tokenizers library, and finds the tokens that a chat format needs."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from nvlm.config.fields import named
from nvlm.config.values import ConfigError, LLMConfig, problem
from nvlm.data.text.ends import end_tokens
from nvlm.data.text.formats import CHATML, FORMATS, ChatFormat

if TYPE_CHECKING:
    from nvlm.data.text.template import Template

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # Qwen and Yi, Llama 3, Llama 2 and Mistral
TINY = Path(__file__).parent / "tiny_tokenizer" / "tokenizer.json"
_CACHED = 32  # characters: texts up to this length, such as headers and tags, are tokenised once


@dataclass(frozen=True, slots=True)
class Special:
    """A special token's id, and whether it takes the white space beside it."""

    number: int
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True, eq=False)
class ChatTokenizer:
    """Text to ids and back. Text never becomes a control token: `<|im_end|>` in a user's message stays text."""

    tokenizer: Tokenizer
    end: int  # ends an answer in the run's chat format
    form: ChatFormat | Template = CHATML
    specials: Mapping[str, Special] = field(default_factory=dict)  # what the format's own text may contain
    bos: int | None = None  # starts every conversation
    others: frozenset[int] = frozenset()  # other tokens that may end an answer
    last: str | None = None  # ends a document
    inner: Tokenizer | None = None  # `tokenizer` for a text that continues one: without the space that some put first
    marks: tuple[str, str] = ("<Image>", "</Image>")  # text before and after an image
    prefixed: str = "never"  # where that space comes: never, "always" after special tokens too, "first" in a text

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text, without added special tokens."""
        return _short(self, text) if len(text) <= _CACHED else _encoded(self.tokenizer, text)

    def encode_after(self, before: str, text: str) -> tuple[int, ...]:
        """Token ids of plain text inside a conversation. `before`: what it follows: nothing, a token or text."""
        whole = before == "nothing" or (before == "token" and self.prefixed == "always")
        if whole or self.inner is None or not self.form.together:
            return self.encode(text)
        return _encoded(self.inner, text)

    def decode(self, ids) -> str:
        """Text of `ids`, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer: the format's, and those from the tokenizer's folder."""
        return self.others | {self.end}

    @property
    def end_of_text(self) -> str:
        """The token that ends a document. Raises ConfigError if the tokenizer has none of the known ones."""
        if self.last is None:
            expected = f"one with {' or '.join(END_OF_TEXT)} for documents"
            raise problem("llm.tokenizer", "one without an end-of-text token", expected, "use another tokenizer")
        return self.last

    @property
    def vocab(self) -> int:
        """Number of ids, including added tokens."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)


def _encoded(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids) if text else ()


@lru_cache(maxsize=4096)
def _short(tokenizer: ChatTokenizer, text: str) -> tuple[int, ...]:
    return _encoded(tokenizer.tokenizer, text)


def tokenizer_file(where: str | None) -> Path:
    """The file that `where` refers to: a folder with tokenizer.json, such a file, or "tiny" for this package's own."""
    path = TINY if where == "tiny" else Path(where or "")
    return path / "tokenizer.json" if path.is_dir() else path


def tokenizer_of(llm: LLMConfig, key: str = "llm.tokenizer") -> ChatTokenizer:
    """The tokenizer of a run's language model. Raises ConfigError."""
    return load_tokenizer(llm.tokenizer or "", llm.bos, key, llm.chat)


@lru_cache(maxsize=4)
def load_tokenizer(
    where: str, bos: str | None = None, key: str = "llm.tokenizer", chat: str = "chatml", marks: bool = True
) -> ChatTokenizer:
    """Read the tokenizer that `where` refers to (see `tokenizer_file`).

    Files in the same folder say which tokens end an answer (`nvlm.data.text.ends`). `bos`: the token that starts every
    conversation; `key`: the setting that `where` came from; `chat`: the chat format; `marks`: whether `<Image>`
    and `</Image>` stand around an image. Raises ConfigError.
    """
    path = tokenizer_file(where)
    if not path.is_file():
        raise problem(key, named(where), "a folder with tokenizer.json", f"{key}=DIR")
    try:
        values = json.loads(path.read_text("utf-8"))
        added = {token["content"]: token for token in values.get("added_tokens", ())}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unreadable(path, error, key) from None
    last = next((name for name in END_OF_TEXT if name in added), None)
    form, needed = _form(chat, path, added, last, key)
    control = tuple(name for name in dict.fromkeys((*needed, bos, last)) if name is not None)
    tokenizer = _built(values, control, path, key)
    if bos is not None and tokenizer.token_to_id(bos) is None:
        raise problem("llm.bos", repr(bos), f"a token of {path}", "llm.bos=null for none")
    _check(tokenizer, needed, control, f"{key}={where}", chat)
    number = tokenizer.token_to_id
    prefixed, continuing = without_prefix(values)
    return ChatTokenizer(
        tokenizer,
        number(form.end),
        form,
        {name: _special(number(name), added.get(name, {})) for name in control},
        None if bos is None else number(bos),
        end_tokens(path.parent, tokenizer, key) if path.name == "tokenizer.json" else frozenset(),
        last,
        None if prefixed == "never" else _built(continuing, control, path, key),
        ("<Image>", "</Image>") if marks else ("", ""),
        prefixed,
    )


def _form(
    chat: str, path: Path, added: Mapping[str, Any], last: str | None, key: str
) -> tuple[ChatFormat | Template, Sequence[str]]:
    """The chat format, and the special tokens that the tokenizer must have for it."""
    if chat == "template":
        from nvlm.data.text.template import read_template

        template = read_template(path.parent, added, key)
        return template, template.tokens
    form = FORMATS[chat]
    if form.end is None:
        expected = f"one with {' or '.join(END_OF_TEXT)} for llm.chat={chat}"
        if last is None:
            raise problem(key, f"{path}, without an end-of-text token", expected, "use another tokenizer")
        form = replace(form, end=last)
    return form, form.tokens


def _check(tokenizer: Tokenizer, needed: Sequence[str], control: Sequence[str], what: str, chat: str) -> None:
    """Raise ConfigError if a special token that the chat format needs is missing or cannot be told from text."""
    for name in needed:
        if tokenizer.token_to_id(name) is None:
            expected = "a ChatML tokenizer" if chat == "chatml" else f"a tokenizer for llm.chat={chat}"
            fix = "llm.tokenizer=DIR of such a model, or llm.chat=template for the format of this one"
            raise problem(what, f"no token {name}", expected, fix)
    for name in control:
        if tokenizer.token_to_id(name) in tokenizer.encode(name, add_special_tokens=False).ids:
            expected = f"a tokenizer that can treat {name} as text"
            raise problem(what, f"one that always finds {name} in a text", expected, "use another")


def _built(values: dict[str, Any], control: Sequence[str], path: Path, key: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json's `values`, which reads special tokens in a text as text."""
    try:
        tokenizer = Tokenizer.from_str(json.dumps(stateless(values, control)))
    except Exception as error:  # the library's own error type is Exception itself
        raise _unreadable(path, error, key) from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def _unreadable(path: Path, error: Exception, key: str) -> ConfigError:
    reason = f"{path}, which cannot be read: {error}"
    return problem(key, reason, "a tokenizer.json of the tokenizers library", "download it again")


def _special(number: int, token: Mapping[str, Any]) -> Special:
    return Special(number, bool(token.get("lstrip")), bool(token.get("rstrip")))


def stateless(values: dict[str, Any], control: Collection[str] = ()) -> dict[str, Any]:
    """The contents of a tokenizer.json, without state left over from earlier use.

    Truncation, padding and dropout of merges are switched off. Control tokens (`control`, and all that start with `<|`)
    are marked as special, so that the library can be configured to read them as text.
    """
    added = [
        token | {"special": bool(token.get("special") or token["content"] in control or token["content"][:2] == "<|")}
        for token in values.get("added_tokens", ())
    ]
    model = values["model"] | ({"dropout": None} if "dropout" in values["model"] else {})
    return values | {"truncation": None, "padding": None, "added_tokens": added, "model": model}


def without_prefix(values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where the tokenizer puts a space before a text (`ChatTokenizer.prefixed`), and its contents without that rule.

    Tokenizers made by SentencePiece mark the start of each word, and so the start of a text, by a space.
    """
    normalizer, normalized = _without(values.get("normalizer"), "normalizers")
    splitter, split = _without(values.get("pre_tokenizer"), "pretokenizers")
    found = {normalized, split}
    prefixed = next((where for where in ("always", "first") if where in found), "never")
    return prefixed, values | {"normalizer": normalizer, "pre_tokenizer": splitter}


def _without(step: Mapping[str, Any] | None, members: str) -> tuple[dict[str, Any] | None, str]:
    """A step of a tokenizer that adds no space, and where it did."""
    if step is None:
        return None, "never"
    kind = step["type"]
    if kind == "Sequence":
        parts = [_without(part, members) for part in step[members]]
        where = next((where for _, where in parts if where != "never"), "never")
        return dict(step) | {members: [part for part, _ in parts if part is not None]}, where
    if kind == "Prepend":
        return None, "always"
    if kind == "ByteLevel" and step.get("add_prefix_space"):
        return dict(step) | {"add_prefix_space": False}, "always"
    if kind == "Metaspace" and step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True):
        where = step.get("prepend_scheme", "always")
        return dict(step) | {"prepend_scheme": "never", "add_prefix_space": False}, where
    return dict(step), "never"
