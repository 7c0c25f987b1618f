"""The model that the three architectures share: one forward pass, batch -> per-token loss.

The language model is Megatron-Core's embedding, TransformerBlock and output layer, with a `Projector` for tiles. An
architecture decides whether projected tiles go into the text stream, into the cross-attended keys, or both.

Shapes: B rows, L tokens of a row, S columns computed on this context-parallel rank (L without context parallelism),
X keys, N tile tokens, C feature width, H model width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
from torch import Tensor, nn

from nvlm.arch.description import Description
from nvlm.arch.registry import tile_use
from nvlm.attention.cache import Past
from nvlm.attention.choice import Mode
from nvlm.attention.context import gather_columns, own_columns
from nvlm.attention.model import ModelAttention, build_attention
from nvlm.attention.rotary import rotary_angles, rotary_frequencies
from nvlm.config.values import Config, pipeline_layers
from nvlm.data.batch import IGNORE, Batch, check_placeholders
from nvlm.llm import backend
from nvlm.llm.backend import of_megatron
from nvlm.llm.build import FUSED_NORMS, block_submodules, llm_config
from nvlm.llm.dropout import remember_places
from nvlm.llm.layer import DecoderBlock, learns, project
from nvlm.llm.loss import token_losses
from nvlm.llm.norm import LayerNorm
from nvlm.processes.device import to_device
from nvlm.processes.groups import seeded

Project = Callable[[Tensor], Tensor]
"""Projects features [..., C] to the language model's width [..., H]."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture: its description and its code.

    `stream`: (words [B, S, H], batch, columns [S], project, vector at row ends [H] or None) -> the text stream's input
    [B, S, H]; None: words only.
    `keys`: builds the module (batch, project, embed) -> cross-attended keys [X, B, H]; None: no keys.
    """

    description: Description
    stream: Callable[[Tensor, Batch, Tensor, Project, Tensor | None], Tensor] | None
    keys: Callable[[TransformerConfig], nn.Module] | None
    cross_attention: ModuleSpec | None


class Projector(MegatronModule):
    """Features [..., C] to [..., H]. The architecture's description lists its modules.

    `row_end` [H]: the learned vector at the end of each row of a feature map; None if the run has no such maps.
    """

    def __init__(self, config: Config, kind: str) -> None:
        projector, llm = config.projector, llm_config(config)
        llm = of_megatron(
            llm,
            sequence_parallel=False,  # tiles are not split along the sequence
            gated_linear_unit=False,
            ffn_hidden_size=config.llm.hidden if projector.inner == "hidden" else config.llm.ffn,
            activation_func=nn.functional.gelu,
            bias_activation_fusion=False,  # Megatron's fused GELU is an approximation
            add_bias_linear=projector.bias,
            add_qkv_bias=False,
            perform_initialization=True,  # it may be new while other weights are loaded
        )
        super().__init__(config=llm)
        width = config.vision.feature_width
        self.norm = LayerNorm(llm, width, eps=1e-5) if projector.norm else nn.Identity()
        self.first: ColumnParallelLinear | None = None
        if kind == "deep":
            self.first = ColumnParallelLinear(
                width, width // 3, config=llm, init_method=llm.init_method, bias=projector.bias, gather_output=True
            )
            width //= 3
            self.first_norm = LayerNorm(llm, width, eps=1e-5)
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        self.layers = MultimodalProjector(llm, linears, "affine" if kind == "affine" else "mlp", width)
        end = torch.randn(config.llm.hidden, dtype=llm.params_dtype) * config.llm.hidden**-0.5
        self.row_end = nn.Parameter(end) if config.row_ends else None

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.norm(features.to(self.config.params_dtype))
        if self.first is not None:
            hidden = self.first_norm(nn.functional.gelu(self.first(hidden)[0]))
        return self.layers(hidden)


class VisionLanguageModel(MegatronModule):
    """One pipeline stage of the model; the whole model if there is one stage.

    `pipeline_stage` counts over all virtual stages. `others`: this process's other virtual stages; the projector and
    the norms of keys are shared with them.
    """

    def __init__(
        self,
        config: Config,
        architecture: Architecture,
        megatron: TransformerConfig,
        pipeline_stage: int = 0,
        others: Sequence[VisionLanguageModel] = (),
    ) -> None:
        super().__init__(config=megatron)
        self.model_type = ModelType.encoder_or_decoder  # needed by the pipeline schedules
        self.share_embeddings_and_output_weights = False  # nvlm.arch.pipeline sums tied gradients
        self.llm = config.llm
        self.pre_process, self.post_process = pipeline_stage == 0, pipeline_stage == config.parallel.pipeline_stages - 1
        self.architecture, self.use = architecture, tile_use(config, pipeline_stage)
        self.first_layer = pipeline_layers(config, pipeline_stage).start
        self.attention = {mode: build_attention(config, backend.this_machine(), mode) for mode in Mode}
        self.drops_inputs = bool(config.adapted) and config.peft.dropout > 0
        self.sums_keys = "xattn" not in config.adapted  # as arch.xattn.attention expects
        self.borrowed: Callable[[Tensor], Tensor] | None = None  # embeds tags on stages without the embedding
        virtual = pipeline_stage // config.parallel.pipeline if config.parallel.virtual > 1 else None
        self.register_buffer("frequencies", rotary_frequencies(config.llm), persistent=False)
        self.shared: dict[str, nn.Module] = {}  # a plain dict, so that modules owned by others are not registered here
        if self.use:
            kind = architecture.description.projector_kind(config.projector)
            with seeded(config.seed, "projector"):
                self._share("projector", others, lambda: Projector(config, kind))
        if self.use.keys:
            self._share("fusion", others, lambda: architecture.keys(megatron))
        if self.pre_process or (self.post_process and config.llm.tied):
            with seeded(config.seed, "embedding"):
                self.embedding = LanguageModelEmbedding(
                    megatron,
                    config.llm.padded_vocab,
                    config.llm.max_positions,
                    "rope",
                    scatter_to_sequence_parallel=False,
                )
        self.decoder = DecoderBlock(
            megatron,
            block_submodules(config, pipeline_layers(config, pipeline_stage), architecture.cross_attention),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            vp_stage=virtual,
        )
        if self.post_process:
            with seeded(config.seed, "output layer"):
                self.output_layer = ColumnParallelLinear(
                    config.llm.hidden,
                    config.llm.padded_vocab,
                    config=of_megatron(megatron, sequence_parallel=False),  # its input is gathered, selected positions
                    init_method=megatron.embedding_init_method if config.llm.tied else megatron.init_method,
                    bias=False,
                    gather_output=False,
                    skip_weight_param_allocation=config.llm.tied,
                )

    def _share(self, name: str, others: Sequence[VisionLanguageModel], build: Callable[[], nn.Module]) -> None:
        owner = next((other for other in others if name in other.shared), None)
        self.shared[name] = build() if owner is None else owner.shared[name]
        if owner is None:
            self.add_module(name, self.shared[name])

    def set_input_tensor(self, tensors) -> None:
        """Set the hidden states from the previous stage. Called by Megatron's pipeline schedules."""
        self.decoder.set_input_tensor(tensors[0] if isinstance(tensors, list) else tensors)

    def embed(self, tokens: Tensor) -> Tensor:
        """Word embeddings [..., H] of ids [...]; placeholders and padding (negative ids) read entry 0."""
        if self.borrowed is not None:
            return self.borrowed(tokens.clamp(min=0))
        return self.embedding.word_embeddings(tokens.clamp(min=0))

    def hidden(self, batch: Batch, past: Past | None = None) -> Tensor:
        """Last hidden states [S, B, H] (split along S under sequence parallelism).

        `past`: the batch holds only the newest column, without tile tokens; caches hold the columns before it. Not
        supported under context parallelism.
        """
        own_S = columns_S = slice(None)
        if past is not None:
            masks = self.attends(past).cached(past)
        else:
            check_placeholders(batch)
            own_S = own_columns(batch.tokens.shape[1])
            columns_S = to_device(own_S, batch.tokens.device)
            if self.drops_inputs and self.training:
                remember_places(batch.place[:, columns_S], batch.cross_place)
            masks = self.attends().masks(batch, columns_S, self.use.keys)
        return self.decoder(
            self._stream(batch, own_S, columns_S, tiles=self.use.stream and past is None) if self.pre_process else None,
            context=self._keys(batch) if self.use.keys and past is None else None,
            rotary_pos_emb=rotary_angles(batch.positions[:, columns_S], self.frequencies),
            attention_mask=None,
            packed_seq_params=masks,
        )

    def attends(self, past: Past | None = None) -> ModelAttention:
        """The attention kernels of the next forward pass."""
        return self.attention[Mode.CACHED if past is not None else Mode.TRAINING if learns(self) else Mode.EVALUATION]

    def _keys(self, batch: Batch) -> Tensor:
        keys_XBH = self.shared["fusion"](batch, self.shared["projector"], self.embed)
        # Each tensor-parallel rank has the gradients of its own heads.
        return tensor_parallel.copy_to_tensor_model_parallel_region(keys_XBH) if self.sums_keys else keys_XBH

    def _stream(self, batch: Batch, own_S: Tensor | slice, columns_S: Tensor | slice, tiles: bool) -> Tensor:
        # The same columns twice: `own_S` for the batch on the host, `columns_S` for this one.
        stream_BSH = self.embed(batch.tokens[:, columns_S])
        if tiles:
            projector = self.shared["projector"]
            stream_BSH = self.architecture.stream(stream_BSH, batch, own_S, projector, projector.row_end)
        stream_SBH = stream_BSH.transpose(0, 1).contiguous()
        if self.training and (self.config.recompute_granularity or self.config.cpu_offloading):
            # Recomputed layers pass gradients on only if their input requires one; offloading fails without.
            stream_SBH.requires_grad_()
        if self.config.sequence_parallel:
            stream_SBH = tensor_parallel.scatter_to_sequence_parallel_region(stream_SBH)
        return stream_SBH

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H], not split along the sequence, to [..., vocabulary / tensor parallel size]."""
        weight = self.embedding.word_embeddings.weight if self.llm.tied else None
        logits = project(self.output_layer, hidden, weight)
        columns = logits.shape[-1]
        real = self.llm.vocab - columns * parallel_state.get_tensor_model_parallel_rank()
        if real >= columns:
            return logits
        # Padding rows of the vocabulary are not tokens.
        return nn.functional.pad(logits[..., : max(real, 0)], (0, columns - max(real, 0)), value=-torch.inf)

    def weights(self) -> dict[str, Tensor]:
        """Parameters by their names in the unsplit model."""
        return {self.whole_name(name): parameter.data for name, parameter in self.named_parameters()}

    def whole_name(self, name: str) -> str:
        """The name of the parameter `name` in the unsplit model.

        Layers are numbered over all stages, and a norm fused into a linear gets the name of a separate norm.
        """
        for fused, norm in FUSED_NORMS.items():
            name = name.replace(fused, norm)
        return re.sub(r"(?<=^decoder\.layers\.)\d+", lambda m: str(int(m[0]) + self.first_layer), name)

    def forward(self, batch: Batch) -> Tensor:
        """Per-token loss [B, S], zero where there is no label; hidden states on all stages but the last."""
        arranged = self.attends().arranged(batch)
        losses = self._losses(arranged.batch)
        return arranged.restored(losses) if self.post_process else losses

    def _losses(self, batch: Batch) -> Tensor:
        """As `forward`, for rows that are already arranged."""
        hidden_SBH = self.hidden(batch)
        if not self.post_process:
            return hidden_SBH
        labels = batch.on_host.labels
        labels_SB = labels[:, own_columns(labels.shape[1]).to(labels.device)].t()
        # Answers are a small part of a row. Logits elsewhere would cost as much per token and take most of the memory.
        learned_N = (labels_SB != IGNORE).flatten().nonzero()[:, 0]
        labels_N = to_device(labels_SB.flatten()[learned_N], hidden_SBH.device)
        learned_N = to_device(learned_N, hidden_SBH.device)
        # Indexing would sort its indices in the backward pass.
        logits_N1V = self.logits(self._whole(hidden_SBH).flatten(0, 1).index_select(0, learned_N)[:, None])
        loss_N1 = token_losses(logits_N1V, labels_N[:, None])
        return loss_N1.new_zeros(labels_SB.numel()).index_put((learned_N,), loss_N1[:, 0]).view_as(labels_SB).t()

    def _whole(self, hidden_SBH: Tensor) -> Tensor:
        if not self.config.sequence_parallel:
            return hidden_SBH
        # The output layer already sums gradients over tensor-parallel ranks.
        return tensor_parallel.gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=False)

    def last_logits(self, hidden_SBH: Tensor, last_B: Tensor) -> Tensor:
        """Logits [B, vocabulary] at the computed column `last_B[b]` of each row. Last stage only."""
        hidden_LBH = gather_columns(self._whole(hidden_SBH))
        if len(hidden_LBH) > 1:
            hidden_LBH = hidden_LBH[last_B, torch.arange(len(last_B), device=last_B.device)][None]
        logits = self.logits(hidden_LBH)
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
        return logits[0]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's sharded state; for a parameter held by several stages, the first copy is written."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        copies = {name.split(".")[0]: getattr(p, "copy_number", 0) for name, p in self.named_parameters()}
        for name, entry in state.items():
            copy = copies.get(name.removeprefix(prefix).split(".")[0], 0)
            if copy:
                entry.replica_id = (copy, *entry.replica_id[1:])
        return state
