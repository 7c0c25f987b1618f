"""Describes InternViT: published tensors, config.json, normalisation, export, modules.

The tensors are `embeddings.*` and `encoder.layers.*`. qkv is published as [all queries | all keys | all values];
Megatron expects [q, k, v] head by head. In NVLM-D-72B the encoder has `dummy_heads` zero heads after the real ones, so
that the number of heads is divisible by 8; ours has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nvlm.config.modules import EncoderModules, Linear, Parameter
from nvlm.config.values import Config, VisionConfig, problem
from nvlm.vision.encoders.described import layer_modules
from nvlm.vision.encoders.interface import EncoderDescription, ExportedEncoder
from nvlm.weights.defaults import completed
from nvlm.weights.parts import Part
from nvlm.weights.published import Stored, check_fixed, check_values

TINY = Path(__file__).parents[2] / "tiny_encoder.safetensors"  # launch/pretrain_tiny_encoder.py wrote it
_CODE = ("configuration_intern_vit.InternVisionConfig", "modeling_intern_vit.InternVisionModel")
# The defaults of InternVisionConfig, the class that reads a published config.json.
_DEFAULTS = dict(
    num_channels=3, patch_size=14, image_size=224, qkv_bias=False, hidden_size=3200, num_attention_heads=25,
    intermediate_size=12800, qk_normalization=True, num_hidden_layers=48, hidden_act="gelu", norm_type="rms_norm",
    layer_norm_eps=1e-6,
)  # fmt: skip
_RELEASED_DUMMIES = 7  # after InternViT-6B's 25 heads in NVLM-D-72B, for 8 tensor-parallel ranks
_FIXED = dict(hidden_act="gelu", num_channels=3, quantization_config=None)
_NORMS = {"rms_norm": "rms", "layer_norm": "layer"}


def parts(vision: VisionConfig, dummy_heads: int = 0) -> list[Part]:
    """All tensors, in model order."""
    d, patches = vision.hidden, vision.patches
    embeddings = {
        "class_embedding": (1, 1, d),
        "position_embedding": (1, 1 + patches, d),
        "patch_embedding.weight": (d, 3, vision.patch, vision.patch),
        "patch_embedding.bias": (d,),
    }
    found = [Part(name=f"embeddings.{name}", shape=shape, ours=name) for name, shape in embeddings.items()]
    for layer in range(vision.layers):
        found += _layer(vision, layer, dummy_heads)
    return found


def _layer(vision: VisionConfig, layer: int, dummy_heads: int) -> Iterator[Part]:
    hf, ours = f"encoder.layers.{layer}", f"decoder.layers.{layer}"
    d, ffn = vision.hidden, vision.ffn
    head = d // vision.heads
    wide, real = d + dummy_heads * head, slice(0, d)
    kinds = ("weight", "bias") if vision.norm == "layer" else ("weight",)
    for name, norm in (("norm1", "input_layernorm"), ("norm2", "pre_mlp_layernorm")):
        for kind in kinds:
            yield Part(name=f"{hf}.{name}.{kind}", shape=(d,), ours=f"{ours}.{norm}.{kind}")
    for kind, columns in (("weight", (d,)), ("bias", ()))[: 1 + vision.qkv_bias]:
        for place in range(3):
            yield Part(
                name=f"{hf}.attn.qkv.{kind}",
                shape=(3 * wide, *columns),
                region=(slice(place * wide, place * wide + d),),
                ours=f"{ours}.self_attention.linear_qkv.{kind}",
                groups=vision.heads,
                offset=place * head,
            )
    if vision.qk_norm:
        for name in ("q_norm", "k_norm"):
            norm = f"{ours}.self_attention.{name[0]}_layernorm.weight"
            yield Part(name=f"{hf}.attn.{name}.weight", shape=(wide,), region=(real,), ours=norm)
    proj = f"{ours}.self_attention.linear_proj"
    yield Part(name=f"{hf}.attn.proj.weight", shape=(d, wide), region=(slice(0, d), real), ours=f"{proj}.weight")
    others = {
        "attn.proj.bias": ((d,), "self_attention.linear_proj.bias"),
        "ls1": ((d,), "self_attention.layer_scale.weight"),
        "ls2": ((d,), "mlp.layer_scale.weight"),
        "mlp.fc1.weight": ((ffn, d), "mlp.linear_fc1.weight"),
        "mlp.fc1.bias": ((ffn,), "mlp.linear_fc1.bias"),
        "mlp.fc2.weight": ((d, ffn), "mlp.linear_fc2.weight"),
        "mlp.fc2.bias": ((d,), "mlp.linear_fc2.bias"),
    }
    for name, (shape, place) in others.items():
        yield Part(name=f"{hf}.{name}", shape=shape, ours=f"{ours}.{place}")


def check_config(values: Mapping, vision: VisionConfig, key: str) -> None:
    """Compare an encoder's config.json with `vision`. Raises ConfigError if they differ."""
    check_fixed(values, _FIXED, key)
    whole = completed(values, _DEFAULTS)
    if whole["norm_type"] not in _NORMS:
        raise problem(f"{key}: config.json: norm_type", whole["norm_type"], " or ".join(_NORMS), "take another encoder")
    whole["norm_type"] = _NORMS[whole["norm_type"]]
    expected = {
        "hidden_size": ("vision.hidden", vision.hidden),
        "num_hidden_layers": ("vision.layers", vision.layers),
        "num_attention_heads": ("vision.heads", vision.heads),
        "intermediate_size": ("vision.ffn", vision.ffn),
        "image_size": ("vision.tile_size", vision.tile_size),
        "patch_size": ("vision.patch", vision.patch),
        "layer_norm_eps": ("vision.norm_eps", vision.norm_eps),
        "qk_normalization": ("vision.qk_norm", vision.qk_norm),
        "qkv_bias": ("vision.qkv_bias", vision.qkv_bias),
        "norm_type": ("vision.norm", vision.norm),
    }
    check_values(whole, expected, key, values)


