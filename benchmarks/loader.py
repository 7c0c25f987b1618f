"""From JPEG and PNG bytes to tiles, on one thread, in one run: ours and Hugging Face's; and a step's wait for its data.

    python benchmarks/loader.py [--rounds 9] [--steps 12]

The peer is Hugging Face's torchvision processor with the same tiling (GotOcr2ImageProcessor) behind torchvision's JPEG
decoder; it returns normalised float32. Our rows are what a loader worker does: the header is checked, then uint8 tiles.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tiling import MAX_TILES, SIZES, TILE, hugging_face, picture
from torchvision.io import ImageReadMode, decode_jpeg

from nvlm.commands.compose import compose_config
from nvlm.data.images import decode_draft, decode_image
from nvlm.data.loader import load_steps
from nvlm.processes.groups import distributed
from nvlm.tiling import TilePlan, plan_tiles, tile_image
from nvlm.tiling.pixels import decode_jpeg as jpeg_by_torchvision
from nvlm.tiling.pixels import draft_size
from nvlm.train.loop import build_steps, build_trainer
from nvlm.train.step import train_step

LARGE = (4000, 3000)
MAX_PIXELS = 50_000_000
PEER = "Hugging Face (float32)"
TRAINING = ("data=jsonl", "train.global_batch=4", "train.micro_batch=2", "llm.layers=8", "llm.hidden=256",
            "llm.ffn=1024", "train.threads=1", "data.window=1", "optim.warmup=1", "tiling.resize=draft")  # fmt: skip


def encoded(image: Image.Image, kind: str) -> bytes:
    """The image as a file of `kind`; JPEG of quality 90 with halved chroma, as cameras write it."""
    data = io.BytesIO()
    image.save(data, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return data.getvalue()


def plan_of(data: bytes) -> TilePlan:
    """The grid, from the header, which costs microseconds."""
    with Image.open(io.BytesIO(data)) as header:
        return plan_tiles(*header.size, MAX_TILES, TILE)


def decoded(data: bytes, resize: str) -> Image.Image | torch.Tensor:
    """The decoded image, as in nvlm.data.samples."""
    if resize == "draft":
        return decode_draft(data, MAX_PIXELS, draft_size(plan_of(data)), jpeg_by_torchvision)
    return decode_image(data, MAX_PIXELS)


def ours(data: bytes, resize: str) -> torch.Tensor:
    """uint8 tiles, as in nvlm.data.samples."""
    return tile_image(decoded(data, resize), plan_of(data), resize)


def reduced(data: bytes) -> Image.Image:
    """The image decoded by Pillow, at a reduced size if it is large enough for that."""
    return decode_draft(data, MAX_PIXELS, draft_size(plan_of(data)), lambda data, size: None)


def torchvision_decoded(data: bytes) -> torch.Tensor:
    """uint8 [3, h, w] by torchvision."""
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


ROWS: dict[str, Callable[[bytes], object]] = {
    "decode: Pillow": partial(decoded, resize="fast"),
    "decode: Pillow, reduced": reduced,
    "decode: torchvision": torchvision_decoded,
    PEER: lambda data: hugging_face(torchvision_decoded(data)),
    "exact (uint8)": partial(ours, resize="exact"),
    "fast (uint8)": partial(ours, resize="fast"),
    "draft (uint8)": partial(ours, resize="draft"),
}


def measure(files: Sequence[bytes], rows: Mapping[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Median seconds of the processor per image, for every row and file; rows take turns within each round."""
    times: dict[str, list[list[float]]] = {name: [[] for _ in files] for name in rows}
    for _ in range(rounds + 1):
        for index, data in enumerate(files):
            for name, row in rows.items():
                start = time.thread_time()  # of this thread alone: other processes on the machine do not count
                row(data)
                times[name][index].append(time.thread_time() - start)
    return {name: [statistics.median(seen[1:]) for seen in of_file] for name, of_file in times.items()}


def table(title: str, seconds: Mapping[str, Sequence[float]], cell: Callable[[str, int], str]) -> str:
    """One line per row, one column per size."""
    heads = [f"{width}x{height}" for width, height in (*SIZES, LARGE)]
    lines = [f"{title:28}" + "".join(f"{head:>16}" for head in heads)]
    lines += [f"{name:28}" + "".join(f"{cell(name, i):>16}" for i in range(len(heads))) for name in seconds]
    return "\n".join(lines) + "\n"


