"""Plain PyTorch model of NVLM-D (decoder), NVLM-X (xattn) and NVLM-H (hybrid): the maths of every layout.

One process, one sample, one tile at a time; no Megatron, no batching, no dropout, no cache. Slow on purpose.

Shapes: S stream tokens, X cross-attended keys, P patches of a tile with the class token, K tokens of a tile,
D encoder width, C = 4D after the pixel shuffle, H language width, V vocabulary, N heads, G key/value heads,
E width of one head. No batch dimension anywhere.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
VIT_EPS = 1e-6
PROJECTOR_EPS = 1e-5
NO_LOSS = -100


@dataclass(frozen=True)
class RefDims:
    """Every size of a model; patch and image in px. Cross-attention is in the 1-based layers every, 2*every, ..."""

    vit_hidden: int
    vit_layers: int
    vit_heads: int
    vit_ffn: int
    patch: int
    image: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rope_theta: float
    eps: float
    qkv_bias: bool
    tied: bool
    arch: str
    qk_norm: bool = False
    interpolation: float = 1.0
    every: int = 0
    bind_tags: str = "none"
    latest: bool = False  # text and thumbnails see the keys of the latest image alone

    def __post_init__(self) -> None:
        if self.arch not in ("decoder", "xattn", "hybrid"):
            raise ValueError(f"arch is {self.arch!r}, expected decoder, xattn or hybrid")
        if self.arch != "decoder" and self.every < 1:
            raise ValueError(f"every is {self.every}, expected at least 1 for {self.arch}")
        if self.bind_tags not in ("none", "mean", "ordered"):
            raise ValueError(f"bind_tags is {self.bind_tags!r}, expected none, mean or ordered")
        if self.bind_tags != "none" and self.arch != "hybrid":
            raise ValueError(f"bind_tags is for hybrid, not for {self.arch}")
        if self.image % (2 * self.patch) or self.vit_hidden % self.vit_heads or self.heads % self.kv_heads:
            raise ValueError(f"sizes do not divide: {self}")

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.image // self.patch

    @property
    def tokens_per_tile(self) -> int:
        """K: one token for each 2x2 patches."""
        return (self.patches_per_side // 2) ** 2

    def has_cross(self, layer: int) -> bool:
        """Whether layer (0-based) has gated cross-attention."""
        return self.arch != "decoder" and (layer + 1) % self.every == 0


@dataclass(frozen=True)
class Segment:
    """kind: text, tag or tile; tiles are counted within the image. A tag without ids marks where an image starts."""

    kind: str
    ids: tuple[int, ...] = ()
    image: int = -1
    tile: int = -1


@dataclass
class RefSample:
    """tiles[(image, tile)] is uint8 [3, px, px]; labels[t] is the target at stream position t."""

    stream: list[Segment]
    cross: list[Segment] = field(default_factory=list)
    tiles: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    labels: list[int] = field(default_factory=list)


def check(sample: RefSample, arch: str) -> None:
    """Refuse a sample that makes no sense in this architecture."""
    segments = sample.stream + sample.cross
    if not {s.kind for s in segments} <= {"text", "tag", "tile"} or "text" in {s.kind for s in sample.cross}:
        raise ValueError("a segment is text, tag or tile, and cross holds no text")
    if arch == "decoder" and sample.cross:
        raise ValueError("decoder has no cross-attention")
    if arch == "xattn" and any(s.kind == "tile" for s in sample.stream):
        raise ValueError("xattn has no tile in the stream")
    used = {(s.image, s.tile) for s in segments if s.kind == "tile"}
    if used != set(sample.tiles):
        raise ValueError(f"segments name tiles {sorted(used)}, pixels are given for {sorted(sample.tiles)}")
    placed = {s.image for s in sample.stream if s.kind != "text"}
    if any(s.image not in placed for s in sample.cross):
        raise ValueError("an image in cross has no tag or tile segment in the stream")


def length(segment: Segment, tokens_per_tile: int) -> int:
    """Number of positions of a segment."""
    return tokens_per_tile if segment.kind == "tile" else len(segment.ids)


def sees(query: Segment, place: int, key: Segment, begin: dict[int, int], arch: str, latest: bool = False) -> bool:
    """Whether the stream's segment number `place` sees a cross segment; begin: image -> its first segment."""
    newest = max((first for first in begin.values() if first <= place), default=None)
    if latest and begin[key.image] != newest:
        return False
    if query.kind == "text":
        return begin[key.image] < place
    if arch == "xattn":
        return (query.image, query.tile) == (key.image, key.tile)
    return begin[key.image] <= begin[query.image]  # hybrid: its own image and those that began earlier


