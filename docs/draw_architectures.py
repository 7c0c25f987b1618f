"""Draw decoder.png, xattn.png and hybrid.png beside this file: where tiles, tags and text go.

Usage: python docs/draw_architectures.py

Positions are pixels, y upwards. The page, the vision path, the decoder and the text stream stand at the same
place in all three; they differ in the row between, which shows where the projector's tokens go.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import dist
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

WIDTH, HEIGHT, DPI = 900, 520, 100

INK, LINE, FRAME = "#1f2933", "#52606d", "#f5f7fa"
VISION, TEXT, TAG = "#8ec5f4", "#d5dae1", "#f6c453"
# (fill, edge, line style) of what never learns, always learns, learns in fine-tuning alone, has no weights.
FROZEN = ("#e4e7eb", "#7b8794", "--")
TRAINED = ("#c6ead0", "#2f855a", "-")
SFT_ONLY = ("#ffffff", "#2f855a", "-")
FIXED = ("#ffffff", "#7b8794", "-")

TILE, TALL = 40, 38  # a token run in a row: width of a tile, height
TAG_WIDTH = {"1": 78, "2": 78, "6": 78, "global": 118}
STREAM_Y, ROW_Y = 74, 226  # bottoms of the runs in the text stream and in the row between
STREAM_TOP, ROW_TOP, BRANCH_Y, PATH_Y = 124, 312, 330, 350
PROJECTOR_X = 598
LLM_X, LLM_WIDTH = 714, 172
CROSS_Y = 251  # the arrow into cross-attention


@dataclass(frozen=True, slots=True)
class Box:
    x: float
    y: float
    w: float
    h: float

    @property
    def mid(self) -> float:
        return self.x + self.w / 2

    @property
    def top(self) -> float:
        return self.y + self.h

    @property
    def right(self) -> float:
        return self.x + self.w


def label(ax: Axes, x: float, y: float, text: str, size: float = 17, ha: str = "center", **style) -> None:
    """`size` in pixels."""
    style = {"color": INK, "zorder": 4, "va": "center", "linespacing": 1.15} | style
    ax.text(x, y, text, fontsize=size * 72 / DPI, ha=ha, **style)


def box(
    ax: Axes, b: Box, text: str = "", look: tuple[str, str, str] = FIXED, size: float = 17, corner: float = 6
) -> Box:
    fill, edge, line = look
    shape = f"round,pad=0,rounding_size={corner}"
    ax.add_patch(FancyBboxPatch((b.x, b.y), b.w, b.h, boxstyle=shape, fc=fill, ec=edge, ls=line, lw=1.4, zorder=2))
    label(ax, b.mid, b.y + b.h / 2 - 1, text, size)
    return b


def frame(ax: Axes, b: Box) -> Box:
    return box(ax, b, look=(FRAME, "#cbd2d9", "-"), corner=8)


def run(ax: Axes, x: float, y: float, text: str, colour: str, width: float, size: float = 17) -> Box:
    """A run of tokens in a row."""
    return box(ax, Box(x, y, width, TALL), text, (colour, LINE, "-"), size, corner=3)


def tile(ax: Axes, x: float, y: float, name: str) -> Box:
    return run(ax, x, y, name, VISION, TILE)


def tag(ax: Axes, x: float, y: float, name: str) -> Box:
    return run(ax, x, y, f"<tile_{name}>", TAG, TAG_WIDTH[name], size=16)


def arrow(ax: Axes, *points: tuple[float, float], line: str = "-") -> None:
    """Along `points`; the head stands at the last."""
    before, end = points[-2:]
    neck = tuple(e + (b - e) * 8 / dist(before, end) for b, e in zip(before, end, strict=True))
    ax.plot(*zip(*points[:-1], neck, strict=True), color=LINE, lw=1.8, ls=line, zorder=3)
    head = dict(arrowstyle="-|>", color=LINE, lw=0, shrinkA=0, shrinkB=0, mutation_scale=15)
    ax.annotate("", end, neck, arrowprops=head, zorder=3)


def page(ax: Axes) -> None:
    """3 x 2 tiles and the thumbnail."""
    whole = frame(ax, Box(14, PATH_Y, 170, 86))
    corners = [(22 + 36 * (k % 3), PATH_Y + 43 - 36 * (k // 3)) for k in range(6)] + [(140, PATH_Y + 25)]
    for (x, y), name in zip(corners, "123456T", strict=True):
        ax.add_patch(Rectangle((x, y), 36, 36, fc="white", ec=LINE, lw=1.2, zorder=2))
        label(ax, x + 18, y + 17, name)
    label(ax, whole.mid, 450, "page: tiles 1..n")
    label(ax, whole.mid, 334, "and thumbnail T")
    arrow(ax, (whole.right, PATH_Y + 43), (210, PATH_Y + 43))


def vision_path(ax: Axes, projector: str) -> None:
    vit = box(ax, Box(210, PATH_Y, 120, 86), "InternViT\nfrozen", FROZEN)
    shuffle = box(ax, Box(356, PATH_Y, 144, 86), "pixel shuffle\n1024 -> 256\ntokens per tile", size=16)
    last = box(ax, Box(526, PATH_Y, 2 * (PROJECTOR_X - 526), 86), f"projector:\n{projector}", TRAINED)
    for left, right in ((vit, shuffle), (shuffle, last)):
        arrow(ax, (left.right, PATH_Y + 43), (right.x, PATH_Y + 43))


def decoder(ax: Axes, cross: bool) -> None:
    """The layer stack, with the stream coming in from below."""
    mid, inner = LLM_X + LLM_WIDTH / 2, dict(x=LLM_X + 10, w=LLM_WIDTH - 20)
    frame(ax, Box(LLM_X, 142, LLM_WIDTH, 300))
    label(ax, mid, 424, "decoder layers")
    attention = box(ax, Box(y=154 if cross else 186, h=40, **inner), "self-attention", SFT_ONLY)
    mlp = box(ax, Box(y=352 if cross else 320, h=40, **inner), "MLP", SFT_ONLY)
    stack = [attention, mlp]
    if cross:
        text = "gated cross-\nattention,\nevery k-th layer;\ntanh gate\nstarts at 0"
        stack.insert(1, box(ax, Box(y=CROSS_Y - 37, h=118, **inner), text, TRAINED, size=16))
    arrow(ax, (mid, STREAM_TOP), (mid, attention.y))
    for below, above in pairwise(stack):
        arrow(ax, (mid, below.top), (mid, above.y))
    arrow(ax, (mid, 442), (mid, 468))
    label(ax, mid, 480, "next token")


def stream(ax: Axes) -> None:
    frame(ax, Box(14, STREAM_Y - 12, WIDTH - 28, STREAM_TOP - STREAM_Y + 12))
    label(ax, 828, STREAM_Y + TALL / 2, "text stream")


def words(ax: Axes, x: float) -> Box:
    return run(ax, x, STREAM_Y, "text", TEXT, 52)


def legend(ax: Axes) -> None:
    entries = (
        (20, VISION, LINE, "-", "vision tokens"),
        (184, TAG, LINE, "-", "tag"),
        (262, TEXT, LINE, "-", "text"),
        (346, *FROZEN, "frozen"),
        (455, *TRAINED, "trained"),
        (570, *SFT_ONLY, "trained in fine-tuning only"),
    )
    for x, fill, edge, line, name in entries:
        box(ax, Box(x, 18, 22, 18), look=(fill, edge, line), corner=3)
        label(ax, x + 29, 21, name, ha="left", va="baseline")


def canvas(name: str, subtitle: str) -> Axes:
    figure = plt.figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.axis("off")
    label(ax, 16, 484, name, 26, ha="left", va="baseline", weight="bold")
    label(ax, 146, 484, subtitle, 19, ha="left", va="baseline")
    return ax


def tagged(ax: Axes, x: float, y: float, names: tuple[str, ...]) -> list[tuple[Box, Box]]:
    """(tag, tile) runs from `x` on, dots before tile 6."""
    pairs = []
    for name in names:
        if name == "6":
            label(ax, x + 12, y + TALL / 2, "...")
            x += 28
        front = tag(ax, x, y, name)
        pairs.append((front, tile(ax, front.right + 2, y, "T" if name == "global" else name)))
        x = pairs[-1][1].right + 7
    return pairs


def draw_decoder(ax: Axes) -> None:
    decoder(ax, cross=False)
    vision_path(ax, "two-layer MLP")
    pairs = tagged(ax, words(ax, 24).right + 7, STREAM_Y, ("1", "2", "6", "global"))
    words(ax, pairs[-1][1].right + 7)
    frame(ax, Box(14, ROW_Y - 14, 682, ROW_TOP - ROW_Y + 14))
    label(ax, 26, ROW_TOP - 20, "every tile enters the stream behind its tag, thumbnail last", ha="left")
    arrow(ax, (PROJECTOR_X, PATH_Y), (PROJECTOR_X, ROW_TOP))
    for _, place in pairs:
        arrow(ax, (place.mid, ROW_Y), (place.mid, place.top))
    for (_, place), name in zip(pairs, "126T", strict=True):
        tile(ax, place.x, ROW_Y, name)
    label(ax, (pairs[1][1].right + pairs[2][1].x) / 2, ROW_Y + TALL / 2, "...")


def draw_xattn(ax: Axes) -> None:
    decoder(ax, cross=True)
    vision_path(ax, "one linear")
    x = words(ax, 24).right + 24
    row = frame(ax, Box(14, ROW_Y - 14, 650, ROW_TOP - ROW_Y + 14))
    label(ax, 26, ROW_TOP - 20, "keys and values: all tiles and the thumbnail", ha="left")
    for name in ("1", "2", "6", "global"):
        if name == "6":
            label(ax, x + 10, STREAM_Y + TALL / 2, "...")
            label(ax, x + 10, ROW_Y + TALL / 2, "...")
            x += 42
        front = tag(ax, x, STREAM_Y, name)
        key = tile(ax, front.mid - TILE / 2, ROW_Y, "T" if name == "global" else name)
        arrow(ax, (front.mid, front.top), (front.mid, key.y), line=":")
        x = front.right + 24
    later = words(ax, x)
    arrow(ax, (later.mid, later.top), (later.mid, row.y), line=":")
    label(ax, 24, 166, "each tag\nsees only\nits own tile", 16, ha="left")
    label(ax, later.mid - 10, 166, "later text\nsees all", 16, ha="right")
    arrow(ax, (PROJECTOR_X, PATH_Y), (PROJECTOR_X, ROW_TOP))
    arrow(ax, (row.right, CROSS_Y), (LLM_X + 10, CROSS_Y))


def draw_hybrid(ax: Axes) -> None:
    decoder(ax, cross=True)
    vision_path(ax, "two-layer MLP")
    ((_, place),) = tagged(ax, words(ax, 24).right + 7, STREAM_Y, ("global",))
    words(ax, place.right + 7)
    thumbnail = tile(ax, place.x, ROW_Y, "T")
    label(ax, thumbnail.x - 8, ROW_Y + TALL / 2, "thumbnail", ha="right")
    row = frame(ax, Box(256, ROW_Y - 36, 432, ROW_TOP - ROW_Y + 36))
    label(ax, row.mid, ROW_TOP - 16, "keys and values: regular tiles")
    label(ax, row.mid, ROW_Y - 20, "each tag stands beside and is added to its tile", 16)
    for front, key in tagged(ax, row.x + 12, ROW_Y, ("1", "2", "6")):
        add(ax, front, key)
    arrow(ax, (PROJECTOR_X, PATH_Y), (PROJECTOR_X, ROW_TOP))
    arrow(ax, (PROJECTOR_X, BRANCH_Y), (thumbnail.mid, BRANCH_Y), (thumbnail.mid, thumbnail.top))
    arrow(ax, (thumbnail.mid, thumbnail.y), (place.mid, place.top))
    arrow(ax, (row.right, CROSS_Y), (LLM_X + 10, CROSS_Y))


def add(ax: Axes, front: Box, key: Box) -> None:
    """A tag's embedding added to its tile."""
    y = front.top + 11
    xs, ys = (front.mid, front.mid, key.mid, key.mid), (front.top, y, y, key.top)
    ax.plot(xs, ys, color=LINE, lw=1.8, zorder=3)
    ax.plot(key.mid, y, "o", ms=12, mfc=TAG, mec=LINE, mew=1.2, zorder=4)
    ax.plot(key.mid, y, "+", ms=8, mec=INK, mew=1.6, zorder=5)


DRAWINGS = {
    "decoder": ("NVLM-D", "tags and tiles in the text stream", draw_decoder),
    "xattn": ("NVLM-X", "tags in the stream, tiles by cross-attention", draw_xattn),
    "hybrid": ("NVLM-H", "thumbnail in the stream, tiles by cross-attention", draw_hybrid),
}


def save(ax: Axes, path: Path) -> None:
    """With a palette: a third of the bytes."""
    ax.figure.canvas.draw()
    image = Image.frombytes("RGBA", (WIDTH, HEIGHT), bytes(ax.figure.canvas.buffer_rgba()))
    image.convert("RGB").quantize(64).save(path, optimize=True)
    plt.close(ax.figure)


def main() -> None:
    for file, (name, subtitle, draw) in DRAWINGS.items():
        ax = canvas(name, subtitle)
        page(ax)
        stream(ax)
        draw(ax)
        legend(ax)
        save(ax, Path(__file__).with_name(f"{file}.png"))


if __name__ == "__main__":
    main()