def speed(files: Sequence[bytes], rounds: int) -> str:
    """Milliseconds per JPEG, and how many times as fast as the peer."""
    seconds = measure(files, ROWS, rounds)

    def cell(name: str, size: int) -> str:
        ratio = f" {seconds[PEER][size] / seconds[name][size]:.2f}x" if "uint8" in name else ""
        return f"{1000 * seconds[name][size]:.1f}{ratio}"

    return table("ms a JPEG", seconds, cell)


def by_kind(files: Mapping[str, Sequence[bytes]], rounds: int) -> str:
    """Images per second on one core, by the kind of file and the value of tiling.resize."""
    found: dict[str, list[float]] = {}
    for kind, of_kind in files.items():
        rows = {f"{kind}, {resize}": partial(ours, resize=resize) for resize in ("exact", "fast", "draft")}
        found |= measure(of_kind, rows, rounds)
    return table("images/s a core", found, lambda name, size: f"{1 / found[name][size]:.1f}")


def differences(files: Sequence[bytes]) -> str:
    """How far fast and draft are from exact: mean and largest levels of 255, share of values off by more than 2."""
    exact = [ours(data, "exact").int() for data in files]
    found = {
        resize: [(ours(data, resize) - want).abs() for data, want in zip(files, exact, strict=True)]
        for resize in ("fast", "draft")
    }

    def cell(name: str, size: int) -> str:
        levels = found[name][size]
        return f"{levels.float().mean():.3f} {int(levels.max())} {100 * (levels > 2).float().mean():.1f}%"

    return table("levels: mean, largest, > 2", found, cell)


def write_records(folder: Path, count: int) -> Path:
    """JPEG files of the smaller sizes, and a conversation about each."""
    lines = []
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(encoded(picture(*SIZES[number % 3], seed=number), "JPEG"))
        talk = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A page of lines."}]
        lines.append(json.dumps({"messages": talk, "images": [f"{number}.jpg"]}))
    (folder / "records.jsonl").write_text("\n".join(lines))
    return folder / "records.jsonl"


def waiting(steps: int) -> str:
    """Seconds of a training step and its wait for data, without loader workers and with one."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_records(Path(folder), 12)
        for workers in (0, 1):
            config = compose_config(f"data.path={path}", f"train.steps={steps}", f"data.workers={workers}", *TRAINING)
            waited, computed = one_run(config)
            share = statistics.median(w / (w + c) for w, c in zip(waited, computed, strict=True))
            wait, images = statistics.median(waited), config.train.global_batch
            lines.append(
                f"data.workers={workers}: {images / statistics.median(computed):.0f} images/s are used, "
                + (f"one core prepares {images / wait:.0f}; " if workers == 0 else "")
                + f"{1000 * wait:.1f} ms waiting for data, {share:.1%} of a step\n"
            )
    return "".join(lines)


def one_run(config) -> tuple[list[float], list[float]]:
    """Seconds of waiting and of computing in each step after the first, which warms up."""
    waited, computed = [], []
    with distributed(config.parallel, config.seed, threads=1) as device:
        trainer, loader = build_trainer(config, device), load_steps(build_steps(config), 0, config.data.workers)
        for _ in range(config.train.steps):
            begun = time.perf_counter()
            data = next(loader)
            came = time.perf_counter()
            train_step(trainer, data)
            waited.append(came - begun)
            computed.append(time.perf_counter() - came)
    return waited[1:], computed[1:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=12, help="steps of each training run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pictures = [picture(*size) for size in (*SIZES, LARGE)]
    files = {kind: [encoded(image, kind) for image in pictures] for kind in ("JPEG", "PNG")}
    write = sys.stdout.write
    write(f"One thread, medians of {options.rounds} interleaved rounds, at most {MAX_TILES} tiles of {TILE} px.\n")
    write(speed(files["JPEG"], options.rounds) + "\n")
    write(by_kind(files, max(1, options.rounds // 3)) + "\n")
    write(differences(files["JPEG"]) + "\n")
    write(waiting(options.steps))


if __name__ == "__main__":
    main()
