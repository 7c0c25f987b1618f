"""Describes a tower: published tensors, config.json, modules. Imports no torch.

The tensors are `embeddings.*`, `encoder.layers.*` and, in CLIP, `pre_layrnorm.*` (spelled so). Features are those after
`vision.layers` layers, before any final norm: the published model may have more layers, a final norm and a head.
Queries, keys and values are published apart; Megatron expects [q, k, v] head by head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nvlm.config.modules import EncoderModules, Linear, Norm, Parameter
from nvlm.config.values import Config, VisionConfig, problem
from nvlm.vision.encoders.described import layer_modules
from nvlm.vision.encoders.interface import EncoderDescription, HubEncoder
from nvlm.weights.defaults import completed
from nvlm.weights.parts import Part
from nvlm.weights.published import check_fixed, check_values

_FILES = Path(__file__).parents[2]
_KINDS = ("weight", "bias")
_UNUSED = ("post_layernorm.", "head.", "embeddings.position_ids")  # of every family; not learned, or after the features


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """What distinguishes the families."""

    name: str  # vision.encoder
    model_type: str  # of the vision part of config.json
    defaults: Mapping[str, object]  # what that part means where it leaves something out
    mean: tuple[float, float, float]  # of the RGB pixels, which are 0 to 1
    std: tuple[float, float, float]
    class_token: bool  # before the patches, which sees and is seen by them; not a feature
    patch_bias: bool
    embedding_norm: bool  # of all tokens, before the first layer
    classes: str  # names of transformers' classes begin with it
    ends_early: bool  # LLaVA leaves out the layers after the one that is read
    published: Mapping[str, str]  # names of published models by those of VisionConfig


def parts(tower: Tower, vision: VisionConfig) -> list[Part]:
    """The tensors that are read, in model order, named without the prefix `vision_model.`."""
    d, tokens = vision.hidden, vision.patches + tower.class_token
    named = {"embeddings.patch_embedding.weight": ("patch_embedding.weight", (d, 3, vision.patch, vision.patch))}
    if tower.patch_bias:
        named["embeddings.patch_embedding.bias"] = ("patch_embedding.bias", (d,))
    if tower.class_token:
        named["embeddings.class_embedding"] = ("class_embedding", (d,))
    named["embeddings.position_embedding.weight"] = ("position_embedding", (tokens, d))
    if tower.embedding_norm:
        named |= {f"pre_layrnorm.{kind}": (f"embedding_norm.{kind}", (d,)) for kind in _KINDS}
    found = [Part(name=name, shape=shape, ours=ours) for name, (ours, shape) in named.items()]
    for layer in range(vision.layers):
        found += _layer(vision, layer)
    return found


def _layer(vision: VisionConfig, layer: int) -> Iterator[Part]:
    hf, ours = f"encoder.layers.{layer}", f"decoder.layers.{layer}"
    d, ffn = vision.hidden, vision.ffn
    for place, which in enumerate("qkv"):
        for kind, columns in zip(_KINDS, ((d,), ())):
            yield Part(
                name=f"{hf}.self_attn.{which}_proj.{kind}",
                shape=(d, *columns),
                ours=f"{ours}.self_attention.linear_qkv.{kind}",
                groups=vision.heads,
                offset=place * d // vision.heads,
            )
    others = {
        "layer_norm1": ("input_layernorm", (d,), (d,)),
        "self_attn.out_proj": ("self_attention.linear_proj", (d, d), (d,)),
        "layer_norm2": ("pre_mlp_layernorm", (d,), (d,)),
        "mlp.fc1": ("mlp.linear_fc1", (ffn, d), (ffn,)),
        "mlp.fc2": ("mlp.linear_fc2", (d, ffn), (d,)),
    }
    for name, (place, *shapes) in others.items():
        for kind, shape in zip(_KINDS, shapes):
            yield Part(name=f"{hf}.{name}.{kind}", shape=shape, ours=f"{ours}.{place}.{kind}")


def unneeded(vision: VisionConfig, name: str) -> bool:
    """Whether the published tensor `name` is not used for the features: a later layer's, the final norm's, a head's."""
    first, _, rest = name.removeprefix("encoder.layers.").partition(".")
    later = name.startswith("encoder.layers.") and first.isdecimal() and int(first) >= vision.layers
    return later or name.startswith(_UNUSED)