def visibility(sample: RefSample, arch: str, tokens_per_tile: int, latest: bool = False) -> Tensor:
    """[S, X] bool: which stream token sees which cross-attended key."""
    begin: dict[int, int] = {}
    for place, segment in enumerate(sample.stream):
        if segment.kind != "text" and segment.image not in begin:
            begin[segment.image] = place
    rows: list[list[bool]] = []
    for place, query in enumerate(sample.stream):
        row: list[bool] = []
        for key in sample.cross:
            row += [sees(query, place, key, begin, arch, latest)] * length(key, tokens_per_tile)
        rows += [row] * length(query, tokens_per_tile)
    keys = sum(length(key, tokens_per_tile) for key in sample.cross)
    return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), keys)


def attend(q_SNE: Tensor, k_XGE: Tensor, v_XGE: Tensor, visible_SX: Tensor) -> Tensor:
    """[S, N*E]: softmax attention, head by head; a query that sees nothing gets zeros."""
    heads, width = q_SNE.shape[1:]
    queries_per_kv = heads // k_XGE.shape[1]
    sighted_S = visible_SX.any(dim=1)
    outputs = []
    for head in range(heads):
        q_SE = q_SNE[sighted_S, head]
        k_XE = k_XGE[:, head // queries_per_kv]
        v_XE = v_XGE[:, head // queries_per_kv]
        scores_SX = q_SE @ k_XE.T / width**0.5
        scores_SX = scores_SX.masked_fill(~visible_SX[sighted_S], float("-inf"))
        out_SE = q_SNE.new_zeros(len(q_SNE), width)
        out_SE[sighted_S] = scores_SX.softmax(dim=1) @ v_XE
        outputs.append(out_SE)
    return torch.cat(outputs, dim=1)


def rotate(x_SNE: Tensor, theta: float, interpolation: float) -> Tensor:
    """Rotary embedding at positions (0 to S-1) / interpolation: channel e pairs with e + E/2. Angles in fp64."""
    half = x_SNE.shape[2] // 2
    frequency_E = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle_SE = (torch.arange(len(x_SNE), dtype=torch.float64) / interpolation)[:, None] * frequency_E
    cos_S1E = angle_SE.cos().to(x_SNE)[:, None]
    sin_S1E = angle_SE.sin().to(x_SNE)[:, None]
    a_SNE, b_SNE = x_SNE[..., :half], x_SNE[..., half:]
    return torch.cat([a_SNE * cos_S1E - b_SNE * sin_S1E, b_SNE * cos_S1E + a_SNE * sin_S1E], dim=2)


def pixel_shuffle(x_PD: Tensor, side: int) -> Tensor:
    """[side*side, D] -> [K, 4D]: each token is a 2x2 block, its rows and columns in reading order."""
    grid = x_PD.reshape(side, side, -1)
    tokens = []
    for r in range(0, side, 2):
        for c in range(0, side, 2):
            tokens.append(torch.cat([grid[r, c], grid[r, c + 1], grid[r + 1, c], grid[r + 1, c + 1]]))
    return torch.stack(tokens)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps) * self.weight


class VisionEmbeddings(nn.Module):
    """Patches after a class token, plus learned positions."""

    def __init__(self, dims: RefDims) -> None:
        super().__init__()
        positions = 1 + dims.patches_per_side**2
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, dims.vit_hidden))
        self.position_embedding = nn.Parameter(torch.zeros(1, positions, dims.vit_hidden))
        self.patch_embedding = nn.Conv2d(3, dims.vit_hidden, dims.patch, stride=dims.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        """[3, px, px] -> [P, D], patches in reading order."""
        patches_PD = self.patch_embedding(pixels[None])[0].flatten(1).T
        return torch.cat([self.class_embedding[0], patches_PD]) + self.position_embedding[0]


class VisionAttention(nn.Module):
    """Full attention; RMSNorm over the whole width of q and of k, all heads together."""

    def __init__(self, dims: RefDims) -> None:
        super().__init__()
        self.heads = dims.vit_heads
        self.qkv = nn.Linear(dims.vit_hidden, 3 * dims.vit_hidden, bias=False)
        self.q_norm = RMSNorm(dims.vit_hidden, VIT_EPS)
        self.k_norm = RMSNorm(dims.vit_hidden, VIT_EPS)
        self.proj = nn.Linear(dims.vit_hidden, dims.vit_hidden)

    def forward(self, x_PD: Tensor) -> Tensor:
        """[P, D] -> [P, D]."""
        q_PD, k_PD, v_PD = self.qkv(x_PD).chunk(3, dim=1)
        normed = self.q_norm(q_PD), self.k_norm(k_PD), v_PD
        q_PNE, k_PNE, v_PNE = (x.unflatten(1, (self.heads, -1)) for x in normed)
        everything_PP = torch.ones(len(x_PD), len(x_PD), dtype=torch.bool)
        return self.proj(attend(q_PNE, k_PNE, v_PNE, everything_PP))


class VisionLayer(nn.Module):
    """Pre-norm block; ls1 and ls2 scale the two branches channel by channel."""

    def __init__(self, dims: RefDims) -> None:
        super().__init__()
        self.attn = VisionAttention(dims)
        self.norm1 = RMSNorm(dims.vit_hidden, VIT_EPS)
        self.norm2 = RMSNorm(dims.vit_hidden, VIT_EPS)
        self.ls1 = nn.Parameter(torch.ones(dims.vit_hidden))
        self.ls2 = nn.Parameter(torch.ones(dims.vit_hidden))
        fc1, fc2 = nn.Linear(dims.vit_hidden, dims.vit_ffn), nn.Linear(dims.vit_ffn, dims.vit_hidden)
        self.mlp = nn.ModuleDict({"fc1": fc1, "fc2": fc2})

    def forward(self, x_PD: Tensor) -> Tensor:
        """[P, D] -> [P, D]."""
        x_PD = x_PD + self.ls1 * self.attn(self.norm1(x_PD))
        return x_PD + self.ls2 * self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x_PD))))


