"""The vision pre-pass compared with the encoder in the first pipeline stage, and global balancing with none.

    python benchmarks/vision_prepass.py

Two processes with one thread each. In one run and on the same batches:

- pipeline 2, NVLM-D: the pre-pass, compared with a first stage that encodes each micro-batch's tiles in its forward
  step, like Megatron-LM's LLaVA. The encoder's depth is chosen so that it costs as much as one stage of the language
  model (forward and backward); by work alone (2 to 1.5), the pre-pass can gain 1.33x. Then the same with an encoder
  that learns, and the largest difference between its gradients in the two.
- data 2, NVLM-X, seven tiles per sample on one replica and one on the other: vision.balance=global compared with
  replica. The encoder's seven tiles cost 1, 2 and 4 times the language model's forward and backward.

Medians over several steps. Idle: the share of a step that a process spends waiting in communication.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

MICRO_BATCHES = 12
BASE = """precision=fp32 llm.layers=4 llm.hidden=256 llm.heads=8 llm.kv_heads=4 llm.head_dim=32 llm.ffn=704
vision.hidden=128 vision.heads=4 vision.ffn=512 vision.tile_size=112 tiling.tag=1d train.threads=1
data.seq_length=400 optim.warmup=0""".split()


def main(words: list[str]) -> None:
    port, workers = str(random.randrange(10_000, 30_000)), []
    for rank in range(2):
        env = os.environ | dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        env |= dict(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
        workers.append(subprocess.Popen([sys.executable, __file__, "--worker", *words], env=env))
    sys.exit(max(worker.wait() for worker in workers))


def worker(pipeline_alone: bool, steps: int) -> None:
    """The comparisons, on one of the two ranks."""
    from nvlm.commands.launch import quiet

    quiet()
    depth = measured_depth(1.0, "arch=decoder", tiles=7, stages=2)
    rows = [pipeline_row(depth, steps), pipeline_row(depth, steps, learns=True)]
    for cost in () if pipeline_alone else (1.0, 2.0, 4.0):
        depth = measured_depth(cost, "arch=xattn", tiles=7, stages=1)
        rows.append(balance_row(depth, steps, cost))
    if os.environ["RANK"] == "0":
        for row in rows:
            print(json.dumps(row))


# --- the two comparisons ---


def pipeline_row(depth: int, steps: int, learns: bool = False) -> dict:
    """Pipeline 2: samples/s with the pre-pass and with the encoder in the first stage, and their ratio."""
    from nvlm.train.step import forward_backward

    words = ["arch=decoder", f"vision.layers={depth}", f"stage.train_vision={str(learns).lower()}"]
    with trainer_of(words, pipeline=2) as (trainer, config):
        batches = make_batches(config, [7] * MICRO_BATCHES)
        ours = lambda: forward_backward(trainer, batches)  # noqa: E731
        theirs = lambda: encoder_in_first_stage(trainer, batches)  # noqa: E731
        name = "pipeline 2, NVLM-D" + (", an encoder that learns" if learns else "")
        row = compare(name, "encoder in stage 1", theirs, "pre-pass", ours, len(batches), depth, steps)
        return row | ({"gradients_differ_by": differ(trainer, theirs, ours)} if learns else {})


def differ(trainer, theirs: Callable, ours: Callable) -> float:
    """Largest difference between the encoder's gradients, in units of the largest value."""
    found = []
    for run in (theirs, ours):
        run()
        found.append([p.main_grad.clone() for p in trainer.encoder.module.parameters()])
    largest = max(float(gradient.abs().max()) for gradient in found[0])
    return max(float((one - other).abs().max()) for one, other in zip(*found, strict=True)) / largest


def balance_row(depth: int, steps: int, cost: float) -> dict:
    """Data 2, seven tiles on one replica and one on the other: samples/s with and without global balancing."""
    from nvlm.train.step import forward_backward

    with trainer_of(["arch=xattn", f"vision.layers={depth}", "vision.balance=global"], data=2) as (trainer, config):
        tiles = 7 if os.environ["RANK"] == "0" else 1
        batches = make_batches(config, [tiles] * MICRO_BATCHES)
        alone = replace(trainer, vision=trainer.vision.within_replica())
        return compare(
            f"data 2, NVLM-X, seven tiles beside one, encoder {cost:g}x",
            "each replica its own",
            lambda: forward_backward(alone, batches),
            "global balance",
            lambda: forward_backward(trainer, batches),
            2 * len(batches),
            depth,
            steps,
        )


