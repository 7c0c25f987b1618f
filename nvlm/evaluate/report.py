"""A run's report: report.html with held-out samples, whose tiles and tags are drawn on the images, and curves.png."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nvlm.config.values import Config
from nvlm.data.outline import Processor
from nvlm.evaluate.losses import Loss, shown_loss
from nvlm.evaluate.score import Score
from nvlm.inspect.document import environment
from nvlm.runs.files import write_whole
from nvlm.tiling.grid import TilePlan

_INK = (200, 30, 60)
_LONGEST = 480  # px, longest side of an image in the report


@dataclass(frozen=True, slots=True)
class Shown:
    """One held-out question in the report. `pictures`: (page, strip of tiles) of each image."""

    question: str
    pictures: tuple[tuple[Image.Image, Image.Image], ...]
    answer: str
    expected: str
    right: bool


def draw_pictures(
    plans: Sequence[TilePlan], pixels: Tensor, processor: Processor
) -> tuple[tuple[Image.Image, Image.Image], ...]:
    """Page and strip for each of `plans`, drawn from the encoder's input, `pixels` uint8 [T, 3, px, px]."""
    pictures = []
    for plan, tiles in zip(plans, pixels.split([plan.num_tiles for plan in plans]) if plans else ()):
        images = [Image.fromarray(tile.permute(1, 2, 0).numpy()) for tile in tiles]
        pictures.append((draw_page(plan, images, processor.tags(plan)), draw_strip(images)))
    return tuple(pictures)


def write_report(
    run_dir: Path,
    config: Config,
    shown: Sequence[Shown],
    score: Score,
    losses: Mapping[int, Mapping[str, Loss]],
) -> None:
    """Write curves.png, gallery/*.png and report.html into `run_dir`. `losses`: by step and source."""
    gallery = run_dir / "gallery"
    gallery.mkdir(exist_ok=True)
    draw_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")
    cards = []
    for number, one in enumerate(shown):
        names = [f"{number:02d}_{which}" for which in range(len(one.pictures))]
        for name, (page, strip) in zip(names, one.pictures):
            page.save(gallery / f"{name}_page.png")
            strip.save(gallery / f"{name}_tiles.png")
        cards.append((one, names))
    templates = environment("nvlm.evaluate")
    templates.filters["shown_loss"] = shown_loss
    page = templates.get_template("report.html.jinja").render(
        config=config,
        score=score,
        losses=losses,
        sources=list(dict.fromkeys(name for measured in losses.values() for name in measured)),
        cards=cards,
    )
    write_whole(run_dir / "report.html", page)


def draw_page(plan: TilePlan, tiles: Sequence[Image.Image], tags: Sequence[str]) -> Image.Image:
    """The page assembled from its tiles, longest side `_LONGEST` px, with each tile's outline and tag."""
    size = tiles[0].width
    cols, rows = (plan.cols, plan.rows) if plan.num_regular else (1, 1)
    page = Image.new("RGB", (cols * size, rows * size))
    for number, tile in enumerate(tiles[: cols * rows]):
        page.paste(tile, (number % cols * size, number // cols * size))
    side = max(1, min(size, _LONGEST // max(cols, rows)))
    page = page.resize((cols * side, rows * side))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for number in range(cols * rows):
        x, y = number % cols * side, number // cols * side
        draw.rectangle((x, y, x + side - 1, y + side - 1), outline=_INK)
        draw.text((x + 3, y + 2), tags[number], fill=_INK, font=font)
    return page


def draw_strip(tiles: Sequence[Image.Image]) -> Image.Image:
    """All tiles of an image side by side, the thumbnail last."""
    size, gap = tiles[0].width, 6
    strip = Image.new("RGB", ((size + gap) * len(tiles) - gap, size), "white")
    for number, tile in enumerate(tiles):
        strip.paste(tile, (number * (size + gap), 0))
    return strip


def draw_curves(metrics: Path, out: Path) -> None:
    """Plot loss, learning rate and speed over the steps of the file `metrics` into the image `out`."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    steps = [row["step"] for row in rows]
    for axis, (key, title) in zip(
        axes,
        (
            ("loss", "loss, mean over trained tokens"),
            ("lr", "learning rate"),
            ("tokens_per_second", "tokens/s"),
        ),
    ):
        axis.plot(steps, [row[key] for row in rows], linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=110)
    plt.close(figure)