def _dummy_heads(vision: VisionConfig, rows: int) -> int:
    """The number of zero heads in a layer whose qkv has `rows` rows."""
    extra, rest = divmod(rows - 3 * vision.hidden, 3 * vision.hidden // vision.heads)
    return extra if extra > 0 and not rest else 0


def _parts_of(vision: VisionConfig, stored: Mapping[str, Stored]) -> list[Part]:
    first = stored.get("encoder.layers.0.attn.qkv.weight")
    return parts(vision, _dummy_heads(vision, first.shape[0]) if first else 0)


def exported(vision: VisionConfig, dummy_heads: int) -> ExportedEncoder:
    """The encoder in NVLM-D-72B's layout; its modelling class and vLLM expect seven dummy heads."""
    limits = []
    if dummy_heads != _RELEASED_DUMMIES:
        heads = f"{vision.heads} heads and {dummy_heads} dummy ones"
        limits.append(f"vision={vision.name}: {heads}, where they take InternViT-6B's {_RELEASED_DUMMIES}")
    config = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": vision.hidden,
        "intermediate_size": vision.ffn,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "num_dummy_heads": dummy_heads,
        "image_size": vision.tile_size,
        "patch_size": vision.patch,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": vision.norm_eps,
        "norm_type": {ours: theirs for theirs, ours in _NORMS.items()}[vision.norm],
        "qk_normalization": vision.qk_norm,
        "qkv_bias": vision.qkv_bias,
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "drop_path_rate": 0.0,
        "initializer_factor": 0.1,
        "use_flash_attn": True,
    }
    return ExportedEncoder(parts=parts(vision, dummy_heads), config=config, limits=limits)


def _export(vision: VisionConfig, read: Sequence[Part]) -> ExportedEncoder:
    """With as many dummy heads as `read` has, else padded to a multiple of 8 heads for tensor parallelism."""
    rows = next(part.shape[0] for part in read if part.name.endswith(".attn.qkv.weight"))
    return exported(vision, _dummy_heads(vision, rows) or -vision.heads % 8)


def _build(config: Config, groups):
    from nvlm.vision.encoders.internvit.model import InternViT

    return InternViT(config, groups)


def _frozen(encoder, vision: VisionConfig, multiple: int):
    from nvlm.vision.encoders.inference import FrozenEncoder

    return FrozenEncoder(encoder, vision, multiple)


def modules(vision: VisionConfig) -> EncoderModules:
    """Patch embedding, class token and positions, then pre-norm layers with layer scale; no final norm."""
    d, patches, own = vision.hidden, vision.patches, dict(group="vision")
    embedding = (
        Linear(name="patch_embedding", inputs=3 * vision.patch**2, outputs=d, bias=True, **own),
        Parameter(name="class_embedding", size=d, **own),
        Parameter(name="position_embedding", size=(patches + 1) * d, **own),
    )
    layer, tokens = layer_modules(vision, scaled=True), patches + 1
    return EncoderModules(
        embedding=embedding, layer=layer, layers=vision.layers, patches=patches, tokens=tokens, width=d
    )


INTERNVIT = EncoderDescription(
    name="internvit",
    code=_CODE,
    mean=(0.485, 0.456, 0.406),  # ImageNet's
    std=(0.229, 0.224, 0.225),
    unseen=("heads", "tile_size", "patch", "norm_eps"),
    fixed={},
    crops=False,
    shipped={"tiny": TINY},
    unneeded=lambda vision, name: False,
    modules=modules,
    parts=_parts_of,
    check_config=check_config,
    build=_build,
    frozen=_frozen,
    export=_export,
)
