"""The run's report: report.html with held-out samples, their tiles and tags drawn on them, and curves.png."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image, ImageDraw, ImageFont

from nvlm.batch import Record
from nvlm.config import Config
from nvlm.data.chat import IMAGE_MARK
from nvlm.data.encode import Encoder
from nvlm.data.sources import decode_image
from nvlm.tiling import tile_image, tile_tags

_INK = (200, 30, 60)


@dataclass(frozen=True, slots=True)
class Shown:
    """One held-out question as the page shows it."""

    record: Record
    answer: str
    expected: str


def write_report(
    run_dir: Path,
    config: Config,
    shown: Sequence[Shown],
    exact_match: float,
    by_kind: Mapping[str, float],
    encoder: Encoder,
) -> None:
    """Write curves.png, gallery/*.png and report.html into `run_dir`."""
    gallery = run_dir / "gallery"
    gallery.mkdir(exist_ok=True)
    draw_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")
    cards = []
    for number, one in enumerate(shown):
        pictures = []
        for which, source in enumerate(one.record.images):
            image = decode_image(source, encoder.max_pixels).convert("RGB")
            name = f"{number:02d}_{which}"
            draw_tiles(image, encoder).save(gallery / f"{name}_page.png")
            draw_strip(image, encoder).save(gallery / f"{name}_tiles.png")
            pictures.append(
                f'<img src="gallery/{name}_page.png" alt="page with its tiles">'
                f'<img src="gallery/{name}_tiles.png" alt="tiles as the encoder sees them">'
            )
        question = next(m["content"] for m in one.record.messages if m["role"] == "user")
        cards.append(_card(question, one, "".join(pictures)))
    kinds = "".join(f"<tr><td>{html.escape(kind)}</td><td>{score:.0%}</td></tr>" for kind, score in by_kind.items())
    page = _PAGE.format(
        name=html.escape(config.name),
        score=f"{exact_match:.0%}",
        kinds=kinds,
        cards="".join(cards),
        arch=config.arch.name,
    )
    (run_dir / "report.html").write_text(page)


def draw_tiles(image: Image.Image, encoder: Encoder, longest: int = 480) -> Image.Image:
    """`image` (longest side at most `longest` px) with the tile grid and each tile's tag drawn on it."""
    plan = tile_image(image, encoder.max_tiles, "fast", encoder.tile_size).plan
    scale = min(1.0, longest / max(image.size)) if max(image.size) > longest else 1.0
    picture = image.resize((round(image.width * scale), round(image.height * scale)))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    tags = tile_tags(plan, encoder.tag, encoder.max_tiles, encoder.thumbnail_tag)
    wide, high = picture.width / plan.cols, picture.height / plan.rows
    for tile in range(plan.num_regular or 1):
        x, y = tile % plan.cols * wide, tile // plan.cols * high
        draw.rectangle((x, y, x + wide - 1, y + high - 1), outline=_INK)
        draw.text((x + 3, y + 2), tags[tile], fill=_INK, font=font)
    return picture


def draw_strip(image: Image.Image, encoder: Encoder) -> Image.Image:
    """All tiles of `image` side by side as the encoder sees them, the thumbnail last."""
    tiled = tile_image(image, encoder.max_tiles, "exact", encoder.tile_size)
    size, gap = encoder.tile_size, 6
    strip = Image.new("RGB", ((size + gap) * tiled.plan.num_tiles - gap, size), "white")
    for tile, pixels in enumerate(tiled.pixels):
        strip.paste(Image.fromarray(pixels.permute(1, 2, 0).numpy()), (tile * (size + gap), 0))
    return strip


def draw_curves(metrics: Path, out: Path) -> None:
    """Loss, learning rate and speed over the steps of metrics.jsonl, as a picture."""
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


def _card(question: str, one: Shown, pictures: str) -> str:
    right = one.answer == one.expected
    mark = "right" if right else "wrong"
    return (
        f'<article class="{mark}"><div class="pictures">{pictures}</div>'
        f"<p><b>{html.escape(question.replace(IMAGE_MARK, '').strip())}</b></p>"
        f"<p>model <code>{html.escape(one.answer)}</code> &nbsp; truth <code>{html.escape(one.expected)}</code>"
        f' &nbsp; <span class="mark">{mark}</span></p></article>'
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}: {score} exact match</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }}
img {{ max-width: 100%; border: 1px solid #ddd; vertical-align: top; margin: 0 .5rem .5rem 0; }}
article {{ border-left: 4px solid #2a8; padding: .5rem 1rem; margin: 1rem 0; background: #fafafa; }}
article.wrong {{ border-color: #c33; }} .mark {{ color: #2a8; }} .wrong .mark {{ color: #c33; }}
td {{ padding: 0 1rem 0 0; }} code {{ font-size: 1.1em; }}
</style></head><body>
<h1>{name}</h1>
<p>Architecture <b>{arch}</b>. Exact match over the held-out questions: <b>{score}</b>.</p>
<table>{kinds}</table>
<p><img src="curves.png" alt="training curves"></p>
<h2>Held-out samples</h2>
<p>Each page with the tiles that it was cut into, then the tiles as the encoder sees them, the thumbnail last.</p>
{cards}
</body></html>
"""
