"""Rows under two budgets, and windows of steps: every record once, for any seed, step or number of replicas."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nvlm.arch import registry
from nvlm.commands.compose import compose_config
from nvlm.data.ahead import in_processes
from nvlm.data.batch import IGNORE, IMAGE, check_placeholders
from nvlm.data.images import image_size
from nvlm.data.loader import Steps, load_steps, plan_window
from nvlm.data.order import Drawn, Order
from nvlm.data.outline import build_processor, outline
from nvlm.data.pack import deal, pack
from nvlm.data.plans import Pictures
from nvlm.data.record import BadRecord, Record
from nvlm.data.samples import encode
from nvlm.data.share import decoding_seats
from nvlm.tiling import TAG_STYLES, plan_tiles

LENGTHS = st.lists(st.tuples(st.integers(1, 120), st.integers(0, 60)), max_size=60)


@cache
def processor(arch="hybrid", *overrides):
    return build_processor(compose_config(f"arch={arch}", *overrides), registry.placement_rule(arch))


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 255, (height, width, 3), dtype=np.uint8))


def talk(question, answer="Yes."):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@dataclass(frozen=True)
class Words:
    """Conversations of every length; every `spoilt`-th cannot be read."""

    count: int
    spoilt: int = 5

    def __len__(self):
        return self.count

    def name(self, index):
        return str(index)

    def __getitem__(self, index):
        if index % self.spoilt == self.spoilt - 1:
            raise BadRecord("spoilt")
        return Record(str(index), talk("so " * (index * 37 % 60)), [])


@dataclass(frozen=True)
class Given:
    """The given records."""

    records: tuple

    def __len__(self):
        return len(self.records)

    def __hash__(self):
        return id(self)

    def name(self, index):
        return self.records[index].id

    def __getitem__(self, index):
        return self.records[index]


def steps_of(records, rank=0, size=1, **changes):
    settings = dict(seed=1, steps=7, global_batch=6, micro_batch=2, row_length=90, window=3) | changes
    chosen = settings.pop("processor", processor())
    order = Order(settings.pop("seed"), settings.pop("global_batch"), (Drawn("", len(records)),))
    return Steps(records, chosen, order=order, data_rank=rank, data_size=size, **settings)


def rows_of(data):
    return [row for batch in data.micro_batches for row in batch.ids if row]


def same(a, b):
    """Whether two steps have the same micro-batches, bit for bit."""
    assert len(a.micro_batches) == len(b.micro_batches)
    for one, other in zip(a.micro_batches, b.micro_batches):
        for field in fields(one):
            x, y = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y, field.name
    return a.skipped == b.skipped and a.records == b.records


def test_micro_batches_of_a_step_have_one_length_if_asked():
    plain, even = (steps_of(Words(60), micro_batch=1, multiple=4, even=even) for even in (False, True))
    for step in range(3):
        differ, alike = ({batch.tokens.shape[1] for batch in steps[step].micro_batches} for steps in (plain, even))
        assert len(differ) > 1 and alike == {max(differ)}
        assert rows_of(plain[step]) == rows_of(even[step])


# --- rows ---


def first_fit(lengths, order, seq, cross):
    rows = []
    for i in order:
        a, b = lengths[i]
        row = next((row for row in rows if row[0] + a <= seq and row[1] + b <= cross), None)
        if row is None:
            rows.append(row := [0, 0, []])
        row[0], row[1] = row[0] + a, row[1] + b
        row[2].append(i)
    return [row[2] for row in rows]


@given(LENGTHS, st.integers(60, 200), st.sampled_from([60, 100, 300]), st.integers(1, 8))
def test_rows_hold_every_sample_once_within_both_budgets(lengths, seq, cross, at_least):
    rows = pack(lengths, seq, cross, at_least)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert len(rows) >= min(at_least, len(lengths))
    for row in rows:
        text, keys = (sum(lengths[i][which] for i in row) for which in (0, 1))
        assert len(row) == 1 or (text <= seq and keys <= cross)
    totals = [sum(lengths[i][0] for i in row) for row in rows]
    assert totals == sorted(totals, reverse=True)


@given(LENGTHS.filter(len), st.integers(120, 400), st.sampled_from([60, 100, 300]))
def test_rows_are_hardly_more_than_first_fit_decreasing_needs(lengths, seq, cross):
    order = sorted(range(len(lengths)), key=lambda i: -max(lengths[i][0] / seq, lengths[i][1] / cross))
    assert len(pack(lengths, seq, cross)) <= 1.05 * len(first_fit(lengths, order, seq, cross))


def padded(lengths, rows, micro_batch, which):
    """Share of real tokens if rows, longest first, are padded to the longest of their micro-batch."""
    totals = [sum(lengths[i][which] for i in row) for row in rows]
    parts = [totals[i : i + micro_batch] for i in range(0, len(totals), micro_batch)]
    return sum(totals) / sum(len(part) * max(part) for part in parts)


@pytest.mark.parametrize(("seq", "cross"), [(1200, 1200), (1200, 2400), (1200, 320), (2400, 640)])
def test_rows_are_full_of_what_binds_and_even_in_the_other(seq, cross):
    """First fit leaves the other budget uneven, so that rows of a micro-batch need padding."""
    rng = np.random.default_rng(0)
    texts, keys = np.minimum(rng.lognormal(4.5, 0.8, 1000), 600) + 1, rng.integers(0, 7, 1000) * 16
    lengths = [(int(a), int(b)) for a, b in zip(texts, keys)]
    ours, plain = pack(lengths, seq, cross), first_fit(lengths, range(1000), seq, cross)
    binding = int(keys.sum() / cross > texts.sum() / seq)
    assert sum(length[binding] for length in lengths) > 0.97 * len(ours) * (seq, cross)[binding]
    assert padded(lengths, ours, 8, 0) > 0.97
    assert padded(lengths, ours, 8, 1) > 0.93
    assert padded(lengths, ours, 8, 1 - binding) > padded(lengths, plain, 8, 1 - binding) + 0.01


@given(st.lists(st.integers(1, 100), max_size=50), st.integers(1, 9), st.integers(0, 99))
def test_steps_and_replicas_get_equal_work(totals, parts, seed):
    totals.sort(reverse=True)
    for hands in (deal(totals, parts, (seed, 0, parts)), [totals[rank::parts] for rank in range(parts)]):
        assert sorted((t for hand in hands for t in hand), reverse=True) == totals
        counts, sums = [len(hand) for hand in hands], [sum(hand) for hand in hands]
        assert max(counts) - min(counts) <= 1
        assert max(sums) - min(sums) <= max(totals, default=0)


# --- windows ---


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(3, 40),
    batch=st.integers(1, 8),
    window=st.integers(1, 5),
    steps=st.integers(1, 9),
    size=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_windows_hold_each_drawn_record_once_and_alike_on_all_replicas(count, batch, window, steps, size, seed):
    """Also across the boundary of an epoch, and if the run ends within a window."""
    words = Words(count)
    build = dict(seed=seed, steps=steps, global_batch=batch, window=window)
    whole = steps_of(words, **build)
    parts = [steps_of(words, rank, size, **build) for rank in range(size)]
    for start in range(0, steps, window):
        seen, drawn = Counter(), Counter()
        for step in range(start, min(start + window, steps)):
            drawn.update(str(i) for i in whole.order.step(step))
            alone, dealt = whole[step], [part[step] for part in parts]
            seen.update(name for row in rows_of(alone) for name in row)
            seen.update(name for name, _ in alone.skipped)
            assert Counter(rows_of(alone)) == Counter(row for data in dealt for row in rows_of(data))
            assert Counter(alone.skipped) == Counter(bad for data in dealt for bad in data.skipped)
            assert alone.records == sum(data.records for data in dealt)
            counts = [len(rows_of(data)) for data in dealt]
            assert max(counts) - min(counts) <= 1
        assert seen == drawn


@settings(max_examples=15, deadline=None)
@given(first=st.integers(0, 6), rank=st.integers(0, 1), window=st.integers(1, 5))
def test_any_step_comes_out_the_same_alone(first, rank, window):
    """A run stopped within a window resumes exactly, without saved loader state."""
    build = dict(size=2, window=window)
    unbroken = list(load_steps(steps_of(Words(20), rank, **build), 0, workers=0))[first:]
    plan_window.cache_clear()
    resumed = list(load_steps(steps_of(Words(20), rank, **build), first, workers=0))
    assert len(resumed) == len(unbroken) == 7 - first
    assert all(same(a, b) for a, b in zip(resumed, unbroken))


@settings(max_examples=20, deadline=None)
@given(window=st.integers(1, 5), ends=st.lists(st.integers(1, 11), max_size=2, unique=True).map(sorted))
def test_a_run_that_is_made_longer_keeps_its_finished_steps_and_leaves_nothing_out(window, ends):
    """Its last window was cut short by its former end."""
    lengths = [*ends, 12]
    runs = [steps_of(Words(60, spoilt=61), steps=n, window=window) for n in lengths]
    runs = [replace(run, ends=tuple(ends[:number])) for number, run in enumerate(runs)]
    longest = runs[-1]
    for run in runs:
        assert all(same(run[step], longest[step]) for step in range(len(run)))
    seen = Counter(name for step in range(12) for row in rows_of(longest[step]) for name in row)
    assert seen == Counter(str(i) for step in range(12) for i in longest.order.step(step))


def test_loader_workers_agree_with_this_process():
    steps = steps_of(Words(20))
    assert all(same(a, b) for a, b in zip(load_steps(steps, 1, workers=2), load_steps(steps, 1, workers=0)))


def test_a_window_mixes_its_steps_and_another_seed_mixes_otherwise():
    steps = steps_of(Words(1000, spoilt=1001), steps=4, global_batch=32, window=4, row_length=200)
    steps_in = [{step for step in range(4) if i in steps.order.step(step)} for i in range(1000)]
    held = [{s for row in rows_of(steps[step]) for name in row for s in steps_in[int(name)]} for step in range(4)]
    assert held == [{0, 1, 2, 3}] * 4
    tokens = [sum(batch.num_tokens for batch in steps[step].micro_batches) for step in range(4)]
    assert max(tokens) - min(tokens) <= 200
    assert rows_of(steps[0]) != rows_of(replace(steps, order=replace(steps.order, seed=2))[0])


def test_every_step_of_a_window_gets_a_row_where_the_records_suffice():
    steps = steps_of(Words(40, spoilt=41), steps=8, global_batch=2, window=8, row_length=10**4)
    assert all(rows_of(steps[step]) for step in range(8))


def test_the_number_of_micro_batches_is_rounded_up_with_empty_ones():
    single = steps_of(Words(40), row_length=40)[0]
    grouped = steps_of(Words(40), row_length=40, groups=4)[0]
    count = len(single.micro_batches)
    assert count % 4 != 0
    assert len(grouped.micro_batches) == math.ceil(count / 4) * 4
    assert rows_of(grouped) == rows_of(single)
    assert all(batch.num_tokens == 0 for batch in grouped.micro_batches[count:])


def test_all_micro_batches_of_a_run_can_have_one_length():
    steps = replace(steps_of(Words(40), row_length=40, groups=4), length=256)
    assert {batch.tokens.shape[1] for step in range(3) for batch in steps[step].micro_batches} == {256}
    assert all(rows_of(steps[step]) == rows_of(replace(steps, length=None)[step]) for step in range(3))


# --- lengths ---


@pytest.mark.parametrize("tag", TAG_STYLES)
@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_lengths_without_pixels_are_those_of_the_sample(tmp_path, arch, tag):
    wide, tall = tmp_path / "wide.jpg", tmp_path / "tall.png"
    picture(600, 100).save(wide)
    picture(100, 300).save(tall)
    cross = 0 if arch == "decoder" else 260
    roomy, tight = (
        processor(arch, f"tiling.tag={tag}", f"data.seq_length={500 * n}", f"data.cross_length={n * cross}")
        for n in (5, 1)
    )
    question = "First <image> then <image> and <image>?"
    records = [
        Record("none", talk("Nothing?"), []),
        Record("one", talk("What?"), [wide]),
        Record("three", talk(question), [wide, tall.read_bytes(), picture(80, 80)]),
        Record("more", talk("<image>" * 2 + question), [wide, wide, tall, wide, wide]),
    ]
    tiles = {}
    for chosen in (roomy, tight):
        for record in records:
            planned, sample = outline(record, chosen), encode(record, chosen)
            assert planned.lengths == (sample.tokens.numel(), sample.cross_tokens.numel())
            assert sum(plan.num_tiles for plan in planned.pictures.plans) == len(sample.pixels)
            tiles[chosen, record.id] = len(sample.pixels)
            assert planned.pictures.fewer_tiles == (len(sample.pixels) < tiles[roomy, record.id])
    assert tiles[tight, "more"] < tiles[roomy, "more"]
    assert tiles[roomy, "one"] == tiles[tight, "one"] == 7


def test_a_header_is_enough_for_a_size_and_is_checked_like_an_image(tmp_path):
    picture(400, 300).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:2000])
    assert image_size(tmp_path / "a.jpg", 10**6) == (400, 300)
    with pytest.raises(BadRecord, match="400 x 300 px, more than data.max_pixels=1000"):
        image_size(tmp_path / "a.jpg", 1000)
    with pytest.raises(BadRecord, match="gone.png: no such image"):
        image_size(tmp_path / "gone.png", 1000)


# --- bad records ---


def illustrated(tmp_path):
    """Nine records with an image each; number 2's is missing, and number 4's pixels are cut off."""
    for i in range(9):
        picture(120 + i, 120).save(tmp_path / f"{i}.jpg")
    (tmp_path / "2.jpg").unlink()
    (tmp_path / "4.jpg").write_bytes((tmp_path / "4.jpg").read_bytes()[:3000])
    return Given(tuple(Record(str(i), talk("What?"), [tmp_path / f"{i}.jpg"]) for i in range(9)))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_bad_record_is_reported_once_wherever_it_is_found(tmp_path, size):
    records = illustrated(tmp_path)
    parts = [steps_of(records, rank, size, steps=3, global_batch=3) for rank in range(size)]
    done = [agreed(part[step]) for part in parts for step in range(3)]
    reasons = dict(bad for data in done for bad in data.skipped)
    assert len([bad for data in done for bad in data.skipped]) == 2
    assert "no such image" in reasons["2"]
    assert "truncated" in reasons["4"]
    assert sorted(name for data in done for name in trained(data)) == ["0", "1", "3", "5", "6", "7", "8"]
    assert sum(data.records for data in done) == 9


def agreed(data):
    """The step of a replica of one rank, as it is trained on."""
    return data.without(data.failed)


def trained(data):
    """Ids of the samples with loss."""
    places = [(batch, place) for batch in data.micro_batches for place in (batch.labels != IGNORE).nonzero().tolist()]
    return {batch.ids[row][batch.sample[row, column]] for batch, (row, column) in places}


def test_a_row_of_broken_pixels_alone_learns_nothing(tmp_path):
    records = Given((illustrated(tmp_path)[4],))
    found = steps_of(records, steps=1, global_batch=1)[0]
    data = agreed(found)
    assert [name for name, _ in data.skipped] == ["4"]
    assert [batch.num_trained for batch in data.micro_batches] == [0]
    assert found.work.outputs > 0 and data.work.outputs == 0
    assert not data.micro_batches[0].pixels.any()


def test_a_record_that_is_gone_by_its_turn_keeps_its_place(tmp_path):
    """Its row was packed: a sample of the same size stands in, so that all ranks of a replica have the same rows."""

    @dataclass(frozen=True)
    class Going(Given):
        gone: list

        def __getitem__(self, index):
            if index in self.gone:
                raise BadRecord("gone")
            return self.records[index]

        __hash__ = Given.__hash__

    pictures = [picture(120 * (1 + i), 120) for i in range(3)]
    records = Going(tuple(Record(str(i), talk("<image> <image>?"), [pictures[i]] * 2) for i in range(3)), [])
    for arch in ("decoder", "xattn", "hybrid"):
        steps = steps_of(records, processor=processor(arch), steps=1, global_batch=3, row_length=900)
        (whole,) = steps[0].micro_batches
        records.gone.append(1)
        found = steps[0]
        records.gone.clear()
        (batch,) = found.micro_batches
        check_placeholders(batch)
        assert [(one.name, one.reason) for one in found.failed] == [("1", "gone")]
        assert found.failed[0].number == [name for row in whole.ids for name in row].index("1")
        for name in ("sample", "cross_tokens", "cross_tile", "cross_tags", "tile_tokens", "holder"):
            assert torch.equal(getattr(batch, name), getattr(whole, name)), name
        assert batch.pixels.shape == whole.pixels.shape
        assert trained(agreed(found)) == {"0", "2"}


# --- who decodes what ---


SIZES = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


@given(st.lists(st.lists(SIZES, max_size=4), max_size=12), st.integers(1, 9))
def test_images_are_dealt_to_seats_by_their_work(records, seats):
    known = [Pictures(tuple(sizes), tuple(plan_tiles(*size) for size in sizes), False) for sizes in records]
    dealt = decoding_seats(known, seats)
    assert [len(one) for one in dealt] == [len(sizes) for sizes in records]
    work, single = [0] * seats, [0]
    for pictures, found in zip(known, dealt):
        for (width, height), plan, seat in zip(pictures.sizes, pictures.plans, found):
            single.append(width * height + plan.num_tiles * 448**2)
            work[seat] += single[-1]
    assert max(work) - min(work) <= max(single)


@pytest.mark.parametrize("seats", [2, 3])
def test_the_seats_of_a_replica_have_each_picture_once(seats):
    sizes = [(120 * (1 + i % 4), 120 + i) for i in range(18)]
    pictures = [picture(*size) for size in sizes]
    records = Given(tuple(Record(str(i), talk("<image><image>?"), pictures[2 * i : 2 * i + 2]) for i in range(9)))
    build = dict(steps=1, global_batch=9, row_length=400, processor=processor("decoder", "data.seq_length=1000"))
    (whole, *parts) = [
        steps_of(records, **build, **seat)[0] for seat in [{}, *({"seat": n, "seats": seats} for n in range(seats))]
    ]
    for number, batch in enumerate(whole.micro_batches):
        here = [part.micro_batches[number] for part in parts]
        assert sum(len(one.pixels) for one in here) == len(batch.pixels)
        for seat, one in enumerate(here):
            assert torch.equal(one.pixels, batch.pixels[one.holder == seat])
            assert torch.equal(one.holder, here[0].holder) and torch.equal(one.tokens, batch.tokens)
    counts = [sum(len(batch.pixels) for batch in part.micro_batches) for part in parts]
    assert sum(counts) == whole.work.tiles == parts[0].work.tiles and min(counts) > 0


def test_an_image_that_changed_since_it_was_planned_stops_the_run(tmp_path):
    picture(600, 100).save(tmp_path / "a.png")
    steps = steps_of(Given((Record("a", talk("What?"), [tmp_path / "a.png"]),)), steps=1, global_batch=1)
    plan_window(steps, steps.window_of(0))
    picture(100, 100).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="sample a: 600 x 100 px when it was planned, 100 x 100 px now. Fix: do not"):
        steps[0]


@dataclass(eq=False)
class Changing:
    """A record that changes with every read: it gets more text and more images."""

    images: tuple
    reads: int = 0

    def __len__(self):
        return 1

    def name(self, index):
        return str(index)

    def __getitem__(self, index):
        self.reads += 1
        return Record("0", talk("What? " * self.reads), [*self.images] * self.reads)


@pytest.mark.parametrize(
    ("images", "says"), [((), "got .* text tokens .* expected"), ((picture(9, 9),), "2 images, 1")]
)
def test_a_record_that_changed_since_it_was_measured_stops_the_run(images, says):
    with pytest.raises(ValueError, match=f"sample 0: {says}.* Fix: do not change records or images"):
        steps_of(Changing(images), steps=1, global_batch=1)[0]


def test_headers_are_read_and_tiles_planned_once_a_record(tmp_path, monkeypatch):
    picture(600, 100).save(tmp_path / "a.png")
    read = []
    monkeypatch.setattr("nvlm.data.plans.image_size", lambda *args: read.append(args) or image_size(*args))
    records = Given(tuple(Record(str(n), talk("What?"), [tmp_path / "a.png"]) for n in range(4)))
    steps = steps_of(records, steps=2, global_batch=2, window=2)
    assert sum(len(batch.pixels) for step in range(2) for batch in steps[step].micro_batches) == 4 * 7
    assert len(read) == 4


@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_micro_batches_of_rows_with_many_images_keep_tiles_and_placeholders_together(arch):
    """Every run of placeholders shows its own sample's image, wherever the window packed it."""
    shades = [Image.new("RGB", (120 * (1 + i % 3), 120), (i, i, i)) for i in range(40)]
    records = Given(
        tuple(Record(str(i), talk("<image> <image>?"), [shades[2 * i], shades[2 * i + 1]]) for i in range(20))
    )
    chosen = processor(arch, "data.row_length=300", "data.cross_length=" + ("0" if arch == "decoder" else "400"))
    steps = steps_of(records, processor=chosen, steps=4, global_batch=5, micro_batch=3, row_length=300, window=4)
    seen = 0
    for step in range(4):
        for batch in steps[step].micro_batches:
            check_placeholders(batch)
            shades = batch.pixels.float().mean((1, 2, 3)).int()
            for columns, sample, rows in (
                (batch.tokens, batch.sample, batch.stream_rows),
                (batch.cross_tokens, batch.cross_sample, batch.cross_rows),
            ):
                places = (columns == IMAGE).nonzero().tolist()
                for (row, column), shade in zip(places, shades[batch.tiles_of(rows)].tolist(), strict=True):
                    number = int(batch.ids[row][sample[row, column]])
                    assert shade in (2 * number, 2 * number + 1)
            seen += int((batch.tokens == IMAGE).sum() + (batch.cross_tokens == IMAGE).sum())
    tiles = sum(len(encode(record, chosen).pixels) for record in records.records)
    assert seen == tiles * chosen.tile_tokens
    assert max(len(row) for step in range(4) for row in rows_of(steps[step])) > 1


def test_more_workers_than_cores_are_no_reason_for_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cores = len(os.sched_getaffinity(0))
        assert list(in_processes([1, 2, 3], cores + 1)) == [1, 2, 3]
