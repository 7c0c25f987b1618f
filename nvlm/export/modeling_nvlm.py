"""NVLM-D, NVLM-X and NVLM-H in one file: load an exported folder, compute logits, generate answers.

    from modeling_nvlm import NVLM
    model = NVLM.from_folder(".", dtype=torch.bfloat16, device="cuda:0")
    print(model.answer([{"role": "user", "content": "<image>\\nWhat does the sign say?"}], ["street.jpg"]))

The folder holds config.json, tokenizer.json, and model.safetensors or its shards with model.safetensors.index.json.
This file needs torch and safetensors, and for images and text also Pillow, numpy and tokenizers. Inference only.

A frozen InternViT turns each 448 px tile of an image into 1024 patch features, pixel shuffle merges them into 256 wider
tokens (2 x 2 patches each, unless config.json says otherwise), and the projector maps these to the language model's
width. The architectures differ in where the projected tiles go:

  decoder (NVLM-D)  all tiles are in the text stream, each after its tag, and are seen by self-attention
  xattn   (NVLM-X)  only tags are in the text stream; tiles are the keys of gated cross-attention in every k-th layer
  hybrid  (NVLM-H)  the thumbnail is in the text stream; the other tiles and their tags are the keys

One conversation at a time, so there is no batch dimension. Shapes: S tokens of the text stream, X cross-attended keys,
T tiles, P patches of a tile plus its class token, K tokens per tile, D encoder width, H language model width, N heads,
G key-value heads, E head width, V vocabulary.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for RGB from 0 to 1
MARK = "<image>"  # marks the place of an image in a message
TILES_PER_CALL = 16  # batch size of the encoder

# --- the parts of a conversation ---


class Piece(NamedTuple):
    """A run of text (`ids`) or the K tokens of one tile (`ids` None), in the text stream or among the keys.

    `image`: number of the latest image so far, -1 before the first. `tile`: the tile that it is or names, counted over
    all images. `bound`: these tokens see only that tile's keys (the tags of NVLM-X).
    """

    ids: tuple[int, ...] | None
    image: int = -1
    tile: int = -1
    bound: bool = False


@dataclass(frozen=True)
class Inputs:
    """An encoded conversation: the text stream, the cross-attended keys, and the tiles as uint8 [T, 3, px, px]."""

    stream: list[Piece]
    keys: list[Piece]
    pixels: Tensor


def lay_out(arch: str, image: int, first: int, tags: Sequence[tuple[int, ...]]) -> tuple[list[Piece], list[Piece]]:
    """One image's pieces in the text stream and among the keys.

    `tags`: one per tile, the thumbnail's last; `first`: number of its first tile.
    """
    names = [Piece(ids, image, first + t, bound=arch == "xattn") for t, ids in enumerate(tags)]
    tiles = [Piece(None, image, first + t) for t in range(len(tags))]
    tagged = [piece for pair in zip(names, tiles, strict=True) for piece in pair]
    if arch == "decoder":
        return tagged, []
    if arch == "xattn":
        return names, tiles
    return tagged[-2:], tagged[:-2]  # an image of one tile has only the thumbnail


def sight(stream: list[Piece], keys: list[Piece], tile_tokens: int, sees: str = "before") -> Tensor:
    """[S, X] bool: a token sees the keys of all images so far (`sees` "latest": of the latest one) or, if bound, only
    those of its tile."""

    def spread(pieces: list[Piece], numbers: Iterable[int]) -> Tensor:
        lengths = [tile_tokens if piece.ids is None else len(piece.ids) for piece in pieces]
        return torch.tensor(list(numbers), dtype=torch.long).repeat_interleave(torch.tensor(lengths, dtype=torch.long))

    image_S, image_X = (spread(pieces, (p.image for p in pieces)) for pieces in (stream, keys))
    only_S, tile_X = spread(stream, (p.tile if p.bound else -1 for p in stream)), spread(keys, (p.tile for p in keys))
    begun_SX = (image_X == image_S[:, None]) if sees == "latest" else (image_X <= image_S[:, None])
    return begun_SX & ((only_S[:, None] == -1) | (only_S[:, None] == tile_X))


# --- images ---


def choose_grid(width: int, height: int, max_tiles: int, tile: int) -> tuple[int, int]:
    """The grid (columns, rows) of at most `max_tiles` tiles whose aspect ratio is closest to width / height (px).

    On an exact tie, the grid with more tiles wins if the image has more than half of its pixels.
    """
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1)]
    best, best_gap = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])):
        gap = abs(width / height - columns / rows)
        if gap < best_gap or (gap == best_gap and width * height > 0.5 * tile * tile * columns * rows):
            best, best_gap = (columns, rows), gap
    return best


def cut(image, columns: int, rows: int, tile: int) -> Tensor:
    """uint8 [T, 3, tile, tile] from a Pillow RGB image, resized with Pillow's bicubic filter.

    Tiles in reading order, then the thumbnail; a 1 x 1 grid has only the thumbnail.
    """
    import numpy as np

    thumbnail = image.resize((tile, tile), 3)
    resized = image.resize((columns * tile, rows * tile), 3)
    corners = [(c * tile, r * tile) for r in range(rows) for c in range(columns)] if columns * rows > 1 else []
    crops = [resized.crop((x, y, x + tile, y + tile)) for x, y in corners]
    return torch.from_numpy(np.stack([np.asarray(crop) for crop in [*crops, thumbnail]])).permute(0, 3, 1, 2)


def open_rgb(source):
    """An RGB image from a path, a file's bytes or a Pillow image.

    Transparency is dropped, EXIF orientation is not applied. Greyscale of 16 or 32 bits is scaled so that white is the
    smallest of 255 and 65535 (for floats also 1) that is not below the brightest value, else that value.
    """
    import numpy as np
    from PIL import Image

    file = io.BytesIO(source) if isinstance(source, bytes) else source
    image = file if isinstance(file, Image.Image) else Image.open(file)
    turned = image.getexif().get(274, 1) if image.format == "TIFF" else 1  # Pillow applies it, but only for TIFF
    image.load()
    if turned in range(2, 9):
        image = image.transpose(Image.Transpose((0, 3, 1, 5, 2, 6, 4)[turned - 2]))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = np.nan_to_num(np.asarray(image).astype(np.float32), nan=0, posinf=0, neginf=0)
        levels = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        white = next((level for level in levels if grey.max() <= level), float(grey.max()))
        grey = grey.clip(0, white) if white == 255 else grey.clip(0, white) / white * 255 + 0.5
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode != "RGB" and "transparency" in image.info:
        image = image.copy()
        del image.info["transparency"]  # otherwise Pillow converts the transparent colour too
    return (image.convert("LA") if image.mode == "La" else image).convert("RGB")


def tag_names(style: str, columns: int, rows: int, max_tiles: int, thumbnail: str) -> list[str]:
    """The tag of each tile, the thumbnail's last."""
    cells = [(c, r) for r in range(rows) for c in range(columns)] if columns * rows > 1 else []
    if style == "none":
        return [""] * (len(cells) + 1)
    if style == "1d":
        return [*(f"<tile_{n:0{len(str(max_tiles))}d}>" for n in range(1, len(cells) + 1)), thumbnail]
    if style == "2d_grid":
        return [*(f"<tile_x{c}_y{r}>" for c, r in cells), thumbnail]
    if style != "2d_bbox":
        raise ValueError(f"nvlm.tag: got {style!r}, expected none, 1d, 2d_grid or 2d_bbox")
    x, y = ([(2 * 999 * edge + n) // (2 * n) for edge in range(n + 1)] for n in (columns, rows))  # 999: far edge
    corners = [*((x[c], y[r], x[c + 1], y[r + 1]) for c, r in cells), (0, 0, 999, 999)]
    return ["<box> ({}, {}), ({}, {}) </box>".format(*corner) for corner in corners]


# --- text ---


def split_marks(text: str) -> list[str]:
    """The n + 1 texts around n marks. An odd number of backslashes before a mark makes it a text; they are halved."""
    texts, start = [""], 0
    for found in re.finditer(rf"(?<!\\)(\\*+){MARK}", text):
        texts[-1] += text[start : found.start()] + "\\" * (len(found[1]) // 2)
        if len(found[1]) % 2:
            texts[-1] += MARK
        else:
            texts.append("")
        start = found.end()
    return [*texts[:-1], texts[-1] + text[start:]]


def stripped(texts: Sequence[str]) -> list[str]:
    """The texts of a message without the white space at its ends."""
    first, *others = texts
    *between, last = first.lstrip(), *others
    return [*between, last.rstrip()]


def found_by_vllm(first: str, others: Sequence[str]) -> bool:
    """Whether vLLM finds exactly the images between these texts: each on its own line, with no empty one after it."""
    starts_lines = all(text.endswith("\n") for text in (f"\n{first}", *others)[: len(others)])
    ends_lines = all(text[:1] == "\n" != text[1:2] for text in others)
    return starts_lines and ends_lines and not any(MARK in text for text in (first, *others))


def turns_of(messages: Sequence[dict], images: int, system: str | None) -> list[tuple[str, list[str]]]:
    """(role, texts around images) of each message. Without marks, all images go before the first user turn's text."""
    turns = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            texts = split_marks(content)
        else:
            kinds = {part["type"] for part in content} - {"image", "text"}
            if kinds:
                raise ValueError(f"got parts of type {', '.join(sorted(kinds))}, expected text and image alone")
            texts = [""]
            for part in content:
                begin, *others = ["", ""] if part["type"] == "image" else split_marks(part["text"])
                texts = [*texts[:-1], texts[-1] + begin, *others]
        turns.append((message["role"], texts))
    marks = sum(len(texts) - 1 for _, texts in turns)
    if marks not in (0, images):
        raise ValueError(f"got {marks} {MARK} marks and {images} images, expected a mark for each image, or none")
    first = next((n for n, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        raise ValueError("got no message of role user, expected at least one")
    if marks < images:
        begin, *others = turns[first][1]
        turns[first] = ("user", ["", *["\n"] * (images - 1), f"\n{begin}", *others])
    return [("system", [system]), *turns] if system and turns[0][0] != "system" else turns


# --- attention ---


def attend(q_SNE: Tensor, k_XGE: Tensor, v_XGE: Tensor, causal: bool = False, seen_SX: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, [S, N * E]; query heads share key-value heads in groups."""
    shared = q_SNE.shape[1] // k_XGE.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q_SNE, *(x.repeat_interleave(shared, 1) for x in (k_XGE, v_XGE))))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen_SX, is_causal=causal)[0].transpose(0, 1).flatten(1)


def rotate(x_SNE: Tensor, start: int, theta: float, scaling: SimpleNamespace | None) -> Tensor:
    """Rotary embedding at positions start, start + 1, ...: channel e is paired with channel e + E / 2.

    `scaling`: linear divides all frequencies by its factor; Llama 3.1's divides low ones and keeps high ones, with a
    ramp between.
    """
    width = x_SNE.shape[-1]
    frequencies = theta ** -(torch.arange(0, width, 2, dtype=torch.float32, device=x_SNE.device) / width)
    if getattr(scaling, "type", None) == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        low, turns = scaling.low_freq_factor, scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        keep = ((turns - low) / (scaling.high_freq_factor - low)).clamp(0, 1)
        frequencies = frequencies * (keep + (1 - keep) / scaling.factor)
    positions = torch.arange(start, start + len(x_SNE), dtype=torch.float32, device=x_SNE.device)
    angles = (positions[:, None] * frequencies).repeat(1, 2)[:, None]
    a, b = x_SNE.chunk(2, dim=-1)
    return x_SNE * angles.cos().to(x_SNE.dtype) + torch.cat((-b, a), dim=-1) * angles.sin().to(x_SNE.dtype)


# --- InternViT ---


class VisionAttention(nn.Module):
    """Attention of InternViT; the 6B model has an RMSNorm of q and of k over all heads together.

    Dummy heads after the real ones hold zeros and are skipped.
    """

    def __init__(self, c) -> None:
        super().__init__()
        self.heads, self.width, self.eps = c.num_attention_heads, c.hidden_size, c.layer_norm_eps
        padded = (self.heads + c.num_dummy_heads) * (self.width // self.heads)
        self.qkv = nn.Linear(self.width, 3 * padded, bias=c.qkv_bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(padded) if c.qk_normalization else None for _ in range(2))
        self.proj = nn.Linear(padded, self.width)

    def forward(self, x_TPD: Tensor) -> Tensor:
        """[T, P, D]; every patch sees the whole tile."""
        q, k, v = (x[..., : self.width] for x in self.qkv(x_TPD).chunk(3, dim=-1))
        if self.q_norm is not None:
            q = F.rms_norm(q, (self.width,), self.q_norm.weight[: self.width], self.eps)
            k = F.rms_norm(k, (self.width,), self.k_norm.weight[: self.width], self.eps)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out_TPD = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.linear(out_TPD, self.proj.weight[:, : self.width], self.proj.bias)


class VisionLayer(nn.Module):
    """A pre-norm layer with exact GELU and per-channel scaling of both branches."""

    def __init__(self, c) -> None:
        super().__init__()
        norm = {"rms_norm": nn.RMSNorm, "layer_norm": nn.LayerNorm}[c.norm_type]
        self.norm1, self.norm2 = (norm(c.hidden_size, c.layer_norm_eps) for _ in range(2))
        self.ls1, self.ls2 = (nn.Parameter(torch.empty(c.hidden_size)) for _ in range(2))
        self.attn, wide = VisionAttention(c), c.intermediate_size
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(c.hidden_size, wide), "fc2": nn.Linear(wide, c.hidden_size)})

    def forward(self, x_TPD: Tensor) -> Tensor:
        x_TPD = x_TPD + self.attn(self.norm1(x_TPD)) * self.ls1
        return x_TPD + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x_TPD)))) * self.ls2


class InternViT(nn.Module):
    """The encoder: learned positions, a leading class token that is dropped at the end, no final norm.

    Finally, pixel shuffle joins `factor` x `factor` patches into one token.
    """

    def __init__(self, c, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        positions = 1 + (c.image_size // c.patch_size) ** 2
        self.embeddings.class_embedding = nn.Parameter(torch.empty(1, 1, c.hidden_size))
        self.embeddings.position_embedding = nn.Parameter(torch.empty(1, positions, c.hidden_size))
        self.embeddings.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size)
        self.encoder.layers = nn.ModuleList(VisionLayer(c) for _ in range(c.num_hidden_layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [T, 3, px, px] to [T, K, 4D]: pixel shuffle concatenates neighbouring patches in reading order."""
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
        own, normalised = self.embeddings, (pixels.float() / 255 - mean) / std
        patches_TPD = own.patch_embedding(normalised.to(own.class_embedding.dtype)).flatten(2).transpose(1, 2)
        x_TPD = torch.cat((own.class_embedding.expand(len(pixels), -1, -1), patches_TPD), 1) + own.position_embedding
        for layer in self.encoder.layers:
            x_TPD = layer(x_TPD)
        f, side = self.factor, round((x_TPD.shape[1] - 1) ** 0.5) // self.factor
        blocks = x_TPD[:, 1:].unflatten(1, (side, f, side, f)).transpose(2, 3)  # tile, row, column, f, f, D
        return blocks.flatten(3).flatten(1, 2)


# --- the language model ---

Cache = dict[nn.Module, tuple[Tensor, Tensor]]
"""Cached keys and values of each attention module."""


class Attention(nn.Module):
    """The linears of grouped-query attention."""

    def __init__(self, c, bias: bool) -> None:
        super().__init__()
        self.head_dim, self.theta, self.scaling = c.head_dim, c.rope_theta, c.rope_scaling
        width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, width, bias)
        self.k_proj = nn.Linear(c.hidden_size, kv_width, bias)
        self.v_proj = nn.Linear(c.hidden_size, kv_width, bias)
        self.o_proj = nn.Linear(width, c.hidden_size, bias=False)

    def heads(self, linear: nn.Linear, x_SH: Tensor) -> Tensor:
        """[S, heads, E]."""
        return linear(x_SH).unflatten(-1, (-1, self.head_dim))


class SelfAttention(Attention):
    """Causal, with rotary positions; Qwen3 has norms of each head's queries and keys."""

    def __init__(self, c) -> None:
        super().__init__(c, c.attention_bias)
        normed = "Qwen3ForCausalLM" in c.architectures
        self.q_norm, self.k_norm = (nn.RMSNorm(c.head_dim, c.rms_norm_eps) if normed else nn.Identity() for _ in "qk")

    def forward(self, x_SH: Tensor, cache: Cache) -> Tensor:
        """[S, H]; x is the whole conversation if the cache is empty, else one new token."""
        q, k, v = (self.heads(linear, x_SH) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k, start = self.q_norm(q), self.k_norm(k), len(cache[self][0]) if self in cache else 0
        q, k = (rotate(x, start, self.theta, self.scaling) for x in (q, k))
        if start:
            k, v = torch.cat((cache[self][0], k)), torch.cat((cache[self][1], v))
        cache[self] = k, v
        return self.o_proj(attend(q, k, v, causal=not start))


class GatedCrossAttention(Attention):
    """Cross-attention from text to tiles: no positions, no bias, and a gate that was zero at the start of training."""

    def __init__(self, c) -> None:
        super().__init__(c, bias=False)
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.gate = nn.Parameter(torch.empty(1))

    def forward(self, h_SH: Tensor, keys_XH: Tensor, seen_SX: Tensor, cache: Cache) -> Tensor:
        """[S, H] to add to h; exactly zero for a token that sees no key."""
        out_SH, sees_S = torch.zeros_like(h_SH), seen_SX.any(dim=1)
        if sees_S.any():
            if self not in cache:
                cache[self] = self.heads(self.k_proj, keys_XH), self.heads(self.v_proj, keys_XH)
            q_SNE = self.heads(self.q_proj, self.norm(h_SH[sees_S]))
            out_SH[sees_S] = self.o_proj(attend(q_SNE, *cache[self], seen_SX=seen_SX[sees_S]))
        return torch.tanh(self.gate) * out_SH


class DecoderLayer(nn.Module):
    """Self-attention, in some layers gated cross-attention, then the SwiGLU MLP."""

    def __init__(self, c, crosses: bool) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = SelfAttention(c)
        self.cross_attn = GatedCrossAttention(c) if crosses else None
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        gate, up = (nn.Linear(c.hidden_size, c.intermediate_size, bias=False) for _ in range(2))
        down = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.mlp = nn.ModuleDict({"gate_proj": gate, "up_proj": up, "down_proj": down})

    def forward(self, h_SH: Tensor, keys_XH: Tensor, seen_SX: Tensor, cache: Cache) -> Tensor:
        h_SH = h_SH + self.self_attn(self.input_layernorm(h_SH), cache)
        if self.cross_attn is not None:
            h_SH = h_SH + self.cross_attn(h_SH, keys_XH, seen_SX, cache)
        x_SH = self.post_attention_layernorm(h_SH)
        return h_SH + self.mlp.down_proj(F.silu(self.mlp.gate_proj(x_SH)) * self.mlp.up_proj(x_SH))


class LanguageModel(nn.Module):
    """A decoder like Llama, Qwen2 or Qwen3; layers every, 2 * every, ... have cross-attention (0: none)."""

    def __init__(self, c, every: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        crosses = [every > 0 and number % every == 0 for number in range(1, c.num_hidden_layers + 1)]
        self.model.layers = nn.ModuleList(DecoderLayer(c, has) for has in crosses)
        self.model.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = None if c.tie_word_embeddings else nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, h_SH: Tensor, keys_XH: Tensor, seen_SX: Tensor, cache: Cache) -> Tensor:
        """Token embeddings to last hidden states [S, H]."""
        for layer in self.model.layers:
            h_SH = layer(h_SH, keys_XH, seen_SX, cache)
        return self.model.norm(h_SH)

    def logits(self, h_SH: Tensor) -> Tensor:
        """[S, V], float32."""
        return F.linear(h_SH, (self.lm_head or self.model.embed_tokens).weight).float()


# --- the whole model ---


class NVLM(nn.Module):
    """The whole model. `config`: config.json with its keys as attributes."""

    def __init__(self, config: SimpleNamespace, folder: Path) -> None:
        super().__init__()
        llm, self.config, self.folder, self.arch = config.llm_config, config, folder, config.nvlm.arch
        self.factor = round(1 / config.downsample_ratio)
        self.vision_model = InternViT(config.vision_config, self.factor)
        width, inner = self.factor**2 * config.vision_config.hidden_size, llm.intermediate_size
        if self.arch == "xattn":
            linears = [nn.Linear(width, llm.hidden_size, bias=False)]
        else:
            linears = [nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, llm.hidden_size, bias=False)]
        self.mlp1 = nn.Sequential(nn.LayerNorm(width, 1e-5), *linears)
        kinds = {"decoder": (), "xattn": ("tile_norm",), "hybrid": ("tile_norm", "tag_norm")}[self.arch]
        self.cross_keys = nn.ModuleDict({kind: nn.RMSNorm(llm.hidden_size, llm.rms_norm_eps) for kind in kinds})
        self.language_model = LanguageModel(llm, config.nvlm.cross_attention_every if kinds else 0)

    @classmethod
    def opened(cls, folder: str | Path, device: str = "cpu") -> tuple[NVLM, dict[str, safe_open]]:
        """The model of `folder` without weights, and the open file of each weight. Reads only the files' headers.

        Raises ValueError, with the names, if tensors are missing, unexpected or of the wrong shape.
        """
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text(), object_hook=lambda keys: SimpleNamespace(**keys))
        with torch.device("meta"):
            model = cls(config, folder)
        index = folder / "model.safetensors.index.json"
        files = json.loads(index.read_text())["weight_map"].values() if index.is_file() else ["model.safetensors"]
        opened = [safe_open(folder / file, "pt", device=str(device)) for file in sorted(set(files))]
        holder = {name: file for file in opened for name in file.keys()}
        wanted = dict(model.named_parameters())
        missing, surplus = sorted(wanted.keys() - holder.keys()), sorted(holder.keys() - wanted.keys())
        if missing or surplus:
            raise ValueError(f"weights of {folder}: missing {missing}, surplus {surplus}")
        for name, empty in wanted.items():
            shape = tuple(holder[name].get_slice(name).get_shape())
            if shape != tuple(empty.shape):
                raise ValueError(f"{name}: got shape {shape}, expected {tuple(empty.shape)}")
        return model.eval(), holder

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> NVLM:
        """The model of `folder`; weights are read one by one. Raises ValueError as `opened` does."""
        model, holder = cls.opened(folder, device)
        for name in dict(model.named_parameters()):
            tensor = holder[name].get_tensor(name).to(dtype)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        return model

    @cached_property
    def tokenizer(self):
        """The tokenizer. Text never yields control tokens: `<|im_end|>` in a user's message stays plain text."""
        from tokenizers import Tokenizer

        values = json.loads((self.folder / "tokenizer.json").read_text("utf-8"))
        values |= {"truncation": None, "padding": None}  # settings saved with the file
        values["model"] |= dict.fromkeys({"dropout"} & values["model"].keys())
        for token in values["added_tokens"]:
            token["special"] |= token["content"] == self.config.nvlm.bos or token["content"][:2] == "<|"
        tokenizer = Tokenizer.from_str(json.dumps(values))
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer: the chat format's and those in generation_config.json."""
        file = self.folder / "generation_config.json"
        listed = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        return frozenset(listed if isinstance(listed, list) else [listed]) | {
            self.tokenizer.token_to_id(self.config.nvlm.chat.end)
        }

    @property
    def tile_tokens(self) -> int:
        """Number of tokens per tile, K."""
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size // self.factor) ** 2

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def own(self, text: str) -> tuple[int, ...]:
        """Token ids of the chat format's own text, in which special tokens are written by name."""
        names = self.config.nvlm.chat.tokens
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        ids = ((self.tokenizer.token_to_id(part),) if part in names else self.encode(part) for part in parts)
        return tuple(number for some in ids for number in some)

    def inputs(
        self, messages: Sequence[dict], images: Sequence = (), reply: bool = False, max_tiles: int | None = None
    ) -> Inputs:
        """Encode a conversation in the model's chat format; with `reply`, up to the start of the assistant's next turn.

        `messages`: {"role", "content"}, content is text with `<image>` marks or a list of {"type": "text" | "image"}
        parts. `images`: paths, bytes or Pillow images. `max_tiles`: fewer tiles per image than config.json allows;
        the trainer does this if a conversation's images do not fit its sequence.
        """
        c, chat, encode = self.config.nvlm, self.config.nvlm.chat, self.encode
        stream = [Piece((self.tokenizer.token_to_id(c.bos),))] if c.bos else []
        keys, tiles, image = [], [], -1
        for role, texts in turns_of(messages, len(images), c.system):
            way = "apart" if role == "assistant" else c.tokenize
            first, *others = stripped(texts) if chat.strip else texts
            stream.append(
                Piece(self.own(f"{chat.prefix}{role}{chat.suffix}" if way == "apart" else chat.prefix), image)
            )
            if way == "vllm" and not found_by_vllm(first, others):
                raise ValueError(f"got {MARK} within a line or before an empty one, which vLLM does not find")
            words = [first if way == "apart" else f"{role}{chat.suffix}{first}"]
            for fragment in others:
                pixels, names = self.tile(images[image + 1], max_tiles)
                tags = [encode(name) for name in names]
                if way == "apart":
                    words.append("<Image>")
                elif way == "joined":  # one text, from the previous image to the first tag
                    words, tags[0] = [f"{words[0]}<Image>{names[0]}"], ()
                else:
                    words, tags[0] = [*words, f"<Image>{names[0]}"], ()
                stream += [Piece(encode(text), image) for text in words]
                image += 1
                in_stream, in_keys = lay_out(self.arch, image, sum(map(len, tiles)), tags)
                stream, keys = stream + in_stream, keys + in_keys
                tiles.append(pixels)
                words = {
                    "apart": ["</Image>", fragment],
                    "joined": [f"</Image>{fragment}"],
                    "vllm": ["</Image>", "\n", fragment[1:]],
                }[way]
            stream += [*(Piece(encode(text), image) for text in words), Piece(self.own(chat.tail), image)]
        stream += [Piece(self.own(f"{chat.prefix}assistant{chat.suffix}"), image)] if reply else []
        size = self.config.force_image_size
        return Inputs(stream, keys, torch.cat([torch.zeros(0, 3, size, size, dtype=torch.uint8), *tiles]))

    def tile(self, image, max_tiles: int | None = None) -> tuple[Tensor, list[str]]:
        """An image's tiles, uint8 [T, 3, px, px], and their tags."""
        c, rgb = self.config, open_rgb(image)
        grid = choose_grid(*rgb.size, max_tiles or c.max_dynamic_patch, c.force_image_size)
        names = tag_names(c.nvlm.tag, *grid, c.max_dynamic_patch, c.nvlm.thumbnail_tag)
        return cut(rgb, *grid, c.force_image_size), names

    def words(self, ids: Sequence[int]) -> Tensor:
        """Embeddings [len(ids), H]."""
        embedding = self.language_model.model.embed_tokens
        return embedding(torch.tensor(ids, dtype=torch.long, device=embedding.weight.device))

    def embed(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The text stream [S, H], the keys [X, H], and visibility [S, X]."""
        pixels = inputs.pixels.to(self.mlp1[0].weight.device).split(TILES_PER_CALL) if len(inputs.pixels) else ()
        tiles_TKH = [tile for some in pixels for tile in self.mlp1(self.vision_model(some))]
        stream = [tiles_TKH[p.tile] if p.ids is None else self.words(p.ids) for p in inputs.stream]
        keys, tags = [self.words(())], {}
        for piece in inputs.keys:
            if piece.ids is None:
                key_KH = self.cross_keys["tile_norm"](tiles_TKH[piece.tile])
                keys.append(key_KH + tags[piece.tile] if piece.tile in tags else key_KH)
            elif piece.ids:
                words_LH = self.words(piece.ids)
                keys.append(self.cross_keys["tag_norm"](words_LH))
                if self.config.nvlm.bind_tags != "none":  # cross-attention has no order: this binds a tile to its tag
                    ordered = self.config.nvlm.bind_tags == "ordered"
                    bound_LH = rotate(words_LH[:, None], 0, 10.0, None)[:, 0] if ordered else words_LH
                    tags[piece.tile] = self.cross_keys["tag_norm"](bound_LH.mean(dim=0))
        seen_SX = sight(inputs.stream, inputs.keys, self.tile_tokens, self.config.nvlm.sees).to(keys[0].device)
        return torch.cat(stream), torch.cat(keys), seen_SX

    @torch.inference_mode()
    def logits(self, inputs: Inputs) -> Tensor:
        """[S, V], float32; row s predicts the token after token s."""
        return self.language_model.logits(self.language_model(*self.embed(inputs), {}))

    @torch.inference_mode()
    def answer(self, messages: Sequence[dict], images: Sequence = (), max_new_tokens: int = 512) -> str:
        """Greedy decoding up to an end token, or `max_new_tokens`."""
        cache, ids = {}, []
        h_SH, keys_XH, seen_SX = self.embed(self.inputs(messages, images, reply=True))
        while len(ids) < max_new_tokens:
            last_1H = self.language_model(h_SH, keys_XH, seen_SX, cache)[-1:]
            token = int(self.language_model.logits(last_1H).argmax())
            if token in self.ends:
                break
            ids.append(token)
            h_SH, seen_SX = self.words(ids[-1:]), seen_SX[-1:]
        return self.tokenizer.decode(ids, skip_special_tokens=True)
