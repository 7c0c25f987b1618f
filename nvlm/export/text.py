"""Text files of an exported folder: the tokenizer, the chat template and the end-of-answer tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nvlm.arch.registry import description
from nvlm.config.values import Config, problem
from nvlm.data.text.ends import read_json, token_texts
from nvlm.data.text.formats import FORMATS
from nvlm.data.text.tokenizer import ChatTokenizer, tokenizer_file, tokenizer_of
from nvlm.vision.encoders.registry import description_of

# Formats that modeling_nvlm.py writes: their own text and messages may be tokenised apart, with the same tokens.
EXPORTED = ("chatml", "llama3")
VISION_PAD = "<|vision_pad|>"  # the placeholder of vLLM and NVLM-D-72B's own class for tile tokens
# Qwen2.5's tokens after the last one of Qwen2; NVLM-D-72B's tokenizer has them too.
_QWEN2_SIZE = 151646
_QWEN25 = """<|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|>
<|vision_start|> <|vision_end|> <|vision_pad|>""".split()
_COPIED = "special_tokens_map.json added_tokens.json vocab.json merges.txt tokenizer.model".split()


@dataclass(frozen=True, slots=True)
class Text:
    """Files by name, each a text or a file to copy, and the ids for config.json."""

    files: Mapping[str, str | Path]
    begin: int
    end: int


def exported_text(config: Config) -> Text | None:
    """The files for the run's tokenizer; None if the run has no tokenizer. Raises ConfigError."""
    if config.llm.chat not in EXPORTED:
        expected = f"{' or '.join(EXPORTED)}: an export with layout=nvlm has no other format"
        raise problem("llm.chat", f"{config.llm.chat} in this run", expected, "layout=llava-hf")
    if not config.llm.tokenizer:
        return None
    added = missing_tokens(config, tokenizer_of(config.llm, "tokenizer"))
    return text_files(config, added, chat_template(config.data.system, config.llm.bos, config.llm.chat))


def text_files(config: Config, added: Mapping[str, int], template: str) -> Text:
    """The tokenizer's files with the tokens `added` to it and the chat `template`."""
    tokenizer = tokenizer_of(config.llm, "tokenizer")
    path = tokenizer_file(config.llm.tokenizer)
    folder = path.parent if path.name == "tokenizer.json" else None  # a file of another name has no companions
    there, generation, model = (
        read_json(folder / name, "tokenizer") or {} if folder else {}
        for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    )
    begin = _begin(tokenizer, there, (generation, model))
    ends = [tokenizer.end, *sorted(tokenizer.others - {tokenizer.end})]
    copied = {name: folder / name for name in _COPIED if (folder / name).is_file()} if folder else {}
    return Text(
        files={
            **copied,
            "tokenizer.json": _with_tokens(path, added) if added else path,
            "tokenizer_config.json": _dump(_tokenizer_config(config, there, added, template)),
            "chat_template.jinja": template,
            "generation_config.json": _dump({**generation, "bos_token_id": begin, "eos_token_id": ends}),
        },
        begin=begin,
        end=tokenizer.end,
    )


