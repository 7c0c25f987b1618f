"""NVLM-D's training step with two peers: Megatron-Core's LLaVAModel, and transformers' classes.

A peer has the shapes of a configuration (layers, widths, grouped queries, rotary base, projector, frozen encoder) and
takes the same samples. tests/parity/test_peers.py shows that with the same weights it has our loss and gradients. One
process, no optimizer; a step is one forward and one backward, with all tiles in one call of the encoder. Both compute
the logits of all positions, which is their default.

LLaVAModel: one sample per row, rows padded to the longest. It uses Transformer Engine's layers and FP8 where ours do,
in FP8 also for the projector. Without Transformer Engine, core's attention writes all scores to memory, so its speed
says nothing about Megatron. Gradients are in fp32 in Megatron's buffers, like ours. The encoder is core's CLIPViTModel:
it has no layer scale (given weights have it folded into the linear before it) and always a qkv bias; core lacks QK-norm
over all heads, so its layer spec gets our module. Padding rows of the vocabulary count as words. Of a rotary scaling it
takes the factor; the other numbers are fixed at Llama 3.1's.

transformers: one packed row with flash attention. Otherwise one sample per row if all have the same length, so that
PyTorch's attention needs no mask, else a packed row with a dense mask. Gradients are in the weights' precision (bf16),
without FP8. On a GPU, layers, projector and loss are compiled separately: traced as a whole, transformers always makes
a dense mask. It recomputes whole layers unless train.recompute is none.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX, LLaVAModel
from megatron.core.models.vision import vit_layer_specs
from megatron.core.pipeline_parallel.schedules import custom_backward
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import is_flash_attn_2_available

from nvlm.config.values import Config
from nvlm.data.batch import IGNORE, IMAGE, Sample
from nvlm.data.pack import collate
from nvlm.inputs.sources import projector_parts
from nvlm.llm.backend import engine, of_megatron, uses_te
from nvlm.llm.build import DTYPES, FUSED_NORMS, llm_config
from nvlm.llm.norm import FullWidthRMSNorm, LayerNorm
from nvlm.tiling import normalize
from nvlm.train.optim import wrap
from nvlm.vision.encoders.internvit import description as internvit
from nvlm.vision.encoders.internvit.description import INTERNVIT
from nvlm.vision.encoders.layers import encoder_config
from nvlm.vision.pooling import pixel_shuffle
from nvlm.weights import llm
from nvlm.weights.parts import Part, below, joined, published
from nvlm.weights.published import LANGUAGE, VISION

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Peer:
    """A model that trains like ours.

    `step`: forward and backward over samples of NVLM-D; returns the mean loss over their trained tokens.
    `gradients`: gradients of the last step, by the names in NVLM-D-72B's files.
    """

    name: str
    step: Callable[[Sequence[Sample]], float]
    gradients: Callable[[], dict[str, Tensor]]


# --- Megatron-Core ---


def llava_model(config: Config, device: torch.device, weights: Weights | None = None) -> Peer:
    """Megatron-Core's LLaVAModel, with Transformer Engine's layers if ours use them, and FP8 as in config.precision.

    Call it inside `nvlm.processes.groups.distributed`. `weights`: by the names in NVLM-D-72B's files; default: random.
    """
    te, dtype = uses_te(config), DTYPES[config.precision.dtype]
    scaling = config.llm.rope_scaling
    language = of_megatron(
        llm_config(config),
        cross_entropy_loss_fusion=device.type == "cuda",
        use_te_activation_func=False,  # core's own SwiGLU, not ours
        perform_initialization=True,
    )
    vision = dataclasses.replace(encoder_config(config), perform_initialization=True)
    vision.vision_model_type = "internvit"
    model = LLaVAModel(
        language,
        get_gpt_decoder_block_spec(language, use_transformer_engine=te, normalization="RMSNorm"),
        config.llm.padded_vocab,
        config.llm.max_positions,
        vision,
        _vision_spec(te, config.vision.qk_norm),
        drop_vision_class_token=True,
        vision_projection_config=_projection_config(language),
        vision_projection_layer_spec=_projection_spec(te),
        share_embeddings_and_output_weights=config.llm.tied,
        language_position_embedding_type="rope",
        img_h=config.vision.tile_size,
        img_w=config.vision.tile_size,
        patch_dim=config.vision.patch,
        language_rotary_base=config.llm.rope_theta,
        language_rope_scaling=scaling is not None,
        language_rope_scaling_factor=scaling["factor"] if scaling else 1.0,
        pixel_shuffle=True,
    ).to(device, dtype)  # core makes some parameters in fp32, and casts them where it trains
    model.freeze(freeze_language_model=False, freeze_vision_model=True, freeze_vision_projection=False)
    if weights is not None:
        _fill_llava(model, config, weights)
    ours = {**_ours("", model.language_model), **_ours("projector.", model.vision_projection)}
    one = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, distributed_optimizer=False))
    wrapped = wrap(model, one)
    # As ours. The setting is for the output layer too, which is core's own, and refuses it where there is no Apex.
    for module in (*model.language_model.decoder.modules(), *model.vision_projection.modules()):
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True

    def step(samples: Sequence[Sample]) -> float:
        wrapped.zero_grad_buffer()
        losses, mask = wrapped(**_llava_inputs(samples, config, device))
        loss = (losses * mask).sum() / mask.sum()
        custom_backward(loss, None)  # torch's own would look for a GPU where a layer is recomputed on CPU
        wrapped.finish_grad_sync()
        return float(loss)

    def gradients() -> dict[str, Tensor]:
        return published(_learning_parts(config), {name: p.main_grad for name, p in ours.items()})

    return Peer("Megatron-Core LLaVAModel", step, gradients)


def _vision_spec(te: bool, qk_norm: bool) -> ModuleSpec:
    specs = vit_layer_specs
    spec = specs.get_vit_layer_with_transformer_engine_spec() if te else specs.get_vit_layer_with_local_spec()
    if qk_norm:
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = FullWidthRMSNorm
    return spec


def _projection_config(language: TransformerConfig) -> TransformerConfig:
    return dataclasses.replace(
        language,
        gated_linear_unit=False,
        activation_func=nn.functional.gelu,
        bias_activation_fusion=False,
        add_qkv_bias=False,
        normalization="LayerNorm",
        layernorm_epsilon=1e-5,
    )


def _projection_spec(te: bool) -> MLPSubmodules:
    if te:
        return MLPSubmodules(engine().TELayerNormColumnParallelLinear, engine().TERowParallelLinear)
    return MLPSubmodules(_NormedLinear, RowParallelLinear)


class _NormedLinear(ColumnParallelLinear):
    """A norm and a linear, which Transformer Engine has as one module."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.norm = LayerNorm(config, input_size, config.layernorm_epsilon)

    def forward(self, x: Tensor, *args, **kwargs):
        return super().forward(self.norm(x), *args, **kwargs)


