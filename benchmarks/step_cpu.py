"""Our training step compared with the same work in transformers' classes, on packed rows, on CPU.

    python benchmarks/step_cpu.py [--shapes tiny small] [--threads 1 2] [--pairs 7]

NVLM-D in fp32; language model and projector learn, and the frozen encoder's features are computed beforehand. A step
is forward and backward over its micro-batches, the gradient norm over all parameters, clipping to 1 and AdamW; ours
also counts tokens and checks the loss, as in a run. The peer is transformers' Qwen2ForCausalLM with torch's LayerNorm
and two linears as the projector, with the same initial weights, samples, positions and labels.

Where transformers leaves a choice, the peer gets the faster option, which is measured before the pairs: samples
separated by their positions (transformers then makes the mask) or by a mask made once per micro-batch; padded rows, or
all samples in one row without padding; logits of all columns, or only of those with a label; AdamW fused or foreach.

Both train in pairs of steps, alternating which goes first; their losses must stay within 1e-4 of each other. Figures
are medians; "ratio" is the median over pairs, above 1 if ours is faster.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from nvlm.commands import launch
from nvlm.commands.compose import compose_config
from nvlm.config.values import Config
from nvlm.data.batch import IGNORE, IMAGE, PAD, Batch, without_padding
from nvlm.data.loader import StepData
from nvlm.inputs.sources import projector_parts
from nvlm.processes import groups
from nvlm.train.loop import build_steps, build_trainer
from nvlm.train.step import Trainer, train_step
from nvlm.weights import llm
from nvlm.weights.parts import published

COMMON = """arch=decoder precision=fp32 data.records=200 data.questions=2 data.workers=0 optim.warmup=0
optim.min_lr=${optim.lr}""".split()
SHAPES = {
    "tiny": (),  # the preset: 4 layers of 128, 32 pages in rows of 120 tokens
    "small": """llm.layers=8 llm.hidden=512 llm.heads=8 llm.kv_heads=4 llm.head_dim=64 llm.ffn=1536 llm.vocab=16384
        llm.init_std=0.02 optim.lr=3e-4 data.seq_length=1024 data.row_length=1024 train.global_batch=20
        train.micro_batch=2""".split(),
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """Stands in for the frozen encoder when the features are already computed."""

    def encode(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches as they are."""
        return list(batches)


@dataclass(frozen=True, slots=True)
class Ways:
    """Options of transformers and torch."""

    masked: bool = True  # a mask tells the samples of a row apart; else transformers finds them by their positions
    line: bool = False  # all samples of a micro-batch in one row, without padding
    kept: bool = False  # logits of the columns with a label alone
    fused: bool = True  # else AdamW works on lists of tensors

    def __str__(self) -> str:
        mask, rows = "mask" if self.masked else "positions", "line" if self.line else "rows"
        return f"{mask}, {rows}, {'kept' if self.kept else 'all'}, {'fused' if self.fused else 'foreach'}"


class Peer(nn.Module):
    """Qwen2ForCausalLM with projected tiles instead of placeholders."""

    def __init__(self, config: Config, weights: dict[str, Tensor], ways: Ways) -> None:
        super().__init__()
        language, width = config.llm, config.vision.hidden * config.vision.downsample**2
        self.ways, self.multiple = ways, config.row_multiple
        self.llm = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=language.vocab,
                hidden_size=language.hidden,
                num_hidden_layers=language.layers,
                num_attention_heads=language.heads,
                num_key_value_heads=language.kv_heads,
                head_dim=language.head_dim,
                intermediate_size=language.ffn,
                rms_norm_eps=language.norm_eps,
                rope_parameters={"rope_theta": language.rope_theta, "rope_type": "default"},
                max_position_embeddings=language.max_positions,
                tie_word_embeddings=False,
                use_cache=False,
                attn_implementation="sdpa",
            )
        )
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(width, eps=1e-5),
            nn.Linear(width, language.ffn, bias=False),
            nn.GELU(),
            nn.Linear(language.ffn, language.hidden, bias=False),
        )
        names = {name: name if name.startswith("mlp1.") else f"llm.{name}" for name in weights}
        self.load_state_dict({names[name]: value for name, value in weights.items()})

    def forward(self, batch: Batch, trained: int) -> Tensor:
        """This micro-batch's share of the step's mean loss."""
        if self.ways.line:
            batch, _ = without_padding(batch, self.multiple)
        columns = (batch.labels != IGNORE).any(0).nonzero()[:, 0] if self.ways.kept else slice(None)
        words = self.llm.get_input_embeddings()(batch.tokens.clamp(min=0))
        tiles = self.mlp1(batch.features_of(batch.stream_rows))
        return self.llm(
            inputs_embeds=words.masked_scatter((batch.tokens == IMAGE)[..., None], tiles),
            position_ids=batch.positions,
            attention_mask=block_diagonal(batch.sample) if self.ways.masked else None,
            logits_to_keep=columns if self.ways.kept else 0,
            labels=batch.labels[:, columns],
            shift_labels=batch.labels[:, columns],
            num_items_in_batch=trained,
        ).loss


