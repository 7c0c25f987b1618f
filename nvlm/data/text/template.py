"""A tokenizer folder's own `chat_template` as a chat format.

The template is rendered with a unique mark in place of each message, which shows its own text and where each message
goes. It is then rendered with the true messages, and the two must agree, except for white space that it strips from a
message. An answer is learned from where the generation prompt ends to the first special token after its text. Anything
else is refused: a run never learns from tokens whose part in the conversation is unknown.

The template cannot reach beyond its own text: it runs in Jinja's sandbox. Limits on its length, on loops over numbers
and on its output end one that is wrong, but not one that is written to take time or memory. It has no clock, so that
prompts are the same on any day.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nvlm.config.values import problem
from nvlm.data.messages import Turn
from nvlm.data.record import BadRecord, printable
from nvlm.data.text.ends import read_json, token_texts
from nvlm.data.text.formats import KEEP, STRIP, Layout, Piece, Trim

_LONGEST = 1 << 20  # characters of a template
_MOST_OUTPUT = 1 << 26  # characters of a conversation
_MOST_STEPS = 10_000  # of the loops over numbers of one conversation
_MOST_MESSAGES = 256  # each answer takes a rendering of its prompt
_PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"  # an image in a message that is rendered
_MARK = re.compile("\ue000(\\d+)\ue001")  # a message in the rendering that shows the template's own text
_TRIMS = (KEEP, STRIP, *product(("", "\n", None), repeat=2))
_SHORTEST = ("user", "assistant")  # the roles of the conversation that every template must have
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclass(frozen=True, eq=False)
class Template:
    """A chat template. `tokens`: the special tokens that its own text may contain; `values`: the texts of tokens, by
    the names that templates use."""

    source: str
    compiled: jinja2.Template
    values: Mapping[str, str]
    tokens: tuple[str, ...]

    system = "anywhere"
    together = True
    captions = False
    begins = False

    def layout(self, turns: Sequence[Turn], reply: bool) -> Layout:
        """The conversation's pieces, with `reply` up to where an answer starts. Raises BadRecord."""
        roles = tuple(turn.role for turn in turns)
        pieces = _pieces(self, roles, reply)
        contents = [_PLACE.join(turn.texts) for turn in turns]
        return Layout(pieces, _trims(pieces, contents, self.rendered(roles, contents, reply)))

    def rendered(self, roles: Sequence[str], contents: Sequence[str], reply: bool) -> str:
        """The text of a conversation. Raises BadRecord for whatever the template raises."""
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": reply}
        given |= {"range": _limited_range()}
        text, size = [], 0
        try:
            for part in self.compiled.generate(**given, **self.values):
                text.append(part)
                size += len(part)
                if size > _MOST_OUTPUT:
                    raise ValueError(f"more than {_MOST_OUTPUT} characters")
        except MemoryError:
            raise
        except Exception as error:  # a template may raise anything
            raise BadRecord(printable(f"the chat template refuses it: {error}")) from error
        return "".join(text)

    @cached_property
    def names(self) -> re.Pattern[str]:
        """Finds one of the tokens, the longest if several begin at the same place."""
        return re.compile("|".join(map(re.escape, sorted(self.tokens, key=len, reverse=True))) or "(?!)")

    @property
    def end(self) -> str:
        """The token that ends an answer. Raises BadRecord."""
        (last,) = _last_pieces(_pieces(self, _SHORTEST, False))
        return self.names.search(last.text)[0]

    @property
    def lead(self) -> str:
        """The text between the generation prompt and an answer's own text. Raises BadRecord."""
        pieces = _pieces(self, _SHORTEST, False)
        at = next(number for number, piece in enumerate(pieces) if piece.turn == 1)
        return pieces[at - 1].text if at and pieces[at - 1].answer else ""


def read_template(folder: Path, added: Mapping[str, Mapping[str, Any]], key: str) -> Template:
    """The template in `folder`: chat_template.jinja, or `chat_template` in tokenizer_config.json.

    `added`: the tokenizer's added tokens, by their texts. Raises ConfigError, also if its answers cannot be found.
    """
    files = ("tokenizer_config.json", "special_tokens_map.json")
    config, special = (read_json(folder / name, key) or {} for name in files)
    fix = "llm.chat=chatml or another format of this trainer"
    try:
        source = template_text(folder, config)
    except UnicodeDecodeError:
        source = None
    if source is None or len(source) > _LONGEST:
        got = f"{'no chat_template' if source is None else f'one of {len(source)} characters'} in {folder}"
        raise problem("llm.chat=template", got, f"a chat_template of at most {_LONGEST} characters", fix)
    values = {name: text for name in _NAMED for text in token_texts(config.get(name) or special.get(name))}
    try:
        tokens = tuple(name for name in added if _is_control(added[name], (source, *values.values())))
        template = Template(source, _environment().from_string(source), values, tokens)
        _pieces(template, ("user",), True)
        _pieces(template, _SHORTEST, False)
    except Exception as error:  # a template may raise anything
        got = printable(f"{folder}: {error}")
        raise problem("llm.chat=template", got, "a template whose answers can be found exactly", fix) from None
    return template


def _is_control(token: Mapping[str, Any], written: Sequence[str]) -> bool:
    """Whether an added token is special, or one that the template writes."""
    name = token["content"]
    return bool(name.strip()) and (token.get("special") or name[:2] == "<|" or any(name in text for text in written))