def _llava_inputs(samples: Sequence[Sample], config: Config, device: torch.device) -> dict[str, Tensor | None]:
    """One sample per row, with one token for an image of several tiles."""
    rows, lengths, tiles = [], [], []
    for sample in samples:
        image = sample.tokens == IMAGE
        last = image & ~torch.cat((image[1:], image.new_zeros(1)))
        ends = (last[image].nonzero().flatten() + 1).tolist()  # counted in tile tokens
        tiles += [(end - start) // config.vision.tile_tokens for start, end in itertools.pairwise([0, *ends])]
        rows.append((~image | last).nonzero().flatten())
        lengths.append(len(image) - len(rows[-1]))  # what the row grows by within the model
    columns = max(map(len, rows))
    columns += -(columns + max(lengths)) % config.row_multiple

    def padded(name: str, value: int) -> Tensor:
        kept = [getattr(sample, name)[row] for sample, row in zip(samples, rows, strict=True)]
        return pad_sequence([nn.functional.pad(x, (0, columns - len(x)), value=value) for x in kept], True).to(device)

    tokens, labels = padded("tokens", 0), padded("labels", IGNORE)
    return dict(
        images=normalize(_pixels(samples).to(device), INTERNVIT.mean, INTERNVIT.std, DTYPES[config.precision.dtype]),
        input_ids=tokens.masked_fill(tokens == IMAGE, DEFAULT_IMAGE_TOKEN_INDEX),
        position_ids=torch.arange(columns, device=device).expand(len(rows), -1),
        attention_mask=None,
        labels=labels.clamp(min=0),
        loss_mask=(labels != IGNORE).float(),
        num_image_tiles=torch.tensor(tiles, dtype=torch.int, device=device),
    )


def _pixels(samples: Sequence[Sample]) -> Tensor:
    """uint8 [T, 3, px, px] of all samples, in the order of their placeholders."""
    return torch.cat([sample.pixels for sample in samples])


def _learning_parts(config: Config) -> list[Part]:
    return [*below(LANGUAGE, llm.parts(config.llm)), *projector_parts(config)]


def _ours(prefix: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of one of LLaVAModel's modules under our names."""
    renamed = {
        "encoder.linear_fc1.layer_norm_": "norm.",
        "encoder.linear_fc1.norm.": "norm.",
        "encoder.": "layers.encoder.",
        "conv1.": "patch_embedding.",
        "class_token": "class_embedding",
        "position_embeddings.weight": "position_embedding",
    }

    def our(name: str) -> str:
        for fused, norm in FUSED_NORMS.items():
            name = name.replace(fused, norm)
        start = next((start for start in renamed if name.startswith(start)), "")
        return prefix + renamed.get(start, "") + name.removeprefix(start)

    return {our(name): parameter for name, parameter in module.named_parameters()}


@torch.no_grad()
def _fill_llava(model: LLaVAModel, config: Config, weights: Weights) -> None:
    encoder = {name.removeprefix(VISION): t for name, t in weights.items() if name.startswith(VISION)}
    others = {name: t for name, t in weights.items() if not name.startswith(VISION)}
    learning = joined(_learning_parts(config), others)
    frozen = _without_scales(joined(internvit.parts(config.vision), encoder))
    _copy({**_ours("", model.language_model), **_ours("projector.", model.vision_projection)}, learning)
    biases = {f"decoder.layers.{n}.self_attention.linear_qkv.bias" for n in range(config.vision.layers)}
    no_bias = {name: torch.zeros(3 * config.vision.hidden) for name in biases - frozen.keys()}
    _copy(_ours("", model.vision_model), frozen | no_bias)


def _without_scales(encoder: Weights) -> dict[str, Tensor]:
    """The same encoder, with layer scales folded into the linears before them."""
    folded = dict(encoder)
    for place, linear in (("self_attention", "linear_proj"), ("mlp", "linear_fc2")):
        end = f".{place}.layer_scale.weight"
        for name in [name for name in folded if name.endswith(end)]:
            scale, layer = folded.pop(name), name.removesuffix(end)
            for kind, factors in (("weight", scale[:, None]), ("bias", scale)):
                folded[f"{layer}.{place}.{linear}.{kind}"] = folded[f"{layer}.{place}.{linear}.{kind}"] * factors
    return folded


@torch.no_grad()
def _copy(parameters: Mapping[str, Tensor], tensors: Weights) -> None:
    assert parameters.keys() == tensors.keys(), sorted(parameters.keys() ^ tensors.keys())
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name].view_as(parameter))


