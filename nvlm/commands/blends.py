"""The sources of a blend as users write them: by name, as a list with names, or in a YAML file."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from nvlm.config.fields import named
from nvlm.config.values import ConfigError, problem

_KEY = "data.sources"


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
            raise problem(f"{_KEY}[{place}]", "no name", "a name for each source", f"{_KEY}=[{{name: a, ...}}]")
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
    reason = str(error).strip().splitlines()[0]
    return problem(_KEY, f"{path}, which cannot be read: {reason}", "a YAML file of sources by name", "repair it")