def encoder_in_first_stage(trainer, batches) -> None:
    """A step in which only the first stage's forward encodes each micro-batch's tiles, and keeps what its backward pass
    needs if the encoder learns."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from nvlm.train.step import sum_loss

    first, path = parallel_state.is_pipeline_first_stage(), trainer.vision.path

    def encoded(batch):
        if trainer.encoder is None:
            return path.encode(batch)
        return batch.with_features(path.differentiable(batch.pixels, batch.tile_tokens))

    def forward(iterator, model):
        batch = next(iterator)
        return model(encoded(batch) if first else batch), lambda loss: sum_loss(batch, loss)

    for wrapped in trainer.wrapped:
        wrapped.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(batches),
        model=list(trainer.chunks),
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=False,
    )
    if trainer.encoder is not None:
        trainer.encoder.finish_grad_sync()


def compare(
    name: str, peer: str, theirs: Callable, own: str, ours: Callable, samples: int, depth: int, steps: int
) -> dict:
    """Medians of the two, measured alternately so that noise affects both alike."""
    import torch
    import torch.distributed as dist

    seconds: dict[str, list] = {peer: [], own: []}
    idle: dict[str, list] = {peer: [], own: []}
    for step in range(steps + 1):
        for label, run in ((peer, theirs), (own, ours)):
            dist.barrier()
            start = time.perf_counter()
            with waiting() as waited:
                run()
            own_time = time.perf_counter() - start
            dist.barrier()
            if step:  # the first warms up
                seconds[label].append(time.perf_counter() - start)
                idle[label].append((sum(waited) + time.perf_counter() - start - own_time) / seconds[label][-1])
    result = {"case": name, "encoder_layers": depth}
    for label in (peer, own):
        shares: list = [None, None]
        dist.all_gather_object(shares, statistics.median(idle[label]))
        result[label] = {
            "samples_per_second": round(samples / statistics.median(seconds[label]), 2),
            "idle_by_process": [round(share, 2) for share in shares],
        }
    ratios = torch.tensor([a / b for a, b in zip(seconds[peer], seconds[own], strict=True)])
    return result | {"ratio": round(float(ratios.median()), 2)}


@contextmanager
def waiting():
    """Yields a list that collects the seconds spent in communication."""
    import torch.distributed as dist
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    seconds: list[float] = []

    def timed(function):
        def run(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds.append(time.perf_counter() - start)

        return run

    before = P2PCommunicator._communicate, dist.all_to_all_single
    P2PCommunicator._communicate, dist.all_to_all_single = timed(before[0]), timed(before[1])
    # The encoder runs between two exchanges with other replicas, so they are timed one by one.
    try:
        yield seconds
    finally:
        P2PCommunicator._communicate, dist.all_to_all_single = before


# --- set-up ---


@contextmanager
def trainer_of(overrides: list[str], **sizes):
    """A trainer with random weights in the given layout."""
    import tempfile

    from safetensors.torch import save_file

    from nvlm.commands.compose import compose_config
    from nvlm.processes.groups import distributed
    from nvlm.train.loop import build_trainer
    from nvlm.vision.encoders.internvit import description as internvit
    from nvlm.vision.encoders.internvit.model import InternViT
    from nvlm.vision.path import solo_groups
    from nvlm.weights.parts import published

    # A separate port for each, because the previous groups' store may still be closing.
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    layout = [f"parallel.{key}={size}" for key, size in sizes.items()]
    config = compose_config(*BASE, *overrides, *layout, "init.vision=null")
    with distributed(config.parallel, config.seed, threads=1) as device, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tower.safetensors"
        state = {name: p.data for name, p in InternViT(config, solo_groups()).named_parameters()}
        save_file(published(internvit.parts(config.vision), state), path)
        config = replace(config, init=replace(config.init, vision=str(path)))
        yield build_trainer(config, device), config


def make_batches(config, tiles: list[int]) -> list:
    """One micro-batch of one sample for each number of tiles (7: six and a thumbnail; 1: one)."""
    import numpy as np
    from PIL import Image

    from nvlm.arch import registry
    from nvlm.data.outline import build_processor
    from nvlm.data.pack import collate
    from nvlm.data.record import Record
    from nvlm.data.samples import encode

    processor = build_processor(config, registry.placement_rule(config.arch.name))
    side, generator = config.vision.tile_size, np.random.default_rng(0)
    batches = []
    for number, count in enumerate(tiles):
        shape = (2 * side, 3 * side, 3) if count == 7 else (side, side, 3)
        picture = Image.fromarray(generator.integers(256, size=shape, dtype=np.uint8))
        talk = [{"role": "user", "content": "<image> what is it?"}, {"role": "assistant", "content": "one two " * 12}]
        sample = encode(Record(str(number), talk, [picture]), processor)
        assert len(sample.pixels) == count
        batches.append(collate([[sample]], side, config.row_multiple))
    return batches


def measured_depth(cost: float, arch: str, tiles: int, stages: int) -> int:
    """Number of encoder layers for which `tiles` tiles cost `cost` times one of the `stages` language model stages."""
    import torch
    import torch.distributed as dist

    from nvlm.train.step import forward_backward

    probe = 16
    with trainer_of([arch, f"vision.layers={probe}"], data=2) as (trainer, config):
        batches = make_batches(config, [tiles] * 2)
        pixels = batches[0].pixels

        def both() -> None:
            forward_backward(trainer, batches)

        def encoder() -> None:
            for _ in batches:
                trainer.vision.path.features(pixels)

        whole, encode = (median_seconds(run) for run in (both, encoder))
        depth = torch.tensor(cost * (whole - encode) / stages / (encode / probe))
        dist.all_reduce(depth)
    return max(1, round(float(depth) / 2))


def median_seconds(run: Callable, repeats: int = 5) -> float:
    """Median seconds of `run`, after one warm-up call."""
    run()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--pipeline", action="store_true", help="only the comparisons with pipeline stages")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each comparison (default: 7)")
    asked = parser.parse_args()
    worker(asked.pipeline, asked.steps) if asked.worker else main(sys.argv[1:])