def missing_tokens(config: Config, tokenizer: ChatTokenizer) -> dict[str, int]:
    """Tokens, with ids, that an export of NVLM-D adds to its tokenizer so that other libraries can place images.

    Empty if the tokenizer has `<|vision_pad|>`, or if the vocabulary has no rows left for it. Their embedding rows are
    never read. After Qwen2's tokens, they get the same ids as in NVLM-D-72B.
    """
    if not description(config.arch.name).release_code or tokenizer.tokenizer.token_to_id(VISION_PAD) is not None:
        return {}
    first = max(tokenizer.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    names = _QWEN25 if first == _QWEN2_SIZE else [VISION_PAD]
    ids = dict(zip(names, range(first, config.llm.vocab)))
    return ids if len(ids) == len(names) else {}


def places_images(config: Config) -> bool:
    """Whether the exported tokenizer has the placeholder that other libraries use for images."""
    if not config.llm.tokenizer:
        return False
    tokenizer = tokenizer_of(config.llm)
    return tokenizer.tokenizer.token_to_id(VISION_PAD) is not None or bool(missing_tokens(config, tokenizer))


def training_note(config: Config) -> str | None:
    """One line if the run cannot be exported, or if an NVLM-D run's tokenizer lacks the placeholder that other
    libraries need; else None. Other layouts than NVLM-D-72B's have no such limits."""
    if description_of(config.vision).export is None:
        return None
    if config.llm.chat not in EXPORTED:
        return f"llm.chat={config.llm.chat}: this model cannot be exported, which needs {' or '.join(EXPORTED)}"
    tokenizer = tokenizer_of(config.llm)
    if not description(config.arch.name).release_code or tokenizer.tokenizer.token_to_id(VISION_PAD) is not None:
        return None
    lacks = f"llm.tokenizer={config.llm.tokenizer} has no {VISION_PAD}, which vLLM needs to place images"
    if added := missing_tokens(config, tokenizer):
        return f"{lacks}: an export adds it as token {added[VISION_PAD]}"
    return f"{lacks}, and llm.vocab={config.llm.vocab} no row left for it: an export's own code alone can load it"


def chat_template(system: str | None, bos: str | None, chat: str = "chatml") -> str:
    """The run's conversation format in Jinja, with its system message as the default."""
    form = FORMATS[chat]
    prefix, suffix, tail = form.frame
    default = f"{prefix}system{suffix}{system.strip() if form.strips else system}{tail}" if system else ""
    content = "message['content']" + (" | trim" if form.strips else "")
    return (
        f"{{{{- {_quoted(bos or '')} }}}}"
        f"{{%- if messages[0]['role'] != 'system' %}}{{{{- {_quoted(default)} }}}}{{%- endif %}}"
        "{%- for message in messages %}"
        "{%- if message['content'] is not string %}{{- raise_exception('expected text as content') }}{%- endif %}"
        f"{{{{- {_literal(prefix)} + message['role'] + {_literal(suffix)} + {content} + {_literal(tail)} }}}}"
        "{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{{{{- {_literal(f'{prefix}assistant{suffix}')} }}}}{{%- endif %}}"
    )


def own_format(chat: str) -> dict:
    """A chat format for modeling_nvlm.py."""
    form = FORMATS[chat]
    prefix, suffix, tail = form.frame
    return {
        "tokens": list(form.tokens),
        "prefix": prefix,
        "suffix": suffix,
        "tail": tail,
        "end": form.end,
        "strip": bool(form.strips),
    }


def _literal(text: str) -> str:
    return "'" + text.replace("\n", "\\n") + "'"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # Jinja understands JSON escapes


def _begin(tokenizer: ChatTokenizer, there: Mapping, configs: tuple[Mapping, ...]) -> int:
    """The begin-of-text token named in the model's folder; generation from embeddings requires one."""
    if tokenizer.bos is not None:
        return tokenizer.bos
    numbers = [values.get("bos_token_id") for values in configs]
    named = [tokenizer.tokenizer.token_to_id(text) for text in (*token_texts(there.get("bos_token")), "<|endoftext|>")]
    return next((number for number in (*numbers, *named) if isinstance(number, int)), tokenizer.end)


def _tokenizer_config(config: Config, there: Mapping, added: Mapping[str, int], template: str) -> dict:
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.llm.positions,
        "eos_token": FORMATS[config.llm.chat].end,
        **({"bos_token": config.llm.bos} if config.llm.bos else {}),
        **{key: value for key, value in there.items() if value is not None},
        "chat_template": template,
    }
    if added and "added_tokens_decoder" in there:
        new = {str(number): {**_FLAGS, "content": name} for name, number in added.items()}
        values["added_tokens_decoder"] = there["added_tokens_decoder"] | new
    return values


_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def _with_tokens(path: Path, added: Mapping[str, int]) -> str:
    values = json.loads(path.read_text(encoding="utf-8"))
    values["added_tokens"] += [{"id": number, "content": name, **_FLAGS} for name, number in added.items()]
    return _dump(values)


def _dump(values: Mapping) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