class Attention(nn.Module):
    """Projections of grouped-query attention; self-attention unless a subclass says otherwise."""

    def __init__(self, dims: RefDims, bias: bool, normed: bool = False) -> None:
        super().__init__()
        self.head_dim, self.theta, self.interpolation = dims.head_dim, dims.rope_theta, dims.interpolation
        if normed:
            self.q_norm, self.k_norm = (RMSNorm(dims.head_dim, dims.eps) for _ in range(2))
        self.q_proj = nn.Linear(dims.hidden, dims.heads * dims.head_dim, bias=bias)
        self.k_proj = nn.Linear(dims.hidden, dims.kv_heads * dims.head_dim, bias=bias)
        self.v_proj = nn.Linear(dims.hidden, dims.kv_heads * dims.head_dim, bias=bias)
        self.o_proj = nn.Linear(dims.heads * dims.head_dim, dims.hidden, bias=False)

    def project(self, x_SH: Tensor, kv_XH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[S, N, E], [X, G, E], [X, G, E]."""
        flat = self.q_proj(x_SH), self.k_proj(kv_XH), self.v_proj(kv_XH)
        q_SNE, k_XGE, v_XGE = (x.unflatten(1, (-1, self.head_dim)) for x in flat)
        return q_SNE, k_XGE, v_XGE

    def forward(self, x_SH: Tensor) -> Tensor:
        """Causal, with rotary positions: [S, H] -> [S, H]."""
        q_SNE, k_SGE, v_SGE = self.project(x_SH, x_SH)
        if hasattr(self, "q_norm"):  # every head of every token by itself
            q_SNE, k_SGE = self.q_norm(q_SNE), self.k_norm(k_SGE)
        q_SNE, k_SGE = (rotate(x, self.theta, self.interpolation) for x in (q_SNE, k_SGE))
        causal_SS = torch.ones(len(x_SH), len(x_SH), dtype=torch.bool).tril()
        return self.o_proj(attend(q_SNE, k_SGE, v_SGE, causal_SS))


class CrossAttention(Attention):
    """The gated branch: a norm only on the query side, no positions, no bias."""

    def __init__(self, dims: RefDims) -> None:
        super().__init__(dims, bias=False)
        self.norm = RMSNorm(dims.hidden, dims.eps)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, h_SH: Tensor, kv_XH: Tensor, visible_SX: Tensor) -> Tensor:
        """[S, H]: what is added to h."""
        q_SNE, k_XGE, v_XGE = self.project(self.norm(h_SH), kv_XH)
        return torch.tanh(self.gate) * self.o_proj(attend(q_SNE, k_XGE, v_XGE, visible_SX))


class DecoderLayer(nn.Module):
    """Self-attention, then gated cross-attention if the layer has it, then the SwiGLU MLP."""

    def __init__(self, dims: RefDims, has_cross: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(dims.hidden, dims.eps)
        self.self_attn = Attention(dims, bias=dims.qkv_bias, normed=dims.qk_norm)
        self.cross_attn = CrossAttention(dims) if has_cross else None
        self.post_attention_layernorm = RMSNorm(dims.hidden, dims.eps)
        gate, up = (nn.Linear(dims.hidden, dims.ffn, bias=False) for _ in range(2))
        down = nn.Linear(dims.ffn, dims.hidden, bias=False)
        self.mlp = nn.ModuleDict({"gate_proj": gate, "up_proj": up, "down_proj": down})

    def forward(self, h_SH: Tensor, kv_XH: Tensor, visible_SX: Tensor) -> Tensor:
        """[S, H] -> [S, H]."""
        h_SH = h_SH + self.self_attn(self.input_layernorm(h_SH))
        if self.cross_attn is not None:
            h_SH = h_SH + self.cross_attn(h_SH, kv_XH, visible_SX)
        x_SH = self.post_attention_layernorm(h_SH)
        return h_SH + self.mlp.down_proj(F.silu(self.mlp.gate_proj(x_SH)) * self.mlp.up_proj(x_SH))


class ReferenceNVLM(nn.Module):
    """The whole model; parameter names are those of the published NVLM-D weights, plus cross_attn.*."""

    def __init__(self, dims: RefDims) -> None:
        super().__init__()
        self.dims = dims
        encoder = nn.ModuleDict({"layers": nn.ModuleList(VisionLayer(dims) for _ in range(dims.vit_layers))})
        self.vision_model = nn.ModuleDict({"embeddings": VisionEmbeddings(dims), "encoder": encoder})
        self.vision_model.requires_grad_(False)
        norm = nn.LayerNorm(4 * dims.vit_hidden, eps=PROJECTOR_EPS)
        into = nn.Linear(4 * dims.vit_hidden, dims.hidden if dims.arch == "xattn" else dims.ffn, bias=False)
        self.mlp1 = nn.Sequential(norm, into)
        if dims.arch != "xattn":
            self.mlp1.extend([nn.GELU(), nn.Linear(dims.ffn, dims.hidden, bias=False)])
        words = nn.Embedding(dims.vocab, dims.hidden)
        layers = nn.ModuleList(DecoderLayer(dims, dims.has_cross(i)) for i in range(dims.layers))
        model = {"embed_tokens": words, "layers": layers, "norm": RMSNorm(dims.hidden, dims.eps)}
        lm_head = nn.Linear(dims.hidden, dims.vocab, bias=False)
        if dims.tied:
            lm_head.weight = words.weight
        self.language_model = nn.ModuleDict({"model": nn.ModuleDict(model), "lm_head": lm_head})
        norms = {"decoder": [], "xattn": ["tile_norm"], "hybrid": ["tile_norm", "tag_norm"]}[dims.arch]
        self.cross_keys = nn.ModuleDict({name: RMSNorm(dims.hidden, dims.eps) for name in norms})

    @torch.no_grad()
    def init(self, seed: int, std: float = 0.02, gates: float | None = 0.0) -> ReferenceNVLM:
        """Random weights: norms and layer scales near 1; gates as given; None: random, beyond +-0.5. Values depend only
        on (seed, name, shape), so models of other architectures or dtypes get the same ones."""
        near_one = ("norm.weight", "norm1.weight", "norm2.weight", "mlp1.0.weight", ".ls1", ".ls2")
        for name, parameter in self.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            value = 1 + 0.2 * noise if name.endswith(near_one) else std * noise
            if name.endswith(".gate"):
                value = 0.5 * noise.sign() + 0.2 * noise if gates is None else torch.full_like(noise, gates)
            parameter.copy_(value)
        return self

    def vision_features(self, tiles: dict[tuple[int, int], Tensor]) -> dict[tuple[int, int], Tensor]:
        """uint8 [3, px, px] -> [K, C] of each tile: encoder, class token dropped, pixel shuffle."""
        weight = self.vision_model.embeddings.patch_embedding.weight
        mean, std = weight.new_tensor(IMAGENET_MEAN), weight.new_tensor(IMAGENET_STD)
        features = {}
        for key, tile in tiles.items():
            if tile.dtype != torch.uint8 or tile.shape != (3, self.dims.image, self.dims.image):
                raise ValueError(f"tile {key} is {tile.dtype} {tuple(tile.shape)}, not uint8 [3, px, px]")
            pixels = (tile.to(weight) / 255 - mean[:, None, None]) / std[:, None, None]
            x_PD = self.vision_model.embeddings(pixels)
            for layer in self.vision_model.encoder.layers:
                x_PD = layer(x_PD)
            features[key] = pixel_shuffle(x_PD[1:], self.dims.patches_per_side)
        return features

    def words(self, ids: tuple[int, ...]) -> Tensor:
        """[len(ids), H]."""
        return self.language_model.model.embed_tokens(torch.tensor(ids, dtype=torch.long))

    def embed(self, segments: list[Segment], tiles: dict[tuple[int, int], Tensor]) -> Tensor:
        """[S, H] of the stream's segments; tiles are projected."""
        parts = [tiles[s.image, s.tile] if s.kind == "tile" else self.words(s.ids) for s in segments]
        return torch.cat([self.words(()), *parts])

    def keys(self, segments: list[Segment], tiles: dict[tuple[int, int], Tensor]) -> Tensor:
        """[X, H]: tiles and tags after their norms; binding adds a tile's normed mean tag to its tokens."""
        named = [s for s in segments if s.kind == "tag" and s.ids and self.dims.bind_tags != "none"]
        tags = {(s.image, s.tile): self.cross_keys["tag_norm"](self.bound(s.ids)) for s in named}
        parts = [self.words(())]
        for segment in segments:
            key = (segment.image, segment.tile)
            if segment.kind == "tag":
                parts.append(self.cross_keys["tag_norm"](self.words(segment.ids)))
                continue
            part = self.cross_keys["tile_norm"](tiles[key])
            parts.append(part + tags[key] if key in tags else part)
        return torch.cat(parts)

    def bound(self, ids: tuple[int, ...]) -> Tensor:
        """[H]: the mean of a tag's words; where order counts, word n is turned in the complex plane by n times a
        channel's frequency, channels h and h + H/2 being real and imaginary part."""
        words = self.words(ids)
        if self.dims.bind_tags == "ordered":
            half = words.shape[1] // 2
            angles = [[n * 10.0 ** (-h / half) for h in range(half)] for n in range(len(ids))]
            turns = torch.polar(torch.ones(len(ids), half, dtype=words.dtype), torch.tensor(angles, dtype=words.dtype))
            turned = torch.complex(words[:, :half], words[:, half:]) * turns
            words = torch.cat([turned.real, turned.imag], dim=1)
        return words.mean(dim=0)

    def logits(self, sample: RefSample) -> Tensor:
        """[S, V]."""
        check(sample, self.dims.arch)
        tiles = {key: self.mlp1(x_KC) for key, x_KC in self.vision_features(sample.tiles).items()}
        h_SH, kv_XH = self.embed(sample.stream, tiles), self.keys(sample.cross, tiles)
        visible_SX = visibility(sample, self.dims.arch, self.dims.tokens_per_tile, self.dims.latest)
        for layer in self.language_model.model.layers:
            h_SH = layer(h_SH, kv_XH, visible_SX)
        return self.language_model.lm_head(self.language_model.model.norm(h_SH))

    def forward(self, sample: RefSample) -> Tensor:
        """[S]: cross-entropy of each position, zero where its label is -100."""
        logits_SV = self.logits(sample)
        if len(sample.labels) != len(logits_SV):
            raise ValueError(f"{len(sample.labels)} labels for {len(logits_SV)} stream positions")
        return F.cross_entropy(logits_SV, torch.tensor(sample.labels), ignore_index=NO_LOSS, reduction="none")
