"""An encoder that learns: all ranks hold it whole, and sum its gradients over all ranks of all replicas.

Its optimizer is Megatron's, as the model's, but with groups of its own: alone where the model is split, all ranks where
gradients are summed. With the model's groups, it would miss gradients or count them twice, silently.
"""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import nn

from nvlm.config.values import Config
from nvlm.llm.backend import of_megatron
from nvlm.train.reduce import send_in_bf16


class LearningEncoder(MegatronModule):
    """The encoder under the names that its parameters have in a checkpoint."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(config=encoder.config)
        self.vision = encoder

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Its parameters, each of which all ranks have whole."""
        copy = (0, 0, dist.get_rank())
        return {
            name: ShardedTensor.from_rank_offsets(name, parameter, replica_id=copy)
            for name, parameter in self.named_parameters(prefix)
        }


def groups_of_encoder() -> ProcessGroupCollection:
    """The groups of a module that no rank splits, whose gradients all ranks sum."""
    alone, _ = dist.new_subgroups(group_size=1)
    everyone = parallel_state.get_intra_distributed_optimizer_instance_group()  # then its norm needs no second message
    of_one = dict.fromkeys("tp pp cp ep mp tp_ep_pp expt_dp expt_tp embd pos_embd".split(), alone)
    return ProcessGroupCollection(**of_one, dp=everyone, dp_cp=everyone, intra_dist_opt=everyone)


def wrap_encoder(encoder: nn.Module, config: Config, groups: ProcessGroupCollection) -> DistributedDataParallel:
    """The encoder in Megatron's DDP, with fp32 gradients of the sum of all losses, as the model has them.

    Nothing overlaps: gathering weights in the forward pass would hang where a rank has no tiles.
    """
    if config.train.recompute == "full":  # Megatron looks at these in each forward pass
        encoder.config.recompute_granularity, encoder.config.recompute_method = "full", "uniform"
        encoder.config.recompute_num_layers = 1
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
        check_for_nan_in_grad=False,  # train_step checks the norm
    )
    whole_sums = of_megatron(encoder.config, calculate_per_token_loss=True)
    module = LearningEncoder(encoder.requires_grad_(True))
    wrapped = DistributedDataParallel(whole_sums, ddp_config, module, pg_collection=groups)
    if config.gradients_in_bf16:
        send_in_bf16(wrapped)
    wrapped.broadcast_params()
    return wrapped
