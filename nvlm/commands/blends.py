"""The sources of a blend as users write them: by name, as a list with names, or in a YAML file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from omegaconf import OmegaConf
from yaml import MarkedYAMLError

from nvlm.commands.words import parse, plain_words, quoted
from nvlm.config.fields import named
from nvlm.config.values import ConfigError, problem

_KEY = "data.sources"
_ONE = re.compile(r"(\+{0,2})data\.sources\.([^.=]+)[^=]*=")


def with_sources(words: Sequence[str], templates: Iterable[Path]) -> list[str]:
    """`words`, in which data.sources.NAME.KEY=VALUE may set any key of a source, also of one in data.sources=FILE.

    Hydra only sets keys that the configuration has, so the file's sources are written out and the keys are added.
    `templates`: YAML files whose sources are known. Raises ConfigError.
    """
    if not any(map(_ONE.match, words)):
        return list(words)
    words = plain_words(words)
    whole = [part for word in words if word.startswith(f"{_KEY}=") for part in _written_out(word)]
    given = _names(parse(word).value() for word in whole)
    known = {*given, *_names(map(_template, templates))}
    flags = [word for word in words if word.startswith("-")]  # Hydra wants them before or after all other words
    others = [word for word in words if word not in flags and not word.startswith(f"{_KEY}=")]
    return [*flags, *whole, *(_added(word, known, given) for word in others)]


def _names(mappings: Iterable[object]) -> list[str]:
    return [str(name) for mapping in mappings if isinstance(mapping, dict) for name in mapping]


def _written_out(word: str) -> list[str]:
    """The words that set the sources of data.sources=FILE; others unchanged. Null first: Hydra merges mappings."""
    value = parse(word).value()
    if not isinstance(value, str | list):
        return [word]
    sources = sources_by_name(value)
    return [f"{_KEY}=null", f"{_KEY}={_hydra(sources)}"] if isinstance(sources, dict) else [word]


def _hydra(value: object) -> str:
    """A plain value in the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_hydra(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    if isinstance(value, float):
        return repr(value)
    return quoted(value) if isinstance(value, str) else json.dumps(value, default=str)


def _template(file: Path) -> object:
    return OmegaConf.to_container(OmegaConf.load(file), resolve=False).get("sources")


def _added(word: str, known: set[str], given: list[str]) -> str:
    """`word` with ++, which sets or adds a key, if it names a known source. `given`: the names in data.sources=..."""
    match = _ONE.match(word)
    if not match or match[1]:  # the user adds it
        return word
    if given and match[2] not in known:
        near = (get_close_matches(match[2], given, n=1) or given)[0]
        fix = f"{word[: match.start(2)]}{near}{word[match.end(2) :]}, or + in front of it, which adds a source"
        raise problem(f"{_KEY}.{match[2]}", "no source of this name", f"one of {', '.join(given)}", fix)
    return f"++{word}" if match[2] in known else word


def sources_by_name(given: object) -> object:
    """`given` as a mapping by name, without sources and keys that are null; unchanged if it has none of these forms.

    Raises ConfigError.
    """
    if isinstance(given, str):
        given = _read(given)
    found = _named(given) if isinstance(given, list) else given
    if not isinstance(found, dict):
        return found
    return {name: _filled(source) for name, source in found.items() if source is not None}


def _filled(source: object) -> object:
    return {key: value for key, value in source.items() if value is not None} if isinstance(source, dict) else source


def _named(given: list) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for place, source in enumerate(given):
        name = source.get("name") if isinstance(source, dict) else None
        if not isinstance(name, str):
            got = "no name" if isinstance(source, dict) else repr(source)
            fix = f"{_KEY}='[{{name: a, source: jsonl, path: FILE, weight: 1}}]'"
            raise problem(f"{_KEY}[{place}]", got, "a source with a name", fix)
        if name in found:
            raise problem(_KEY, f"two sources of the name {name}", "different names", "another name for one of them")
        found[name] = {key: value for key, value in source.items() if key != "name"}
    return found


def _read(path: str) -> object:
    file = Path(path).expanduser()
    if not file.is_file():
        raise problem(_KEY, named(path), "a YAML file of sources by name", f"{_KEY}=FILE.yaml")
    try:
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except Exception as error:  # YAML and OmegaConf raise many types; the file is the user's
        raise _unreadable(path, error) from None
    return values.get("sources", values) if isinstance(values, dict) else values


def _unreadable(path: str, error: Exception) -> ConfigError:
    reason, fix = str(error).strip().splitlines()[0], "repair it"
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        reason, fix = error.problem or reason, f"repair its line {error.problem_mark.line + 1}"
    return problem(_KEY, f"{path}, which cannot be read: {reason}", "a YAML file of sources by name", fix)
