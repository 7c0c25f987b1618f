"""Chat formats as values: what stands before and after each message, what ends an answer. Imports no torch.

A format lays the roles of a conversation out as pieces: its own text, in which special tokens are written by name, and
the places of the messages' contents. Messages are put in as plain text afterwards, so only a format's own text yields
special tokens. `llm.chat=template` makes the same pieces from a tokenizer's Jinja template (nvlm.data.text.template).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from nvlm.data.messages import Turn
from nvlm.data.record import BadRecord

Trim = tuple[str | None, str | None]
"""The characters stripped from the left and from the right of a content, as str.strip takes them; None: white space."""
KEEP, STRIP = ("", ""), (None, None)


@dataclass(frozen=True, slots=True)
class Piece:
    """A format's own `text`, or the content of message number `turn`. `answer`: the number of the assistant's message
    that it is a part of, with which it is learned; None if it is never learned."""

    text: str = ""
    turn: int | None = None
    answer: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """A conversation's pieces, and what each message's content loses at its ends."""

    pieces: tuple[Piece, ...]
    trims: tuple[Trim, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """What stands `before` and `after` a message of each role. An answer is learned from `lead`, which comes after the
    assistant's `before`, where generation starts, to the token `end`, which comes before its `after`."""

    tokens: tuple[str, ...]  # special tokens, which the tokenizer must have
    before: Mapping[str, str] = field(hash=False)
    after: Mapping[str, str] = field(hash=False)
    end: str | None  # None: the tokenizer's end-of-text token
    lead: str = ""
    strips: tuple[str, ...] = ()  # roles whose contents lose white space at their ends, as in the published template
    system: str = "anywhere"  # "first": only as the first message; "in_user": at the start of the first user's; "none"
    together: bool = True  # own text and contents are tokenised together, except where generation starts
    captions: bool = False  # one question, of which only the images are kept, and one answer

    @property
    def frame(self) -> tuple[str, str, str] | None:
        """What stands before a role's name, between it and the message, and after the message, if that is the same for
        all roles."""
        prefix, _, suffix = self.before["user"].partition("user")
        tail = self.after["user"]
        headers = {role: f"{prefix}{role}{suffix}" for role in self.before}
        alike = self.before == headers and not self.lead and f"{self.end}{self.after['assistant']}" == tail
        return (prefix, suffix, tail) if suffix and alike else None

    @property
    def begins(self) -> bool:
        """Whether llm.bos starts a conversation; a template writes its own begin token."""
        return True

    def layout(self, turns: Sequence[Turn], reply: bool) -> Layout:
        """The pieces of a conversation, with `reply` up to where an answer starts. Raises BadRecord."""
        return _layout(self, tuple(turn.role for turn in turns), reply)

    def of_roles(self, roles: tuple[str, ...], reply: bool) -> Layout:
        """The pieces for messages of these `roles`. Raises BadRecord."""
        self._check(roles, reply)
        pieces: list[Piece] = []
        for number, role in enumerate(roles):
            inside = self.system == "in_user" and number == 1 and roles[0] == "system"
            pieces.append(Piece("" if inside else self.before[role]))
            if role == "assistant":
                pieces += [Piece(self.lead, answer=number), Piece(turn=number, answer=number)]
                pieces += [Piece(self.end or "", answer=number), Piece(self.after[role])]
            else:
                pieces += [Piece(turn=number), Piece(self.after[role])]
        if reply:
            pieces.append(Piece(self.before["assistant"]))
        kept = tuple(piece for piece in pieces if piece.text or piece.turn is not None)
        return Layout(kept, tuple(STRIP if role in self.strips else KEEP for role in roles))

    def _check(self, roles: tuple[str, ...], reply: bool) -> None:
        if self.captions and roles != ("user",) + ("assistant",) * (not reply):
            raise BadRecord(f"messages of {', '.join(roles)}: llm.chat=plain has one question and its answer")
        if self.system != "anywhere" and "system" in roles[1:]:
            raise BadRecord("a system message that is not the first, which this chat format does not have")
        if self.system == "in_user" and roles[0] == "system" and roles[1:2] != ("user",):
            raise BadRecord("a system message without a user's after it, which this chat format does not have")


@lru_cache(maxsize=4096)
def _layout(form: ChatFormat, roles: tuple[str, ...], reply: bool) -> Layout:
    return form.of_roles(roles, reply)


def _same(before: str, after: str, answer_after: str = "") -> dict[str, dict[str, str]]:
    """`before` and `after` of a format that treats all roles alike."""
    roles = ("system", "user", "assistant")
    return {
        "before": {role: before.format(role) for role in roles},
        "after": {**dict.fromkeys(roles, after), "assistant": answer_after},
    }


# Qwen2 and, with a begin token, NVLM's Yi. NVLM tokenises a role and its message apart (appendix E).
CHATML = ChatFormat(
    tokens=("<|im_start|>", "<|im_end|>"),
    **_same("<|im_start|>{}\n", "<|im_end|>\n", "\n"),
    end="<|im_end|>",
    together=False,
)
# meta-llama/Meta-Llama-3-8B-Instruct; llm.bos is <|begin_of_text|>.
LLAMA3 = ChatFormat(
    tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    **_same("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
    end="<|eot_id|>",
    strips=("system", "user", "assistant"),
)
# Vicuna v1.1 and v1.5 (FastChat's conv_vicuna_v1.1); llm.bos is <s>.
VICUNA = ChatFormat(
    tokens=("</s>",),
    before={"system": "", "user": "USER: ", "assistant": "ASSISTANT:"},
    after={"system": " ", "user": " ", "assistant": ""},
    end="</s>",
    lead=" ",
    system="first",
)
# mistralai/Mistral-7B-Instruct-v0.3, whose [INST] is a token; llm.bos is <s>.
MISTRAL = ChatFormat(
    tokens=("[INST]", "[/INST]", "</s>"),
    before={"system": "[INST] ", "user": "[INST] ", "assistant": ""},
    after={"system": "\n\n", "user": "[/INST]", "assistant": ""},
    end="</s>",
    lead=" ",
    strips=("assistant",),
    system="in_user",
)
# mistralai/Mistral-7B-Instruct-v0.1 and v0.2, in whose tokenizer [INST] is plain text; llm.bos is <s>. LLaVA-NeXT's
# Mistral has the same, with one more space before the end token.
MISTRAL_V1 = replace(
    MISTRAL, tokens=("</s>",), after={"system": "\n\n", "user": " [/INST]", "assistant": ""}, strips=()
)
# LLaVA's pre-training: the images, then the caption. LLaVA ends it by a line feed; here the end-of-text token does.
PLAIN = ChatFormat(
    tokens=(),
    **_same("", ""),
    end=None,
    system="none",
    captions=True,
)
FORMATS = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "vicuna": VICUNA,
    "mistral": MISTRAL,
    "mistral_v1": MISTRAL_V1,
    "plain": PLAIN,
}