def block_diagonal(sample_BS: Tensor) -> Tensor:
    """[B, 1, S, S], True for visible pairs; padding sees itself, because transformers cannot have empty rows."""
    same = (sample_BS[:, :, None] == sample_BS[:, None, :]) & (sample_BS != PAD)[:, None]
    itself = torch.eye(sample_BS.shape[1], dtype=torch.bool)
    return (same.tril() | itself)[:, None]


def adamw(model: nn.Module, config: Config, fused: bool) -> torch.optim.AdamW:
    """AdamW with Megatron's parameter groups: no weight decay for one-dimensional parameters."""
    optim = config.optim
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=fused,
        foreach=not fused,
    )


def peer_step(model: Peer, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], clip: float) -> float:
    """One step of the peer; returns the mean loss."""
    optimizer.zero_grad(set_to_none=True)
    trained = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(batch, trained)
        loss.backward()
        total += float(loss)
    nn.utils.clip_grad_norm_(model.parameters(), clip, foreach=True)
    optimizer.step()
    return total


def timed(step) -> tuple[float, float]:
    """Seconds, and the result of `step`."""
    began = time.perf_counter()
    loss = step()
    return time.perf_counter() - began, loss


def quickest(config: Config, weights: dict[str, Tensor], steps: Sequence[StepData]) -> Ways:
    """The peer's fastest options, chosen one after another on the same steps."""

    def seconds(ways: Ways) -> float:
        model = Peer(config, weights, ways)
        optimizer = adamw(model, config, ways.fused)
        return min(timed(lambda d=d: peer_step(model, optimizer, d.micro_batches, config.optim.clip))[0] for d in steps)

    best = Ways()
    least = seconds(best)
    for choice in ("masked", "line", "kept", "fused"):
        other = replace(best, **{choice: not getattr(best, choice)})
        if (took := seconds(other)) < least:
            best, least = other, took
    return best


def encoded_steps(config: Config, trainer: Trainer, count: int) -> list[StepData]:
    """The run's first steps with their features."""
    steps = build_steps(config)
    found = [steps[number] for number in range(count)]
    with torch.no_grad():
        return [replace(d, micro_batches=tuple(trainer.vision.encode(d.micro_batches))) for d in found]


def weights_of(trainer: Trainer, config: Config) -> dict[str, Tensor]:
    """A copy of the model's weights under their published names."""
    (part,) = trainer.pipeline.parts
    return copy.deepcopy(published([*llm.parts(config.llm), *projector_parts(config)], part.weights()))


def measure(shape: str, threads: int, pairs: int) -> tuple[list[str], bool]:
    """A row of the table, and whether the losses agree."""
    config = compose_config(*COMMON, *SHAPES[shape], f"train.threads={threads}", f"train.steps={pairs + 1}")
    with groups.distributed(config.parallel, config.seed, threads) as device:
        trainer = build_trainer(config, device)
        steps = encoded_steps(config, trainer, pairs + 1)
        trainer = replace(trainer, vision=Encoded())
        weights = weights_of(trainer, config)
        ways = quickest(config, weights, steps[:3])
        model = Peer(config, weights, ways)
        optimizer = adamw(model, config, ways.fused)
        ours, theirs, worst = [], [], 0.0
        for number, data in enumerate(steps):
            runs = [
                (ours, lambda data=data: train_step(trainer, data).loss),
                (theirs, lambda data=data: peer_step(model, optimizer, data.micro_batches, config.optim.clip)),
            ]
            losses = []
            for times, step in runs if number % 2 else reversed(runs):
                seconds, loss = timed(step)
                times.append(seconds)
                losses.append(loss)
            worst = max(worst, abs(losses[0] - losses[1]) / abs(losses[1]))
    tokens = [sum(batch.num_tokens for batch in data.micro_batches) for data in steps]
    first = steps[0].micro_batches
    rates = [statistics.median(n / t for n, t in zip(tokens[1:], times[1:], strict=True)) for times in (theirs, ours)]
    ratio = statistics.median(b / a for a, b in zip(ours[1:], theirs[1:], strict=True))  # the first pair warms up
    layout = f"{len(first)} x {first[0].tokens.shape[0]} x {first[0].tokens.shape[1]}"
    row = [shape, threads, layout, str(ways), f"{rates[0]:.0f}", f"{rates[1]:.0f}", f"{ratio:.2f}x", f"{worst:.0e}"]
    return [str(cell) for cell in row], worst < 1e-4


def main() -> int:
    """Print the table; returns 1 if the losses diverge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    launch.quiet()
    print("| shape | threads | micro-batches x rows x columns | peer | its tokens/s | ours | ratio | losses apart |")
    print("|---|---|---|---|---|---|---|---|")
    good = True
    for shape, threads in itertools.product(options.shapes, options.threads):
        row, same = measure(shape, threads, options.pairs)
        good &= same
        print(f"| {' | '.join(row)} |", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