def check_config(tower: Tower, values: Mapping, vision: VisionConfig, key: str) -> None:
    """Compare the vision part of a published config.json with `vision`. Raises ConfigError if they differ."""
    kind = values.get("model_type", tower.model_type)
    if kind != tower.model_type:
        fix = f"the vision= of that encoder, or another {key}"
        raise problem(f"{key}: config.json: model_type", kind, f"{tower.model_type}, vision={vision.name}", fix)
    fixed = dict(hidden_act=tower.defaults["hidden_act"], num_channels=3, quantization_config=None)
    check_fixed(values, fixed, key)
    whole = completed(values, tower.defaults)
    if whole["num_hidden_layers"] > vision.layers:  # the layers after those that make the features
        whole["num_hidden_layers"] = vision.layers
    expected = {
        "hidden_size": ("vision.hidden", vision.hidden),
        "num_hidden_layers": ("vision.layers", vision.layers),
        "num_attention_heads": ("vision.heads", vision.heads),
        "intermediate_size": ("vision.ffn", vision.ffn),
        "image_size": ("vision.tile_size", vision.tile_size),
        "patch_size": ("vision.patch", vision.patch),
        "layer_norm_eps": ("vision.norm_eps", vision.norm_eps),
    }
    check_values(whole, expected, key, values)


def modules(tower: Tower, vision: VisionConfig) -> EncoderModules:
    """Patch embedding, positions, perhaps class token and norm, then the layers; no final norm."""
    d, tokens, own = vision.hidden, vision.patches + tower.class_token, dict(group="vision")
    embedding = (
        Linear(name="patch_embedding", inputs=3 * vision.patch**2, outputs=d, bias=tower.patch_bias, **own),
        *([Parameter(name="class_embedding", size=d, **own)] if tower.class_token else ()),
        Parameter(name="position_embedding", size=tokens * d, **own),
        *([Norm(name="embedding_norm", width=d, bias=True, **own)] if tower.embedding_norm else ()),
    )
    return EncoderModules(
        embedding=embedding,
        layer=layer_modules(vision),
        layers=vision.layers,
        patches=vision.patches,
        tokens=tokens,
        width=d,
    )


def hub(tower: Tower) -> HubEncoder:
    """The family in LLaVA's and VILA's models."""
    return HubEncoder(
        architecture=f"{tower.classes}VisionModel",
        image_processor=f"{tower.classes}ImageProcessor",
        config=lambda vision, layers: _hub_config(tower, vision, layers),
        strategy="default" if tower.class_token else "full",
        ends_early=tower.ends_early,
        published=tower.published,
    )


def _hub_config(tower: Tower, vision: VisionConfig, layers: int) -> dict[str, object]:
    return {
        "model_type": tower.model_type,
        "hidden_size": vision.hidden,
        "intermediate_size": vision.ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": vision.heads,
        "num_channels": 3,
        "image_size": vision.tile_size,
        "patch_size": vision.patch,
        "hidden_act": tower.defaults["hidden_act"],
        "layer_norm_eps": vision.norm_eps,
        **({} if tower.class_token else {"vision_use_head": False}),
    }


def describe(tower: Tower) -> EncoderDescription:
    """The description of the family `tower`."""
    activation = tower.defaults["hidden_act"]

    def build(config: Config, groups):
        from nvlm.vision.encoders.tower.activations import ACTIVATIONS
        from nvlm.vision.encoders.tower.model import VisionTower

        return VisionTower(tower, config, groups, ACTIVATIONS[activation])

    def frozen(encoder, vision: VisionConfig, multiple: int):
        from nvlm.vision.encoders.inference import FrozenEncoder
        from nvlm.vision.encoders.tower.activations import ACTIVATIONS

        return FrozenEncoder(encoder, vision, multiple, ACTIVATIONS[activation])

    return EncoderDescription(
        name=tower.name,
        code=(),
        mean=tower.mean,
        std=tower.std,
        unseen=("heads", "layers", "tile_size", "patch", "norm_eps"),
        fixed=dict(norm="layer", qkv_bias=True, qk_norm=False),
        crops=True,
        shipped={"tiny": _FILES / f"tiny_{tower.name}.safetensors"},  # launch/pretrain_tiny_encoder.py wrote it
        unneeded=unneeded,
        modules=lambda vision: modules(tower, vision),
        parts=lambda vision, stored: parts(tower, vision),
        check_config=lambda values, vision, key: check_config(tower, values, vision, key),
        build=build,
        frozen=frozen,
        export=None,
        hub=hub(tower),
    )
