"""Train a tiny encoder on scikit-learn's digits and write its file in nvlm/vision.

    python launch/pretrain_tiny_encoder.py vision=tiny train.steps=2000          (InternViT)
    python launch/pretrain_tiny_encoder.py vision=clip-tiny train.steps=2000
    python launch/pretrain_tiny_encoder.py vision=siglip-tiny train.steps=1000

The task is to classify each cell of a tile (0-9 or blank) from the features of the patches that 2 x 2 pooling joins
into one visual token; the linear classifier is discarded. Only the training pool of scans is used. The module trained
here is the one that later serves as the encoder; the file uses the tensor names of published encoders of its family.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from nvlm.commands.compose import compose_config
from nvlm.config.values import VisionConfig
from nvlm.data.sources.pages import CELLS, TILE, digit_pool, draw_digit, on_paper
from nvlm.processes import groups
from nvlm.tiling import normalize
from nvlm.vision.encoders.registry import description_of
from nvlm.vision.path import solo_groups
from nvlm.vision.pooling import pooled
from nvlm.weights.parts import published

BLANK = 10  # the class of a cell without a digit
BATCH, LEARNING_RATE = 32, 3e-3


def draw_tile(split: str, rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A tile uint8 [side, side, 3] with digits in a random share of its cells, and the cells' classes."""
    scans, labels = digit_pool(split)
    zoom = rng.uniform(0.75, 1.3) * np.exp(rng.uniform(-0.06, 0.06, 2))
    cell = TILE / CELLS * zoom
    ink = np.zeros((round(CELLS * cell[1]), round(CELLS * cell[0])), np.float32)
    filled = rng.random((CELLS, CELLS)) < rng.uniform(0.1, 0.7)
    classes = np.full((CELLS, CELLS), BLANK)
    for row, col in np.argwhere(filled):
        scan = rng.integers(len(labels))
        classes[row, col] = labels[scan]
        at = (np.array([col, row]) + 0.5) * cell + rng.uniform(-3.5, 3.5, 2) * zoom
        size = rng.uniform(0.75, 1.05) * np.array([rng.uniform(0.8, 1.05), 1]) * cell
        draw_digit(ink, scans[scan], tuple(at), tuple(size), rng)
    return np.asarray(on_paper(ink, rng).resize((side, side))), classes


def draw_tiles(split: str, count: int, seed: int, side: int) -> tuple[Tensor, Tensor]:
    """Pixels uint8 [T, 3, side, side] and classes [T, CELLS, CELLS]."""
    tiles, classes = zip(*(draw_tile(split, np.random.default_rng([seed, i]), side) for i in range(count)), strict=True)
    return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(classes))


def shuffle_cells(pixels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Roll a batch of tiles by whole cells, so that every scan is seen in every position."""
    down, right = torch.randint(CELLS, (2,)).tolist()
    cell = pixels.shape[-1] / CELLS
    return pixels.roll((round(down * cell), round(right * cell)), (2, 3)), classes.roll((down, right), (1, 2))


class Classifier(nn.Module):
    """An encoder and a linear classifier of cells: uint8 [T, 3, px, px] to logits [T, CELLS * CELLS, classes]."""

    def __init__(self, encoder: nn.Module, vision: VisionConfig) -> None:
        super().__init__()
        self.encoder, self.known = encoder, description_of(vision)
        self.head = nn.Linear(4 * vision.hidden, BLANK + 1)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.encoder(normalize(pixels, self.known.mean, self.known.std))
        return self.head(pooled(patches, 2, "concat", pads=True))


def accuracy(model: Classifier, pixels: Tensor, classes: Tensor) -> tuple[float, float]:
    """Share of correct cells, for digits and for blanks."""
    with torch.no_grad():
        right = model(pixels).argmax(-1) == classes.flatten(1)
    blank = classes.flatten(1) == BLANK
    return right[~blank].float().mean().item(), right[blank].float().mean().item()


def train(model: Classifier, side: int, steps: int, start: float) -> None:
    """Train cell classification; prints the accuracy on held-out scans regularly."""
    pixels, classes = draw_tiles("train", 6000, seed=1, side=side)
    held_out = draw_tiles("heldout", 500, seed=2, side=side)
    print(f"drawn in {time.time() - start:.0f} s")
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(pixels), (BATCH,))
        x, y = shuffle_cells(pixels[chosen], classes[chosen])
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            digits, blanks = accuracy(model, *held_out)
            print(
                f"step {step} loss {loss.item():.3f} held-out digits {digits:.4f} blanks {blanks:.4f} "
                f"{time.time() - start:.0f} s",
                flush=True,
            )


def main() -> None:
    """Train, print the accuracy on held-out scans, write the weights."""
    start = time.time()
    config = compose_config(*sys.argv[1:], "init.vision=null", "precision=fp32")
    known = description_of(config.vision)
    with groups.distributed(config.parallel, seed=0):
        encoder = known.build(config, solo_groups())
        for name, parameter in encoder.named_parameters():
            if "layer_scale" in name:  # training from scratch starts with plain residual branches
                nn.init.ones_(parameter)
        train(Classifier(encoder, config.vision), config.vision.tile_size, config.train.steps, start)
        weights = published(known.parts(config.vision, {}), dict(encoder.named_parameters()))
    file = known.shipped["tiny"]
    save_file(weights, file)
    print(f"wrote {file.name}: {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