def template_text(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template's source, as transformers finds it; None without one. `config`: tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    given = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(given, list):
        by_name = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        given = by_name.get("default")
    return given if isinstance(given, str) else None


@lru_cache(maxsize=4096)
def _pieces(template: Template, roles: tuple[str, ...], reply: bool) -> tuple[Piece, ...]:
    """The template's text around messages of these roles, without the messages. Raises BadRecord."""
    if len(roles) > _MOST_MESSAGES:
        raise BadRecord(f"{len(roles)} messages, more than the {_MOST_MESSAGES} that llm.chat=template allows")
    marks = [f"\ue000{number}\ue001" for number in range(len(roles))]
    whole = template.rendered(roles, marks, reply)
    own = _MARK.split(whole)  # text, number of a message, text, ...
    if sorted(own[1::2], key=int) != [str(number) for number in range(len(roles))]:
        raise BadRecord(f"the chat template does not give each message of {', '.join(roles)} exactly once")
    pieces = [Piece(own[0])]
    for number, after in zip(map(int, own[1::2]), own[2::2]):
        if roles[number] != "assistant":
            pieces += [Piece(turn=number), Piece(after)]
            continue
        lead = _lead(template, roles[:number], marks[:number], whole[: whole.index(marks[number])])
        end = _end(template, after)
        pieces[-1] = Piece(pieces[-1].text.removesuffix(lead))
        pieces += [Piece(lead, answer=number), Piece(turn=number, answer=number)]
        pieces += [Piece(after[:end], answer=number), Piece(after[end:])]
    ends = {template.names.search(piece.text)[0] for piece in _last_pieces(pieces)}
    if ends and roles != _SHORTEST:
        ends.add(template.end)
    if len(ends) > 1:
        raise BadRecord(f"the chat template ends answers with {' and '.join(sorted(ends))}: expected always the same")
    return tuple(piece for piece in pieces if piece.text or piece.turn is not None)


def _last_pieces(pieces: Sequence[Piece]) -> list[Piece]:
    """The text at the end of each answer."""
    return [after for one, after in zip(pieces, pieces[1:]) if one.turn is not None and one.answer is not None]


def _lead(template: Template, roles: Sequence[str], marks: Sequence[str], before: str) -> str:
    """What stands between the generation prompt and an answer; `before`: the conversation up to the answer."""
    prompt = template.rendered(roles, marks, reply=True)
    lead = before.removeprefix(prompt)
    if not before.startswith(prompt) or lead.strip():
        got = f"{before[-40:]!r} before an answer, {prompt[-40:]!r} before generation"
        raise BadRecord(f"the chat template has {got}: expected the same")
    return lead


def _end(template: Template, after: str) -> int:
    """The length of what ends an answer: white space, if any, and a special token."""
    found = template.names.search(after)
    if found is None or after[: found.start()].strip():
        raise BadRecord(f"the chat template has {after[:40]!r} after an answer: expected a special token that ends it")
    return found.end()


def _trims(pieces: Sequence[Piece], contents: Sequence[str], said: str) -> tuple[Trim, ...]:
    """What each content loses at its ends in `said`, the true rendering. Raises BadRecord if it changes otherwise."""
    trims, at = [KEEP] * len(contents), 0
    for number, piece in enumerate(pieces):
        if piece.turn is None:
            follows = said.startswith(piece.text, at)
            at += len(piece.text)
        else:
            following = _own_text(pieces[number + 1 :])
            fits = (trim for trim in _TRIMS if said.startswith(stripped(contents[piece.turn], trim) + following, at))
            trims[piece.turn] = next(fits, None)
            follows = trims[piece.turn] is not None
            at += len(stripped(contents[piece.turn], trims[piece.turn])) if follows else 0
        if not follows:
            raise BadRecord("the chat template changes the text of a message, so that answers cannot be found in it")
    if at != len(said):
        raise BadRecord("the chat template adds text to this conversation only, so that answers cannot be found in it")
    return tuple(trims)


def _own_text(pieces: Sequence[Piece]) -> str:
    """The template's text before the next message."""
    texts = []
    for piece in pieces:
        if piece.turn is not None:
            break
        texts.append(piece.text)
    return "".join(texts)


def stripped(text: str, trim: Trim) -> str:
    """`text` without the characters that `trim` names at its ends."""
    return text.lstrip(trim[0]).rstrip(trim[1])


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a repetition cannot exhaust the memory."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context, operator, left, right):
        """Refuse powers, and long repetitions of texts and lists."""
        repeats = any(hasattr(one, "__len__") for one in (left, right))
        sizes = [len(one) if hasattr(one, "__len__") else one for one in (left, right)]
        if operator == "**" or (repeats and sizes[0] * sizes[1] > _LONGEST):
            raise jinja2.TemplateRuntimeError(f"{operator} with a result that may be too large")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """The block {% generation %}, with which some templates mark answers: its content stays as it is."""

    tags = frozenset(("generation",))

    def parse(self, parser) -> list[nodes.Node]:
        """The statements inside the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """The environment in which transformers renders templates, with limits and without its clock."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _limited_range() -> Callable[..., range]:
    """Python's range, of which one rendering may take so many steps in all."""
    left = _MOST_STEPS

    def steps(*bounds: int) -> range:
        nonlocal left
        numbers = range(*bounds)
        left -= len(numbers)
        if left < 0:
            raise OverflowError(f"loops over numbers of more than {_MOST_STEPS} steps")
        return numbers

    return steps


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
