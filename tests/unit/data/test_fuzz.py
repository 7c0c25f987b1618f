"""Damaged rows, files and images: each is used or refused as a bad record, in bounded time and memory.

A few hundred of each in `make test`, 20,000 in `make test-all`. Everything is drawn from a seed, which a failure shows.
"""

from __future__ import annotations

import copy
import functools
import gzip
import io
import json
import random
import resource
import signal
import tarfile
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvlm.arch.registry import placement_rule
from nvlm.config.data import TASKS
from nvlm.config.values import ConfigError
from nvlm.data.forms import auto, mmc4, obelics, text
from nvlm.data.forms.tasks import task_form
from nvlm.data.messages import NoAnswer, first_question
from nvlm.data.outline import build_processor, outline
from nvlm.data.record import BadRecord, Record, one_record
from nvlm.data.samples import encode
from nvlm.data.sources import memory
from nvlm.data.sources.registry import build_records

MANY = [300, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
SECONDS = 10  # for one record; a usual one takes milliseconds, but machines are shared
MEMORY = 1 << 30  # bytes beyond what the process has when the test starts
MAX_PIXELS = 1 << 20


class Hang(BaseException):
    """A record took too long."""


@contextmanager
def bounded():
    """Limits on memory, within which no MemoryError may occur, and a function that limits a record's time."""

    def late(*_):
        raise Hang

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield lambda: signal.setitimer(signal.ITIMER_REAL, SECONDS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def processor(configured):
    config = configured("arch=decoder", f"data.max_pixels={MAX_PIXELS}", "data.seq_length=2000")
    return build_processor(config, placement_rule("decoder"))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of images beside a secret, which no record may reach."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for place in ("root/a.png", "root/sub/b.png", "outside/secret.png"):
        Image.new("RGB", (60, 40), "red").save(tmp_path / place)
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
    (tmp_path / "root" / "way").symlink_to(tmp_path / "outside")
    return tmp_path / "root"


# Rows

REGIONS = {"image": "a.png", "text": ["EXIT", "7"], "boxes": [[0, 0, 30, 20], [1, 1, 9, 1, 9, 9, 1, 9]]}
PARTS = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
ROWS = [
    {
        "messages": [{"role": "user", "content": "<image> hi"}, {"role": "assistant", "content": "yes", "loss": True}],
        "images": ["a.png"],
        "id": "x",
    },
    {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "no", "weight": 1}]},
    {"conversations": [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "yes"}], "image": "a.png"},
    {"messages": [{"role": "document", "content": "a <image> b"}], "images": [{"bytes": None, "path": "sub/b.png"}]},
    {"text": "Some words."},
    {"image": {"bytes": None, "path": "a.png"}, "question": "What?", "answer": "red", "caption": "A square."},
    {"image": "a.png", "question": "What?", "options": ["red", "blue"], "answer": "B"},
    REGIONS,
    {"images": ["a.png", None, {"bytes": None, "path": "sub/b.png"}, None], "texts": [None, "a", None, "b"]},
    {"text_list": ["a", "b"], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]},
]
DOCUMENTS = {form.__name__: functools.partial(form.read, most_images=2) for form in (obelics, mmc4)}
FORMS = {"auto": auto.read, "text": text.read, **DOCUMENTS, **{task: task_form(task, 0) for task in TASKS}}


def nested(depth: int) -> list:
    return functools.reduce(lambda inside, _: [inside], range(depth), [])


DEEP = nested(5000)  # too deep to be copied or changed
VALUES = [
    *(None, True, False, 0, 1, -1, 7, 10**30, 0.5, 1e308, float("nan"), float("inf"), "", " ", "a.png", "sub/b.png"),
    *("../outside/secret.png", "/etc/passwd", "link.png", "way/secret.png", ".", "a.png/x", "\0", "\ud800", "<image>"),
    *("\\<image>", "<|im_end|>", "user", "assistant", "document", "http://a.b/c.png", "file:///etc/passwd", "x" * 9999),
    *("data:image/png;base64,AAAA", "\u202e\x1b[2J", [], {}, [[]], [None], b"", b"\x89PNG\r\n\x1a\n", {"bytes": b"?"}),
    *({"path": "../outside/secret.png"}, {"bytes": "AAAA"}, nested(50), DEEP, {"a": {"b": {}}}, (), "\\" * 99),
]
TEXTS = [value for value in VALUES if isinstance(value, str)]
KEYS = ["messages", "conversations", "images", "image", "text", "boxes", "options", "answer", "id", "role", "content"]
KEYS += [
    "texts",
    "text_list",
    "image_info",
    "image_name",
    "matched_text_index",
    "from",
    "value",
    "type",
    "path",
    "bytes",
    "loss",
    "weight",
    "video",
    "tools",
    "",
    "\ud800",
]


