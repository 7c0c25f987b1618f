"""What the three architectures share: one forward, batch -> per-token loss. They differ in where tiles go.

The language model is Megatron-Core's embedding, TransformerBlock and output layer. An architecture brings two
things: a `Projector`, and a `Fusion` that puts projected tiles into the text stream, into the cross-attended
keys, or both.

Shapes: B rows, S text-stream tokens, X keys, T tiles, K tokens per tile, C feature width, H model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from nvlm.batch import IGNORE, Batch, check_placeholders
from nvlm.config import Config
from nvlm.layout import LayoutRule
from nvlm.llm.attention import causal_mask, rotary_angles
from nvlm.llm.build import block_submodules, llm_config
from nvlm.llm.norm import LayerNorm


class Fusion(Protocol):
    """Where projected tiles go; a module, for its norms learn."""

    def stream(self, words_BSH: Tensor, batch: Batch, tiles_TKH: Tensor) -> Tensor:
        """The text stream's input [B, S, H]."""
        ...

    def keys(self, batch: Batch, tiles_TKH: Tensor, embed) -> tuple[Tensor | None, Tensor | None]:
        """Cross-attended keys [X, B, H] and their mask [B, 1, S, X] (True: not seen), or (None, None)."""
        ...


@dataclass(frozen=True, slots=True)
class Architecture:
    """One of the three, as values."""

    name: str
    layout: LayoutRule
    projector: str  # "mlp" (two layers) or "affine" (one)
    fusion: Callable[[TransformerConfig], Fusion]
    cross_attention: ModuleSpec | None


class Projector(MegatronModule):
    """LayerNorm, then a two-layer MLP (D, H) or one linear layer (X), no bias: [..., C] to [..., H].

    NVLM section 4.5; the norm as in its public code. The MLP's inner width is the language model's.
    """

    def __init__(self, config: Config, kind: str) -> None:
        llm = dataclasses.replace(
            llm_config(config),
            sequence_parallel=False,  # tiles are not split along the sequence
            gated_linear_unit=False,
            activation_func=nn.functional.gelu,
            add_qkv_bias=False,
        )
        super().__init__(config=llm)
        width = config.vision.hidden * config.vision.downsample**2
        self.norm = LayerNorm(llm, width, eps=1e-5)
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        self.layers = MultimodalProjector(llm, linears, kind, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(self.norm(features.to(self.config.params_dtype)))


class VisionLanguageModel(MegatronModule):
    """A pipeline stage (or all) of one architecture."""

    def __init__(self, config: Config, architecture: Architecture, pre_process: bool = True, post_process: bool = True):
        megatron = llm_config(config)
        super().__init__(config=megatron)
        self.model_type = ModelType.encoder_or_decoder  # the pipeline schedules ask for it
        self.llm, self.tile_tokens = config.llm, config.vision.tile_tokens
        self.pre_process, self.post_process = pre_process, post_process
        self.share_embeddings_and_output_weights = config.llm.tied
        self.projector = Projector(config, architecture.projector)
        self.fusion = architecture.fusion(megatron)
        if pre_process or config.llm.tied:
            self.embedding = LanguageModelEmbedding(
                megatron,
                config.llm.vocab,
                config.llm.max_positions,
                "rope",
                scatter_to_sequence_parallel=False,
            )
        first = get_transformer_layer_offset(megatron)
        stage = range(first, first + config.llm.layers // parallel_state.get_pipeline_model_parallel_world_size())
        self.decoder = TransformerBlock(
            megatron,
            block_submodules(config, stage, architecture.cross_attention),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.llm.hidden,
                config.llm.vocab,
                config=megatron,
                init_method=megatron.embedding_init_method if config.llm.tied else megatron.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=config.llm.tied,
            )

    def set_input_tensor(self, tensors) -> None:
        """Hidden states of the stage before (Megatron's pipeline schedules call this)."""
        self.decoder.set_input_tensor(tensors[0] if isinstance(tensors, list) else tensors)

    def embed(self, tokens: Tensor) -> Tensor:
        """Word embeddings [..., H] of ids [...]; placeholders and padding (negative ids) read entry 0."""
        return self.embedding.word_embeddings(tokens.clamp(min=0))

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [S, B, H] (split along S under sequence parallelism)."""
        check_placeholders(batch, self.tile_tokens)
        tiles_TKH = self.projector(batch.features)
        stream_SBH = None
        if self.pre_process:
            words_BSH = self.embed(batch.tokens)
            stream_SBH = self.fusion.stream(words_BSH, batch, tiles_TKH).transpose(0, 1).contiguous()
            if self.config.sequence_parallel:
                stream_SBH = tensor_parallel.scatter_to_sequence_parallel_region(stream_SBH)
        keys_XBH, unseen = self.fusion.keys(batch, tiles_TKH, self.embed)
        return self.decoder(
            stream_SBH,
            attention_mask=causal_mask(batch.sample),
            context=keys_XBH,
            context_mask=unseen,
            rotary_pos_emb=rotary_angles(batch.positions, self.llm.head_dim, self.llm.rope_theta),
        )

    def logits(self, hidden_SBH: Tensor) -> Tensor:
        """[S, B, vocabulary / tensor parallel size]."""
        weight = self.embedding.word_embeddings.weight if self.llm.tied else None
        return self.output_layer(hidden_SBH, weight=weight)[0]

    def forward(self, batch: Batch) -> Tensor:
        """Per-token loss [B, S], zero where there is no label; hidden states on stages before the last."""
        hidden_SBH = self.hidden(batch)
        if not self.post_process:
            return hidden_SBH
        trained_BS = batch.labels != IGNORE
        labels_SB = batch.labels.clamp(min=0).t().contiguous()
        loss_SB = tensor_parallel.vocab_parallel_cross_entropy(self.logits(hidden_SBH).float(), labels_SB)
        return loss_SB.t() * trained_BS

    @torch.no_grad()
    def next_tokens(self, batch: Batch, last_B: Tensor) -> Tensor:
        """The most likely token behind position `last_B[b]` of each row: ids [B]."""
        hidden_SBH = self.hidden(batch)
        if self.config.sequence_parallel:
            hidden_SBH = tensor_parallel.gather_from_sequence_parallel_region(hidden_SBH)
        rows = torch.arange(len(last_B), device=last_B.device)
        logits = self.logits(hidden_SBH[last_B, rows][None])
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits)[0].argmax(-1)


def parameter_group(name: str) -> str:
    """The module group that the parameter `name` of a VisionLanguageModel belongs to."""
    if name.startswith("projector."):
        return "projector"
    if name.startswith("fusion.") or ".cross_attention." in name or ".pre_cross_attn_layernorm." in name:
        return "xattn"
    return "llm"
