"""The report shows what the encoder saw."""

from __future__ import annotations

import numpy as np
from PIL import Image

from nvlm.arch import registry
from nvlm.data.outline import build_processor, outline
from nvlm.data.record import Record
from nvlm.data.samples import fill
from nvlm.evaluate.report import Shown, draw_pictures, write_report


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_pictures_are_made_of_the_tiles_that_the_encoder_got(configured):
    """Even if an image got fewer tiles so that it fits."""
    messages = [{"role": "user", "content": "<image><image>?"}]
    record = Record("r", messages, [picture(600, 100), picture(90, 90)])
    config = configured("arch=decoder", "data.seq_length=140", "tiling.max_tiles=6", "tiling.tag=none")
    processor = build_processor(config, registry.placement_rule("decoder"))
    sketch = outline(record, processor, generate=True)
    assert sketch.pictures.fewer_tiles and sketch.pictures.plans[0].num_regular < 6
    sample = fill(record, sketch, processor)
    pictures = draw_pictures(sketch.pictures.plans, sample.pixels, processor)
    first, size = 0, processor.tile_size
    for plan, (page, strip) in zip(sketch.pictures.plans, pictures, strict=True):
        tiles = sample.pixels[first : first + plan.num_tiles].permute(0, 2, 3, 1).numpy()
        first += plan.num_tiles
        drawn = np.asarray(strip)
        for number, tile in enumerate(tiles):
            left = number * (size + 6)
            assert np.array_equal(drawn[:, left : left + size], tile)
        cols, rows = (plan.cols, plan.rows) if plan.num_regular else (1, 1)
        assert page.width * rows == page.height * cols
        inside = np.asarray(page)[20 : page.height // rows - 5, 5 : page.width // cols - 5]
        if page.width == cols * size:
            assert np.array_equal(inside, tiles[0][20 : size - 5, 5 : size - 5])
    assert first == len(sample.pixels)


def test_a_question_without_pictures_has_a_card(configured, tmp_path):
    config = configured("arch=decoder")
    processor = build_processor(config, registry.placement_rule("decoder"))
    assert draw_pictures((), fill(*_text(processor)).pixels, processor) == ()
    write_report(tmp_path, config, [Shown("1 < 2?", (), "yes", "no")], 0.0, {"all": 0.0})
    page = (tmp_path / "report.html").read_text()
    assert "1 &lt; 2?" in page and 'class="wrong"' in page


def _text(processor):
    record = Record("r", [{"role": "user", "content": "hi"}], [])
    return record, outline(record, processor, generate=True), processor