def places(value, path=()):
    """The paths of all values within `value`."""
    yield path
    if isinstance(value, dict | list) and value is not DEEP:
        for key, inside in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield from places(inside, (*path, key))


def mutated(row, rng: random.Random):
    """`row` with one to four changes."""
    row = copy.deepcopy(row)
    for _ in range(rng.choice((1, 1, 2, 4))):
        path = rng.choice([path for path in places(row) if len(path) < 9])
        if not path:
            row = rng.choice(VALUES) if rng.random() < 0.05 else row
            continue
        inside = functools.reduce(lambda value, key: value[key], path[:-1], row)
        change(inside, path[-1], rng)
        if not isinstance(row, dict | list):
            break
    return row


def change(inside, key, rng: random.Random) -> None:
    """Change one value of a dict or list in place."""
    kind = rng.randrange(6)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, list):
        inside.insert(key, rng.choice(inside))
    elif kind == 1:
        inside[rng.choice(KEYS)] = inside.pop(key)
    elif kind == 2 and isinstance(inside[key], str) and inside[key]:
        place = rng.randrange(len(inside[key]))
        inside[key] = inside[key][:place] + rng.choice(TEXTS)[:40] + inside[key][place:]
    elif kind == 3:
        inside[key] = [inside[key]] * rng.randrange(4)
    else:
        value = rng.choice(VALUES)
        inside[key] = value if value is DEEP else copy.deepcopy(value)


def use(record: Record, processor, root: Path) -> None:
    """What training and evaluation do with a record."""
    for image in record.images:
        assert not isinstance(image, Path) or image.is_relative_to(root.resolve())
    sample = encode(record, processor)
    assert sample.tokens.numel() <= processor.seq_length and record.id.isprintable()
    with suppress(NoAnswer):
        outline(first_question(record)[0], processor, generate=True)


@pytest.mark.parametrize("count", MANY)
def test_mutated_rows_are_used_or_refused_in_every_form(root, processor, count):
    """Forms raise nothing but BadRecord by themselves."""
    outcomes = Counter()
    with bounded() as begin:
        for seed in range(count):
            rng = random.Random(seed)
            row = mutated(rng.choice(ROWS), rng)
            for form in (auto.read, FORMS[rng.choice(list(FORMS))]):
                begin()
                try:
                    use(memory.records([row], root, form)[0], processor, root)
                    outcomes["used"] += 1
                except BadRecord as reason:
                    assert str(reason), seed
                    outcomes["refused"] += 1
                except BaseException as error:
                    raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert min(outcomes[kind] for kind in ("used", "refused")) > count / 10, outcomes


# Files


def file_of(kind: str, rows: list[dict], folder: Path) -> tuple[Path, Path]:
    """What a source with `rows` is named by, and the file of it that is damaged."""
    path = folder / f"r.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "txt":
        path.write_text("Some words, é.\n", encoding="utf-8")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif kind == "tar":
        image = (folder / "a.png").read_bytes()
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, row in enumerate(rows):
                for name, data in ((f"{number}.json", json.dumps(row).encode()), (f"{number}.png", image)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    else:
        return table_of(kind, rows, path)
    return path, path


def table_of(kind: str, rows: list[dict], path: Path) -> tuple[Path, Path]:
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    columns = [{"messages": row["messages"], "images": row["images"]} for row in rows]
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(columns), path, row_group_size=2)
        return path, path
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(columns).save_to_disk(path)
    return path, next(path.glob("*.arrow"))


