"""The report shows what the encoder saw."""

from __future__ import annotations

import numpy as np
from PIL import Image

from nvlm.arch import registry
from nvlm.data.outline import build_processor, outline
from nvlm.data.record import Record
from nvlm.data.samples import fill
from nvlm.evaluate.losses import InTurn, Loss, add_losses, read_losses, told_losses
from nvlm.evaluate.report import Shown, draw_pictures, write_report
from nvlm.evaluate.score import score_of

NOTHING_RIGHT = score_of([{"score": 0.0, "category": ""}], "heldout", "exact_match", 1, "", 0)


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
    write_report(tmp_path, config, [Shown("1 < 2?", (), "yes", "no", right=False)], NOTHING_RIGHT, {})
    page = (tmp_path / "report.html").read_text()
    assert "1 &lt; 2?" in page and 'class="wrong"' in page


def _text(processor):
    record = Record("r", [{"role": "user", "content": "hi"}], [])
    return record, outline(record, processor, generate=True), processor


def test_losses_are_kept_by_step_and_shown_by_source(configured, tmp_path):
    first = {"text": Loss(2.5, 10, 3, 0), "pages": Loss(None, 0, 1, 1)}
    add_losses(tmp_path, 0, first)
    measured = add_losses(tmp_path, 700, {"text": Loss(0.25, 10, 3, 0)})
    assert measured == read_losses(tmp_path) == {0: first, 700: {"text": Loss(0.25, 10, 3, 0)}}
    assert told_losses(first, 0) == "heldout loss at step 0: text 2.5000  pages -  skipped 1"
    write_report(tmp_path, configured("arch=decoder"), [], NOTHING_RIGHT, measured)
    page = (tmp_path / "report.html").read_text()
    assert "<tr><th></th><th>step 0</th><th>step 700</th></tr>" in page
    assert "<td>text</td><td>2.5000</td><td>0.2500</td>" in page and "<td>pages</td><td>-</td><td>-</td>" in page


def test_a_run_that_measured_nothing_shows_no_losses(configured, tmp_path):
    assert read_losses(tmp_path) == {}
    write_report(tmp_path, configured("arch=decoder"), [], NOTHING_RIGHT, {})
    assert "loss per trained token" not in (tmp_path / "report.html").read_text()


def test_each_record_is_measured_once():
    order = InTurn(records=7, global_batch=3)
    assert [order.step(step) for step in range(4)] == [[0, 1, 2], [3, 4, 5], [6], []]
