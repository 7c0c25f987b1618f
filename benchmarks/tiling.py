"""Images per second from a decoded Pillow image to tiles: ours and two peers, on one thread, in one run.

    python benchmarks/tiling.py [--rounds 9]

Peers: the published code (Pillow resize, ToTensor, Normalize per tile) and Hugging Face's torchvision processor with
the same tiling (GotOcr2ImageProcessor). Both return normalised float32. Our loader returns uint8 and leaves
normalisation to the encoder's device; the rows "+ normalize" compare like with like.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision import transforms
from transformers import GotOcr2ImageProcessor

from nvlm.tiling import choose_grid, normalize, plan_tiles, tile_image
from nvlm.vision.encoders.internvit.description import INTERNVIT

SIZES = ((640, 480), (1024, 768), (1920, 1080), (1654, 2339), (3000, 500))
TILE = 448
MAX_TILES = 6

_to_float = transforms.Compose([transforms.ToTensor(), transforms.Normalize(INTERNVIT.mean, INTERNVIT.std)])
_hf = GotOcr2ImageProcessor(
    size={"height": TILE, "width": TILE},
    image_mean=INTERNVIT.mean,
    image_std=INTERNVIT.std,
    crop_to_patches=True,
    min_patches=1,
    max_patches=MAX_TILES,
)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """RGB image with features of photographs and documents: smooth shading, grain, sharp lines of text."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for y in range(10, height, 40):
        draw.text((width // 8, y), f"Line {y}: the quick brown fox jumps over the lazy dog. " * 4, fill=(20, 20, 20))
    grain = rng.normal(0, 4, (height, width, 3))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def published(image: Image.Image) -> torch.Tensor:
    """float32 tiles from the published code."""
    image = image.convert("RGB")
    cols, rows = choose_grid(*image.size, MAX_TILES, TILE)
    resized = image.resize((cols * TILE, rows * TILE))
    corners = [((k % cols) * TILE, (k // cols) * TILE) for k in range(cols * rows)]
    tiles = [resized.crop((x, y, x + TILE, y + TILE)) for x, y in corners]
    if len(tiles) != 1:
        tiles.append(image.resize((TILE, TILE)))
    return torch.stack([_to_float(tile) for tile in tiles])


def hugging_face(image: Image.Image) -> torch.Tensor:
    """float32 tiles from the transformers processor."""
    return _hf(image, return_tensors="pt")["pixel_values"]


def ours(image: Image.Image, resize: str) -> torch.Tensor:
    """uint8 tiles, as returned by the loader."""
    return tile_image(image, plan_tiles(*image.size, MAX_TILES, TILE), resize)


def ours_normalized(image: Image.Image, resize: str) -> torch.Tensor:
    """float32 tiles, as returned by the peers."""
    return normalize(ours(image, resize), INTERNVIT.mean, INTERNVIT.std)


ROWS: dict[str, Callable[[Image.Image], torch.Tensor]] = {
    "published (float32)": published,
    "Hugging Face (float32)": hugging_face,
    "exact (uint8)": partial(ours, resize="exact"),
    "exact + normalize (float32)": partial(ours_normalized, resize="exact"),
    "fast (uint8)": partial(ours, resize="fast"),
    "fast + normalize (float32)": partial(ours_normalized, resize="fast"),
}


def check(images: list[Image.Image]) -> None:
    """Fail unless all rows make the same tiles: exact bit for bit, the others within 2 levels of 255."""
    std = torch.tensor(INTERNVIT.std).view(3, 1, 1)
    for image in images:
        want = published(image)
        assert torch.equal(ours_normalized(image, "exact"), want), image.size
        for name in ("Hugging Face (float32)", "fast + normalize (float32)"):
            levels = (ROWS[name](image) - want) * std * 255
            assert levels.shape == want.shape and levels.abs().max() < 2.5, (name, image.size)


def measure(images: list[Image.Image], rounds: int) -> dict[str, list[float]]:
    """Median seconds per image, for every row and image size; rows take turns within each round."""
    times: dict[str, list[list[float]]] = {name: [[] for _ in images] for name in ROWS}
    for _ in range(rounds + 1):
        for index, image in enumerate(images):
            for name, row in ROWS.items():
                start = time.perf_counter()
                row(image)
                times[name][index].append(time.perf_counter() - start)
    # The first round warms up allocators and lazy imports.
    return {name: [statistics.median(seen[1:]) for seen in sizes] for name, sizes in times.items()}


def table(seconds: dict[str, list[float]]) -> str:
    """Images per second by size and over all sizes, with the ratio of each row to the two peers."""
    total = {name: sum(times) for name, times in seconds.items()}
    heads = [f"{width}x{height}" for width, height in SIZES]
    lines = [f"{'images/s':28}" + "".join(f"{head:>11}" for head in (*heads, "all", "/published", "/HF"))]
    for name, times in seconds.items():
        rates = [1 / t for t in times] + [len(times) / total[name]]
        ratios = [total["published (float32)"] / total[name], total["Hugging Face (float32)"] / total[name]]
        lines.append(f"{name:28}" + "".join(f"{r:11.1f}" for r in rates) + "".join(f"{r:10.2f}x" for r in ratios))
    return "\n".join(lines)


def main() -> None:
    """Check, measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    images = [picture(*size) for size in SIZES]
    check(images)
    sys.stdout.write(table(measure(images, rounds)) + "\n")
    sys.stdout.write(
        f"One thread, medians of {rounds} interleaved rounds, at most {MAX_TILES} tiles of {TILE} px.\n"
        "uint8 rows leave normalisation to the encoder's device; + normalize rows do it here, as peers do.\n"
    )


if __name__ == "__main__":
    main()