# --- transformers ---


def transformers_model(config: Config, device: torch.device, weights: Weights | None = None) -> Peer:
    """transformers' InternViT and its Qwen2 or Llama, compiled on a GPU.

    `weights`: by the names in NVLM-D-72B's files; default: random.
    """
    cuda = device.type == "cuda"
    flash = cuda and is_flash_attn_2_available() and config.precision.dtype == "bf16"
    with device:
        model = _Tiles(config, "flash_attention_2" if flash else "sdpa")
    if weights is not None:
        _copy(dict(model.named_parameters()), _transformers_names(weights))
    if config.train.recompute != "none":
        model.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if cuda:
        _compile(model)

    def step(samples: Sequence[Sample]) -> float:
        model.zero_grad(set_to_none=True)
        pixels = normalize(_pixels(samples).to(device), INTERNVIT.mean, INTERNVIT.std, DTYPES[config.precision.dtype])
        loss = model(pixels=pixels, **_rows(samples, flash, device))
        loss.backward()
        return float(loss)

    def gradients() -> dict[str, Tensor]:
        learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in learning.items()}

    return Peer("transformers + torch.compile" if cuda else "transformers", step, gradients)


class _Tiles(nn.Module):
    """Tiles in the text stream of transformers' language model; parameters named as NVLM-D-72B's, but the encoder's."""

    def __init__(self, config: Config, attention: str) -> None:
        super().__init__()
        vision, hidden, inner = config.vision, config.llm.hidden, config.llm.ffn
        width, dtype = vision.hidden * vision.downsample**2, DTYPES[config.precision.dtype]
        # Set here rather than by .to(), which would also round the rotary frequencies.
        how = dict(dtype=dtype, attn_implementation=attention)
        self.downsample = vision.downsample
        self.vision_model = transformers.AutoModel.from_config(_vision_shape(config), **how).requires_grad_(False)
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(width, dtype=dtype),
            nn.Linear(width, inner, bias=False, dtype=dtype),
            nn.GELU(),
            nn.Linear(inner, hidden, bias=False, dtype=dtype),
        )
        self.language_model = transformers.AutoModelForCausalLM.from_config(_language_shape(config), **how).train()

    def forward(self, tokens: Tensor, labels: Tensor, pixels: Tensor, **rows) -> Tensor:
        """The mean loss of `tokens` and `labels` [B, S]; `pixels` [T, 3, px, px] in the order of the placeholders."""
        stream = self.language_model.get_input_embeddings()(tokens.clamp(min=0))
        if len(pixels):
            with torch.no_grad():
                patches = self.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
            tiles = self.mlp1(pixel_shuffle(patches, self.downsample))
            stream = stream.masked_scatter((tokens == IMAGE)[..., None], tiles)
        # Our labels are already shifted.
        out = self.language_model(inputs_embeds=stream, labels=labels, shift_labels=labels, use_cache=False, **rows)
        return out.loss


