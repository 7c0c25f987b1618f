"""What can load an exported folder: its own code always, vLLM and NVLM-D-72B's own class within limits.

The limits are those of vLLM 0.33 and of the class under transformers 4.39.3 and 5.23. No test runs either.
"""

from __future__ import annotations

from collections.abc import Sequence

from nvlm.arch.registry import description
from nvlm.config.values import Config
from nvlm.export.text import VISION_PAD, places_images
from nvlm.vision.encoders.interface import ExportedEncoder

RELEASE_FILES = ("configuration_nvlm_d.py", "modeling_nvlm_d.py", "modeling_intern_vit.py", "conversation.py")
_TAGS = "they write <tile_1> to <tile_9> and <tile_global_thumbnail>, whatever the model has learned"


def other_limits(config: Config, encoder: ExportedEncoder) -> list[str]:
    """Why neither vLLM nor NVLM-D-72B's own class can load an export of this run; empty: no reason is known."""
    kind = description(config.arch.name)
    if not kind.release_code:
        return [f"{kind.title} is known to no other library: no published model has it"]
    limits = []
    if config.tiling.tag != "1d":
        limits.append(f"tiling.tag={config.tiling.tag}: {_TAGS}")
    elif config.tiling.max_tiles > 9:
        limits.append(f"tiling.max_tiles={config.tiling.max_tiles}: {_TAGS}")
    elif config.llm.thumbnail_tag != "<tile_global_thumbnail>":
        limits.append(f"llm.thumbnail_tag={config.llm.thumbnail_tag}: {_TAGS}")
    limits += encoder.limits
    if config.llm.chat != "chatml":
        limits.append(f"llm.chat={config.llm.chat}: they write ChatML")
    if config.llm.qk_norm or not config.llm.qkv_bias:
        limits.append(f"llm={config.llm.name}: configuration_nvlm_d.py, which vLLM runs too, takes Qwen2 alone")
    if not places_images(config):
        limits.append(f"the tokenizer has no {VISION_PAD} and the vocabulary no row left for it, which they need")
    return limits


def release_limits(config: Config, files: Sequence[str]) -> list[str]:
    """Why only NVLM-D-72B's own class cannot load such a folder; `files`: those in it besides the weights."""
    limits = []
    if config.llm.rope_interpolation > 1:
        limits.append(
            f"llm.rope_interpolation={config.llm.rope_interpolation:g}: its Qwen2 has no scaling of positions"
        )
    if config.llm.tied:
        limits.append("it silently leaves the output layer random if word embeddings are tied")
    if lost := [name for name in RELEASE_FILES if name not in files]:
        limits.append(f"its files are not in this folder: {', '.join(lost)}")
    return limits


def note(config: Config, encoder: ExportedEncoder) -> str | None:
    """One line for the console if only the folder's own code can load it."""
    limits = other_limits(config, encoder)
    return f"only its own modeling_nvlm.py can load it: {'; '.join(limits)}" if limits else None


def readme(config: Config, encoder: ExportedEncoder, files: Sequence[str] = ()) -> str:
    """README.md of the folder; `files`: those in it besides the weights."""
    text = [
        f"# {config.name}",
        "",
        f"{description(config.arch.name).title}: {config.llm.name}, {config.vision.name}. "
        "Its own code needs torch, safetensors, tokenizers, pillow:",
        "",
        "```python",
        "from modeling_nvlm import NVLM",
        "",
        'model = NVLM.from_folder(".")',
        'print(model.answer([{"role": "user", "content": "<image>\\nWhat is this?"}], ["page.png"]))',
        "```",
        "",
    ]
    if limits := other_limits(config, encoder):
        text += ["Use that: vLLM and NVLM-D-72B's own class cannot load this folder.", ""]
        return "\n".join([*text, *(f"- {limit}." for limit in limits)]) + "\n"
    return "\n".join([*text, *_vllm(config, files), *_release(config, files), *_ids(config)]) + "\n"


def _vllm(config: Config, files: Sequence[str]) -> list[str]:
    lines = [
        "Tensors and config.json are laid out as in nvidia/NVLM-D-72B.",
        "",
        "## vLLM (0.33)",
        "",
        "`vllm serve . --trust-remote-code`",
    ]
    if "configuration_nvlm_d.py" not in files:
        lines.append("First copy configuration_nvlm_d.py and the other .py files of nvidia/NVLM-D-72B here: it stops")
        lines.append("without them, since config.json names them.")
    return [*lines, ""]


def _release(config: Config, files: Sequence[str]) -> list[str]:
    lines = [
        "## The release's own class (transformers 4.39.3)",
        "",
        "It does not load in transformers 5.x. There, use modeling_nvlm.py, which needs no transformers.",
    ]
    limits = release_limits(config, files)
    return [*lines, *(["", "Here:", ""] if limits else []), *(f"- {limit}." for limit in limits), ""]


def _ids(config: Config) -> list[str]:
    mode, same = config.data.tokenize, {"vllm": "vLLM", "joined": "the release's class"}
    lines = [
        "## Token ids around an image",
        "",
        f"The model was trained with data.tokenize={mode}, and modeling_nvlm.py does the same. vLLM tokenises",
        "`<Image>` and the first tag together, and the line break after `</Image>` apart (data.tokenize=vllm); the",
        "release's class tokenises everything between two special tokens together (data.tokenize=joined).",
    ]
    others = [name for key, name in (("vllm", "vLLM"), ("joined", "the release's class")) if key != mode]
    lines.append(
        f"So {' and '.join(others)} may produce ids there that differ from training"
        + (f"; {same[mode]} produces the same ids." if mode in same else ".")
    )
    return lines
