"""Train the tiny InternViT on scikit-learn's digits and write nvlm/vision/tiny_encoder.safetensors.

The task is one class per cell of a tile (0-9 or blank), read from the four patch features that pixel shuffle
joins into one visual token; the linear classifier is thrown away. Only the training pool of scans is seen.
Takes about a minute and a half on two cores. Keys are those of the Hugging Face InternViT.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from nvlm.data.pages import CELLS, TILE, digit_pool, draw_digit, on_paper

WIDTH, LAYERS, HEADS, MLP, PATCH = 64, 4, 4, 256, 14
SIDE = TILE // PATCH  # patches per tile side
BLANK = 10
STEPS, BATCH, LEARNING_RATE = 2000, 32, 3e-3
TARGET = Path(__file__).parent.parent / "nvlm" / "vision" / "tiny_encoder.safetensors"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class RMSNorm(nn.RMSNorm):
    """InternViT's norm: over the whole width, eps 1e-6."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)


class Attention(nn.Module):
    """Self-attention with RMSNorm over all heads' queries and keys at once; no bias on qkv."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_norm, self.k_norm = RMSNorm(WIDTH), RMSNorm(WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[T, 1 + P, D] -> the same."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """One pre-norm block with layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(WIDTH), RMSNorm(WIDTH)
        self.ls1, self.ls2 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))
        self.attn = Attention()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, MLP), "fc2": nn.Linear(MLP, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        """[T, 1 + P, D] -> the same."""
        x = x + self.ls1 * self.attn(self.norm1(x))
        return x + self.ls2 * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Encoder(nn.Module):
    """InternViT: patches, class token, learned positions, blocks, no final norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ParameterDict({
            "class_embedding": nn.Parameter(0.02 * torch.randn(1, 1, WIDTH)),
            "position_embedding": nn.Parameter(0.02 * torch.randn(1, 1 + SIDE * SIDE, WIDTH)),
        })
        self.patch_embedding = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [T, 3, TILE, TILE] -> visual tokens [T, CELLS * CELLS, 4D] after pixel shuffle."""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.embeddings["class_embedding"].expand(len(x), -1, -1), x), dim=1)
        x = x + self.embeddings["position_embedding"]
        for layer in self.layers:
            x = layer(x)
        x = x[:, 1:].unflatten(1, (SIDE // 2, 2, SIDE // 2, 2))
        return x.transpose(2, 3).flatten(3).flatten(1, 2)

    def weights(self) -> dict[str, Tensor]:
        """The weights under Hugging Face's names."""
        names = (("patch_embedding.", "embeddings.patch_embedding."), ("layers.", "encoder.layers."))
        state = {}
        for key, value in self.state_dict().items():
            old, new = next(((o, n) for o, n in names if key.startswith(o)), ("", ""))
            state[new + key.removeprefix(old)] = value.contiguous()
        return state


def draw_tile(split: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A tile uint8 [TILE, TILE, 3] with digits in a random share of its cells, and the cells' classes."""
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
    return np.asarray(on_paper(ink, rng).resize((TILE, TILE))), classes


def draw_tiles(split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pixels uint8 [T, 3, TILE, TILE] and classes [T, CELLS, CELLS]."""
    tiles, classes = zip(*(draw_tile(split, np.random.default_rng([seed, i])) for i in range(count)), strict=True)
    return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(classes))


def normalise(pixels: Tensor) -> Tensor:
    """Pixels uint8 [T, 3, h, w] to ImageNet's mean and deviation."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels / 255 - mean) / std


def shuffle_cells(pixels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Roll a batch of tiles by whole cells: every scan is seen in every place."""
    down, right = torch.randint(CELLS, (2,)).tolist()
    cell = TILE // CELLS
    return pixels.roll((down * cell, right * cell), (2, 3)), classes.roll((down, right), (1, 2))


def accuracy(encoder: Encoder, head: nn.Linear, pixels: Tensor, classes: Tensor) -> tuple[float, float]:
    """Share of right cells: over the digits, and over the blanks."""
    with torch.inference_mode():
        right = head(encoder(normalise(pixels))).argmax(-1) == classes.flatten(1)
    blank = classes.flatten(1) == BLANK
    return right[~blank].float().mean().item(), right[blank].float().mean().item()


def main() -> None:
    """Train, print the accuracy on held-out scans, write the weights."""
    torch.manual_seed(0)
    start = time.time()
    pixels, classes = draw_tiles("train", 6000, seed=1)
    held_out = draw_tiles("heldout", 500, seed=2)
    print(f"drawn in {time.time() - start:.0f} s")
    encoder, head = Encoder(), nn.Linear(4 * WIDTH, BLANK + 1)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1)
    for step in range(1, STEPS + 1):
        chosen = torch.randint(len(pixels), (BATCH,))
        x, y = shuffle_cells(pixels[chosen], classes[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(encoder(normalise(x)))
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            digits, blanks = accuracy(encoder, head, *held_out)
            print(f"step {step} loss {loss.item():.3f} held-out digits {digits:.4f} blanks {blanks:.4f} "
                  f"{time.time() - start:.0f} s", flush=True)
    save_file(encoder.weights(), TARGET)
    print(f"wrote {TARGET.name}: {TARGET.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
