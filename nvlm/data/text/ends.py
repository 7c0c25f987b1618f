"""Finds the tokens with which a published model ends an answer, besides the template's end of turn."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from nvlm.config.values import problem


def end_tokens(folder: Path, tokenizer: Tokenizer, key: str) -> frozenset[int]:
    """The ids from `eos_token_id` (a number or a list) in generation_config.json or, without that file, config.json,
    and from `eos_token` in tokenizer_config.json and special_tokens_map.json.

    `key`: the setting that the folder came from. Raises ConfigError for a damaged file.
    """
    files = ("generation_config.json", "config.json", "tokenizer_config.json", "special_tokens_map.json")
    generation, model, *texts = (read_json(folder / name, key) for name in files)
    numbers = (generation or model or {}).get("eos_token_id")
    named = (tokenizer.token_to_id(text) for values in texts for text in token_texts((values or {}).get("eos_token")))
    listed = numbers if isinstance(numbers, list) else [numbers]
    return frozenset(number for number in (*listed, *named) if isinstance(number, int))


def read_json(file: Path, key: str) -> dict | None:
    """The object in `file`, or None without such a file. Raises ConfigError."""
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        values = None
    if not isinstance(values, dict):
        raise problem(f"{key}: {file}", "a damaged file", "a JSON object", "download it again")
    return values


def token_texts(token: object) -> Iterable[str]:
    """The text of a token, which such files give as a string or as an object that contains it."""
    text = token.get("content") if isinstance(token, dict) else token
    return [text] if isinstance(text, str) else []