def damaged(data: bytes, rng: random.Random) -> bytes:
    """`data` with bytes flipped, cut, repeated, inserted, or set."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if not found:
            break
        at, length = rng.randrange(len(found)), rng.choice((1, 1, 2, 4, 40))
        kind = rng.randrange(6)
        if kind == 0:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del found[at : at + length]
        elif kind == 3:
            found[at:at] = found[at : at + length]
        elif kind == 4:
            found[at : at + length] = bytes([rng.choice((0, 255, 34, 91, 92, 123, 125))]) * length
        elif rng.random() < 0.2:
            del found[at:]
    return bytes(found)


SOURCES = {
    "jsonl": "jsonl",
    "json": "llava",
    "jsonl.gz": "jsonl",
    "txt": "text",
    "parquet": "parquet",
    "tar": "webdataset",
}
SOURCES["saved"] = "datasets"


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("kind", SOURCES)
def test_damaged_files_are_refused_or_give_records_that_are_used_or_refused(root, processor, configured, kind, count):
    good = [ROWS[0] | {"id": str(number)} for number in range(4)]
    if kind == "tar":
        good = [{key: row[key] for key in ("messages", "id")} for row in good]
    place, path = file_of(kind, good, root)
    whole = path.read_bytes()
    data = configured(f"data={SOURCES[kind]}", f"data.path={place}", f"data.root={root}").data
    outcomes = Counter()
    with bounded() as begin:
        for seed in range(count):
            rng = random.Random(seed)
            path.write_bytes(damaged(whole, rng))
            begin()
            try:
                records = build_records(data, seed=0)
            except ConfigError as error:
                assert str(error).startswith("data.path: got ") and "\n" not in str(error), seed
                outcomes["file refused"] += 1
                continue
            for index in range(len(records)):
                begin()
                try:
                    with one_record():
                        use(records[index], processor, root)
                    outcomes["used"] += 1
                except BadRecord:
                    assert records.name(index)
                    outcomes["refused"] += 1
                except BaseException as error:
                    raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert outcomes["used"] and outcomes["refused"] + outcomes["file refused"], outcomes


# Images


def scene(mode: str) -> Image.Image:
    """A picture with edges and noise, so that its file is not trivial."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    pixels[10:30, 10:50] = (200, 30, 60)
    image = Image.fromarray(pixels)
    return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)


def files_of_images() -> dict[str, bytes]:
    """Images in the formats and modes that users bring."""
    wanted = [("JPEG", mode, {}) for mode in ("RGB", "L", "CMYK")] + [("JPEG", "RGB", {"progressive": True})]
    wanted += [("PNG", mode, {}) for mode in ("RGB", "RGBA", "P", "LA", "1", "I;16")]
    wanted += [("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}), ("BMP", "RGB", {}), ("GIF", "P", {})]
    wanted += [("TIFF", mode, {"compression": name}) for mode in ("RGB", "I;16") for name in (None, "tiff_lzw")]
    wanted += [("TIFF", "CMYK", {"compression": "tiff_deflate"}), ("TIFF", "RGB", {"compression": "jpeg"})]
    wanted += [("GIF", "P", {"save_all": True, "append_images": [scene("P").rotate(180)], "duration": 100})]
    found = {}
    for kind, mode, options in wanted:
        file = io.BytesIO()
        scene(mode).save(file, kind, **options)
        found[f"{kind} {mode} {options}"] = file.getvalue()
    return found


@pytest.mark.parametrize("count", MANY)
def test_damaged_images_are_decoded_or_refused(root, processor, count):
    files = files_of_images()
    outcomes = Counter()
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
    with bounded() as begin:
        for seed in range(count):
            rng = random.Random(seed)
            kind = rng.choice(list(files))
            record = Record("x", turns, [damaged(files[kind], rng)])
            begin()
            try:
                with one_record():
                    sample = encode(record, processor)
                assert sample.pixels.shape[1:] == (3, processor.tile_size, processor.tile_size)
                outcomes["used"] += 1
            except BadRecord as reason:
                assert str(reason).startswith("embedded image: ") or "px" in str(reason), (seed, kind, reason)
                outcomes["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"seed {seed}, {kind}: {type(error).__name__}: {error}") from error
    assert min(outcomes[kind] for kind in ("used", "refused")) > count / 10, outcomes


def test_undamaged_rows_and_images_are_all_used(root, processor):
    """What the tests above damage is right to begin with."""
    for row in ROWS[:5]:
        encode(auto.read(row, "x", root), processor)
    for task, row in zip(("vqa", "choice", "ocr"), ROWS[5:]):
        encode(task_form(task, 0)(row, "x", root), processor)
    for data in files_of_images().values():
        encode(Record("x", ROWS[0]["messages"], [data]), processor)
