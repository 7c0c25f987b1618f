"""How the folder of a whole published model names its tensors: NVLM-D-72B's layout, LLaVA's own, llava-hf's and VILA's.

`opened` recognises a folder's layout from its tensors' names. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nvlm.config.modules import Linear, Module, Norm
from nvlm.config.values import problem
from nvlm.weights.published import LANGUAGE, VISION, Stored, read_headers

_PATCHES = "embeddings.patch_embedding.weight"  # every encoder has this tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One layout. `projector`: the published name of the projector's module at a place in its nn.Sequential."""

    name: str
    language: str  # prefix of the language model's tensors
    vision: tuple[str, ...]  # prefixes of the encoder's tensors; exports write the first
    projector: Callable[[Sequence[Module], int], str]
    row_end: str | None = None  # the learned vector at the end of each row of tokens
    folders: Mapping[str, str] = field(default_factory=dict, hash=False)  # subfolder of each module group


def _llava_projector(modules: Sequence[Module], place: int) -> str:
    return "model.mm_projector" if len(modules) == 1 else f"model.mm_projector.{place}"


def _hf_projector(modules: Sequence[Module], place: int) -> str:
    return f"multi_modal_projector.linear_{sum(isinstance(one, Linear) for one in modules[: place + 1])}"


def _vila_projector(modules: Sequence[Module], place: int) -> str:
    if len(modules) == 1:
        return "layers"
    concatenates = isinstance(modules[0], Norm)  # in its first place, which has no tensors
    return f"layers.{place + concatenates}"


NVLM = Layout(
    name="nvlm",
    language=LANGUAGE,
    vision=(VISION,),
    projector=lambda modules, place: f"mlp1.{place}",
    row_end="image_newline",  # no published model has it: the name is llava-hf's
)
LLAVA = Layout(
    name="llava",
    language="",
    vision=("model.vision_tower.vision_tower.vision_model.",),
    projector=_llava_projector,
    row_end="model.image_newline",
)
LLAVA_HF = Layout(
    name="llava-hf",
    language=LANGUAGE,
    vision=("vision_tower.vision_model.", "vision_tower."),  # the second is written by transformers 5
    projector=_hf_projector,
    row_end="image_newline",
)
VILA = Layout(
    name="vila",
    language="",
    vision=(VISION,),
    projector=_vila_projector,
    folders={"llm": "llm", "vision": "vision_tower", "projector": "mm_projector"},
)
LAYOUTS = {layout.name: layout for layout in (NVLM, LLAVA, LLAVA_HF, VILA)}
_MARKS = {"model.mm_projector.": LLAVA, "multi_modal_projector.": LLAVA_HF}


def opened(folder: str, key: str) -> tuple[Layout, dict[str, Stored]]:
    """The layout of a whole model's folder and its tensors, from their headers. Raises ConfigError."""
    places = {group: Path(folder) / name for group, name in VILA.folders.items()}
    if not all(place.is_dir() for place in places.values()):
        stored = read_headers(folder, key)
        return next((layout for mark, layout in _MARKS.items() if _any(stored, mark)), NVLM), stored
    held = {group: read_headers(str(place), key) for group, place in places.items()}
    if twice := held["llm"].keys() & held["vision"].keys() | held["projector"].keys() & held["llm"].keys():
        expected = "each tensor in one of its folders"
        raise problem(f"{key}: {folder}", f"{min(twice)} in two of them", expected, "download it again")
    return VILA, {name: one for tensors in held.values() for name, one in tensors.items()}


def encoder_prefix(stored: Iterable[str]) -> str:
    """What comes before the encoder's own names in a folder of it alone, or of a whole model; "" if it has none."""
    known = {prefix for layout in LAYOUTS.values() for prefix in layout.vision}
    found = (name.removesuffix(_PATCHES) for name in stored if name.endswith(_PATCHES))
    return next((prefix for prefix in found if prefix in known), "")


def _any(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)
