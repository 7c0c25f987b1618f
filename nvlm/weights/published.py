"""A published model's folder: its tensors, from their headers alone, and its config.json.

Nothing in a folder is run or unpickled. Faults raise a ConfigError that names the file or the tensor. Imports no torch,
so that mistakes are reported before any worker starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nvlm.config.fields import named
from nvlm.config.values import problem
from nvlm.weights.parts import Part, shapes

INDEX = "model.safetensors.index.json"
VISION, LANGUAGE = "vision_model.", "language_model."  # prefixes of the two towers in NVLM-D-72B's format
RELEASE_CODE = ("configuration_nvlm_d.NVLM_D_Config", "modeling_nvlm_d.NVLM_D_Model")
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor on disk."""

    file: Path
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    place: int  # its position among the tensors of the file

    @property
    def bytes(self) -> int:
        """Its size in bytes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * _BYTES.get(self.dtype, 1)


@dataclass(frozen=True, slots=True)
class Source:
    """A published folder, and the parts of the model that it holds."""

    key: str  # the setting that names it
    folder: str
    parts: Mapping[str, Sequence[Part]]  # by module group
    stored: Mapping[str, Stored]
    vision: str = ""  # prefix of the encoder's tensors


def read_headers(folder: str, key: str) -> dict[str, Stored]:
    """All tensors in `folder`, which may also be a single file. `key`: the setting it came from. Raises ConfigError."""
    path = Path(folder)
    files = _files(path, key)
    held = {name: stored for file in files for name, stored in _header(file, key).items()}
    index = path / INDEX
    if path.is_dir() and index.is_file():
        named = _weight_map(index, key)
        unheld = sorted(name for name, file in named.items() if name not in held or held[name].file.name != file)
        if unheld:
            what = f"{_some(unheld)} listed in {named[unheld[0]]}, which does not contain it"
            raise problem(f"{key}: {index}", what, "files with the tensors it lists", "download the folder again")
        if unnamed := sorted(held.keys() - named.keys()):
            raise problem(f"{key}: {index}", f"no {_some(unnamed)}", "every tensor in its files", "download it again")
    return held


def _files(path: Path, key: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise problem(key, named(path), "a folder with .safetensors files", f"{key}=DIR")
    if (path / INDEX).is_file():
        files = [path / name for name in sorted(set(_weight_map(path / INDEX, key).values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            fix = "download the whole folder again"
            raise problem(f"{key}: {path}", f"no {_some(missing)}", "every file that its index lists", fix)
        return files
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3])
        raise problem(f"{key}: {path}", f"{names} without {INDEX}", "an index, or one file", "download it again")
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    got = f"{pickles[0]}, a pickle, which could run any code" if pickles else "no .safetensors file"
    raise problem(f"{key}: {path}", got, "safetensors", "take the model's safetensors files")


def _weight_map(index: Path, key: str) -> dict[str, str]:
    try:
        named = json.loads(index.read_text())["weight_map"]
        # A name must be a file in this folder itself.
        if all(isinstance(file, str) and Path(file).name == file for file in named.values()):
            return named
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise problem(f"{key}: {index}", "a damaged index", "weight_map: tensor names to files", "download it again")


def _header(file: Path, key: str) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="numpy") as opened:  # checks the file's length too
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            return {
                name: Stored(file, piece.get_dtype(), tuple(piece.get_shape()), place)
                for place, (name, piece) in enumerate(slices.items())
            }
    except OSError as error:
        fix = "make it readable, or download it again"
        raise problem(f"{key}: {file}", error.strerror or str(error), "a file that can be read", fix) from None
    except SafetensorError as error:
        with open(file, "rb") as opened:
            start = opened.read(2)
        pickled = start in (b"PK", b"\x80\x02", b"\x80\x04") or file.suffix in _PICKLES
        got = "a pickle, which could run any code" if pickled else f"a damaged file ({error})"
        raise problem(f"{key}: {file}", got, "an intact safetensors file", "download it again") from None


def check_tensors(parts: Iterable[Part], stored: Mapping[str, Stored], key: str, spare: Iterable[str] = ()) -> None:
    """Raise ConfigError unless `stored` has exactly the tensors of `parts`; those of `spare` may be there too."""
    expected = shapes(parts)
    wrong = [f"no {name}" for name in expected if name not in stored]
    wrong += [f"{name}, which the model does not have" for name in sorted(stored.keys() - expected - set(spare))]
    for name in filter(stored.__contains__, expected):
        if stored[name].shape != expected[name]:
            wrong.append(f"{name} of shape {stored[name].shape} instead of {expected[name]}")
        elif stored[name].dtype not in _BYTES:
            wrong.append(f"{name} of dtype {stored[name].dtype} instead of {', '.join(_BYTES)}")
    if wrong:
        fix = f"choose llm=, vision= and arch= to match, or another {key}"
        raise problem(key, _some(wrong, "; "), "the model's tensors, no more and no fewer", fix)


def read_config(folder: str, key: str, code: Iterable[str] = ()) -> dict | None:
    """The folder's config.json, or None without one. `code`: remote code that may be named there; it is never run.

    Raises ConfigError if the file asks for other code.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        asked = values.get("auto_map") or {}
    except (ValueError, AttributeError):
        raise problem(f"{key}: {path}", "a damaged file", "a JSON object", "download it again") from None
    foreign = sorted(str(name) for name in asked.values() if name not in code) if isinstance(asked, dict) else [asked]
    if foreign:
        fix = "use a version of the model without remote code"
        raise problem(f"{key}: {path}", f"auto_map asks for remote code: {foreign[0]}", "no code to run", fix)
    return values


def check_values(
    got: Mapping[str, object], expected: Mapping[str, tuple[str, object]], key: str, given: Mapping[str, object]
) -> None:
    """Compare the values `got` of a config.json with ours. Raises ConfigError.

    `expected`: name in the file -> (our setting, our value). `given`: the file's literal entries, for messages.
    """
    for name, (setting, value) in expected.items():
        if got[name] != value:
            said = given.get(name)
            what = f"nothing, which means {got[name]}" if said is None else said
            raise problem(f"{key}: config.json: {name}", what, f"{setting}={value}", f"{setting}={got[name]}")


def check_fixed(got: Mapping[str, object], fixed: Mapping[str, object], key: str) -> None:
    """Raise ConfigError if an entry of a config.json is neither null nor the only supported value."""
    for name, value in fixed.items():
        if got.get(name) is not None and got[name] != value:
            expected = (
                "nothing: it is not supported" if value is None else f"{json.dumps(value)}: no other is supported"
            )
            raise problem(f"{key}: config.json: {name}", json.dumps(got[name]), expected, "use another model")


def _some(names: list[str], joint: str = ", ") -> str:
    return joint.join(names[:4]) + (f"{joint}and {len(names) - 4} more" if len(names) > 4 else "")
