"""A document that is longer than a sample: cut at a token, and its images with their pixels."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from PIL import Image

from nvlm.arch import registry
from nvlm.data.batch import IGNORE, IMAGE
from nvlm.data.messages import with_marks
from nvlm.data.outline import build_processor, outline
from nvlm.data.record import BadRecord, Record
from nvlm.data.samples import encode, fill


@pytest.fixture
def processor(configured):
    def build(arch="decoder", **changes):
        return replace(build_processor(configured(f"arch={arch}"), registry.placement_rule(arch)), **changes)

    return build


def document(*texts):
    sizes = [(112, 112), (336, 112), (112, 336), (224, 224), (100, 200)]
    images = [Image.new("RGB", size) for size in sizes[: len(texts) - 1]]
    return Record("r", [{"role": "document", "content": with_marks(texts)}], images)


def cut_at(processor, record, window):
    return encode(record, replace(processor, seq_length=window))


@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_any_window_gives_the_beginning_of_the_document(processor, arch):
    """Checked against the whole document with one tile per image: every window from the shortest to the whole."""
    whole = processor(arch, max_tiles=1, seq_length=10_000)
    record = document("Once upon", " a time", " there", " was one.")
    tokens = encode(record, whole).tokens.tolist()
    longest = 0
    for window in range(1, len(tokens) + 3):
        try:
            sample = cut_at(whole, record, window)
        except BadRecord as reason:
            assert "no text of the document fits" in str(reason) and not longest
            continue
        kept = sample.tokens.tolist()
        longest = max(longest, len(kept))
        assert len(kept) <= window and tokens[: len(kept)] == kept and len(kept) >= min(longest, window)
        assert len(sample.pixels) == len(sample.tile_tokens)
        learned = [label for label in sample.labels.tolist() if label != IGNORE]
        assert learned and kept[-1] == learned[-1]  # it ends in text, the last of which is learned
    assert longest == len(tokens)


def test_images_get_fewer_tiles_before_text_is_cut(processor):
    record = document("One", " two", " three")
    whole = encode(record, processor(seq_length=10_000))
    least = encode(record, processor(seq_length=10_000, max_tiles=1))
    assert len(whole.tokens) > len(least.tokens)
    fitted = cut_at(processor(), record, len(least.tokens))
    assert fitted.tokens.equal(least.tokens) and not outline(record, processor(seq_length=len(least.tokens))).cut
    shorter = cut_at(processor(), record, len(least.tokens) - 1)
    assert shorter.tokens.equal(least.tokens[:-1])  # without the end of the text
    assert outline(record, processor(seq_length=len(least.tokens) - 1)).cut


def test_an_image_whose_text_is_cut_off_goes_with_its_pixels(processor):
    least = processor(max_tiles=1)
    with_one = len(encode(document("One", " two"), replace(least, seq_length=10_000)).tokens)
    record = document("One", " two", " three")
    for window in range(with_one - 1, with_one + 20):  # the second image fits, but no text behind it
        sample = cut_at(least, record, window)
        assert len(sample.pixels) == 1 and sample.tokens[-1] != IMAGE


def test_keys_that_do_not_fit_cut_a_document_too(processor):
    one = processor("xattn", max_tiles=1)
    record = document("One", " two", " three")
    keys = len(encode(record, one).cross_tokens)
    sample = encode(record, replace(one, cross_length=keys - 1))
    assert len(sample.pixels) == 1 and len(sample.cross_tokens) == keys // 2


def test_a_plan_is_followed_when_the_pixels_are_read(processor):
    """As the loader does: planned once, laid out again from the pictures."""
    rng = random.Random(0)
    for _ in range(30):
        small = processor(seq_length=rng.randrange(20, 200))
        record = document(*(" word" * rng.randrange(1, 30) for _ in range(rng.randrange(1, 6))))
        try:
            planned = outline(record, small)
        except BadRecord:
            continue
        again = outline(record, small, pictures=planned.pictures)
        assert again == planned and again.lengths[0] <= small.seq_length
        assert fill(record, again, small).tokens.equal(encode(record, small).tokens)


def test_a_conversation_and_a_prompt_are_refused_instead(processor):
    small = processor(seq_length=20)
    text = "word " * 100
    with pytest.raises(BadRecord, match="the text takes"):
        outline(document(text), small, generate=True)
    talk = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(BadRecord, match="the text takes"):
        outline(Record("r", talk, []), small)
    assert len(encode(document(text), small).tokens) == 20
