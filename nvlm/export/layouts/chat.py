"""The tokenizer of an export in LLaVA's and VILA's layouts: `<image>` and `<video>` as tokens, and any chat format."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tokenizers import Tokenizer

from nvlm.config.values import Config, problem
from nvlm.data.text.formats import FORMATS, ChatFormat
from nvlm.data.text.tokenizer import tokenizer_file, tokenizer_of
from nvlm.export.text import Text, text_files

IMAGE, VIDEO = "<image>", "<video>"
_WRITTEN = ("chatml", "llama3", "vicuna", "mistral")
_WORDS = (
    "{%- macro words(content) %}{%- if content is string %}{{- content }}{%- else %}{%- for part in content %}"
    "{%- if part['type'] == 'text' %}{{- part['text'] }}{%- else %}{{- '<' + part['type'] + '>\\n' }}{%- endif %}"
    "{%- endfor %}{%- endif %}{%- endmacro %}"
)


def picture_tokens(config: Config) -> dict[str, int]:
    """The ids of `<image>` and `<video>`: the tokenizer's, else those after its last one. Raises ConfigError without a
    tokenizer."""
    if not config.llm.tokenizer:
        raise problem("llm.tokenizer", "none in this run", "a tokenizer, which has the image's token", "tokenizer=DIR")
    tokenizer = tokenizer_of(config.llm, "tokenizer").tokenizer
    known = {name: tokenizer.token_to_id(name) for name in (IMAGE, VIDEO)}
    free = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    new = [name for name, number in known.items() if number is None]
    return {**known, **{name: free + place for place, name in enumerate(new)}}


def chat_text(config: Config) -> Text:
    """The tokenizer's files. Raises ConfigError if the run has no tokenizer, or a chat format that no file can hold."""
    if config.llm.chat not in _WRITTEN:
        expected = f"one of {', '.join(_WRITTEN)}: no other is written"
        raise problem("llm.chat", f"{config.llm.chat} in this run", expected, "answer with launch/generate.py")
    tokenizer = tokenizer_of(config.llm, "tokenizer").tokenizer
    added = {name: number for name, number in picture_tokens(config).items() if tokenizer.token_to_id(name) is None}
    begin = None if _begins(config) else config.llm.bos
    return text_files(config, added, multimodal_template(FORMATS[config.llm.chat], begin, config.data.system))


def _begins(config: Config) -> bool:
    """Whether the tokenizer itself puts the begin token before a text."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file(config.llm.tokenizer)))
    first = tokenizer.encode("", add_special_tokens=True).ids[:1]
    return config.llm.bos is not None and first == [tokenizer.token_to_id(config.llm.bos)]


def multimodal_template(form: ChatFormat, bos: str | None, system: str | None) -> str:
    """A chat format in Jinja: contents are texts, or lists of parts of type text, image and video.

    `system`: the default system message.
    """
    inside = "loop.index0 == 1 and messages[0]['role'] == 'system'" if form.system == "in_user" else "false"
    strips = f"message['role'] in {json.dumps(form.strips)}"
    trimmed = f"{{{{- (words(message['content']) | trim) if {strips} else words(message['content']) }}}}"
    default = "".join((
        "{%- if messages[0]['role'] != 'system' %}",
        f"{{%- set messages = [{_object({'role': 'system', 'content': system})}] + messages %}}{{%- endif %}}",
    ))  # fmt: skip
    return "".join((
        _WORDS,
        f"{{%- set before = {_object(form.before)} %}}{{%- set after = {_object(form.after)} %}}",
        default if system else "",
        f"{{{{- {_quoted(bos)} }}}}" if bos else "",
        "{%- for message in messages %}",
        f"{{%- if not ({inside}) %}}{{{{- before[message['role']] }}}}{{%- endif %}}",
        "{%- if message['role'] == 'assistant' %}",
        f"{{{{- {_quoted(form.lead)} }}}}{trimmed}{{{{- {_quoted(form.end or '')} }}}}",
        f"{{%- else %}}{trimmed}{{%- endif %}}{{{{- after[message['role']] }}}}",
        "{%- endfor %}",
        "{%- if add_generation_prompt %}{{- before['assistant'] }}{%- endif %}",
    ))  # fmt: skip


def _object(values: Mapping) -> str:
    return json.dumps(dict(values), ensure_ascii=False)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