def _language_shape(config: Config) -> transformers.PretrainedConfig:
    llm = config.llm
    scaling = {"rope_type": "llama3", **llm.rope_scaling} if llm.rope_scaling else {"rope_type": "default"}
    return (transformers.Qwen2Config if llm.qkv_bias else transformers.LlamaConfig)(
        hidden_size=llm.hidden,
        num_hidden_layers=llm.layers,
        num_attention_heads=llm.heads,
        num_key_value_heads=llm.kv_heads,
        head_dim=llm.head_dim,
        intermediate_size=llm.ffn,
        vocab_size=llm.vocab,
        rms_norm_eps=llm.norm_eps,
        tie_word_embeddings=llm.tied,
        max_position_embeddings=llm.max_positions,
        initializer_range=llm.init_std,
        rope_parameters={"rope_theta": llm.rope_theta, **scaling},
    )


def _vision_shape(config: Config) -> transformers.PretrainedConfig:
    vision = config.vision
    return transformers.InternVLVisionConfig(
        hidden_size=vision.hidden,
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads,
        intermediate_size=vision.ffn,
        image_size=vision.tile_size,
        patch_size=vision.patch,
        norm_type={"rms": "rms_norm", "layer": "layer_norm"}[vision.norm],
        layer_norm_eps=vision.norm_eps,
        attention_bias=vision.qkv_bias,
        use_qk_norm=vision.qk_norm,
        use_mean_pooling=True,  # no norm behind the last layer
    )


def _compile(model: _Tiles) -> None:
    for layer in model.language_model.model.layers:
        layer.self_attn.layer_idx = (
            0  # only a cache needs the number, and code that reads it is compiled for each layer
        )
    for layer in (*model.language_model.model.layers, *model.vision_model.encoder.layer):
        layer.compile(dynamic=False)
    model.mlp1.forward = torch.compile(model.mlp1.forward, dynamic=False)  # as a module of torch's own it is skipped
    model.language_model.loss_function = torch.compile(model.language_model.loss_function, dynamic=False)


def _rows(samples: Sequence[Sample], flash: bool, device: torch.device) -> dict[str, object]:
    """What the language model gets besides the tiles."""
    lengths = [len(sample.tokens) for sample in samples]
    packed = flash or len(set(lengths)) > 1
    batch = collate([samples] if packed else [[sample] for sample in samples], tile_size=0, multiple=1)
    rows = dict(tokens=batch.tokens.to(device), labels=batch.labels.to(device))
    if not packed:
        return rows
    rows["position_ids"] = batch.positions.to(device)
    if flash:
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        longest = max(lengths)
        return rows | dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest)
    number = batch.sample.to(device)
    return rows | dict(attention_mask=(number[:, None, :, None] == number[:, None, None]).tril())


def _transformers_names(weights: Weights) -> dict[str, Tensor]:
    """Published weights under the names of `_Tiles`: the encoder's queries, keys and values are separate."""
    renamed = {
        "class_embedding": "cls_token",
        "position_embedding": "position_embeddings",
        "patch_embedding": "patch_embeddings.projection",
        "encoder.layers": "encoder.layer",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "ls1": "lambda_1",
        "ls2": "lambda_2",
        "attn.proj": "attention.projection_layer",
        "attn.": "attention.",
    }
    found = {}
    for name, tensor in weights.items():
        if not name.startswith(VISION):
            found[name] = tensor
            continue
        for published_name, own in renamed.items():
            name = name.replace(published_name, own)
        if ".qkv." in name:
            apart = zip("qkv", tensor.chunk(3), strict=True)
            found |= {name.replace(".qkv.", f".{kind}_proj."): part for kind, part in apart}
        else:
            found[name] = tensor
    return found
