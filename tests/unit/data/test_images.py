"""Images of records: only regular files inside the data folder, and pixels as stored, in every format."""

from __future__ import annotations

import io
import os
import struct

import numpy as np
import pytest
from PIL import Image

from nvlm.data.images import decode_draft, decode_image, image_path, image_size
from nvlm.data.record import BadRecord, ImageChanged
from nvlm.export.modeling_nvlm import open_rgb

STORED = Image.fromarray(np.arange(40 * 24 * 3, dtype=np.uint8).reshape(24, 40, 3) // 3 * 5)  # 40 x 24 px
LOSSLESS = ("TIFF", "PNG", "WEBP")


def with_orientation(kind: str, number: int, **options) -> bytes:
    exif = Image.Exif()
    exif[274] = number
    data = io.BytesIO()
    STORED.save(data, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}), **options)
    return data.getvalue()


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("kind", LOSSLESS)
def test_an_orientation_is_not_applied_in_any_format(kind, number):
    data = with_orientation(kind, number)
    assert image_size(data, 10**6) == STORED.size
    assert np.array_equal(decode_image(data, 10**6), STORED)
    assert np.array_equal(open_rgb(data), STORED)  # the self-contained exported file


def test_a_compressed_tiff_and_one_opened_by_the_caller_follow_the_same_rule():
    data = with_orientation("TIFF", 6, compression="tiff_lzw")
    assert np.array_equal(decode_image(data, 10**6), STORED)
    opened = Image.open(io.BytesIO(data))
    assert image_size(opened, 10**6) == STORED.size
    assert np.array_equal(decode_image(opened, 10**6), STORED)


@pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
def test_headers_and_pixels_agree_in_lossy_formats(kind):
    data = with_orientation(kind, 6)
    assert image_size(data, 10**6) == decode_image(data, 10**6).size == STORED.size


class Lying(Image.Image):
    """Turns out larger when it is loaded, as some icons do."""

    def load(self):
        self._size = (48, 48)
        return super().load()


def test_a_header_that_lies_about_its_pixels_is_refused():
    image = STORED.copy()
    image.__class__ = Lying
    with pytest.raises(BadRecord, match="40 x 24 px in its header, but 48 x 48 px of pixels"):
        decode_image(image, 10**6)


def broken_avif() -> bytes:
    """The boxes of an image without the image."""

    def box(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", 8 + len(body)) + name + body

    handler = box(b"hdlr", bytes(8) + b"pict" + bytes(13))
    return box(b"ftyp", b"avif" + bytes(4) + b"avifmif1miaf") + box(b"meta", bytes(4) + handler)


def test_a_decoder_that_raises_anything_names_the_image(tmp_path):
    path = tmp_path / "broken.avif"
    path.write_bytes(broken_avif())
    for read in (image_size, decode_image):
        with pytest.raises(BadRecord, match="^broken.avif: .*"):
            read(path, 10**6)


def test_a_program_in_place_of_an_image_is_not_run(tmp_path):
    """Pillow would call Ghostscript."""
    STORED.save(tmp_path / "a.eps")
    for read in (image_size, decode_image):
        with pytest.raises(BadRecord, match="a.eps: EPS, a program"):
            read(tmp_path / "a.eps", 10**6)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "a named pipe, not a regular file"),
        (os.mkdir, "a directory, not a regular file"),
        (lambda path: os.symlink("/dev/zero", path), "a device, not a regular file"),
        (lambda path: os.symlink("odd", path), "[Ss]ymbolic link"),
        (lambda path: None, "no such image"),
    ],
)
def test_only_regular_files_are_opened(tmp_path, make, reason):
    make(tmp_path / "odd")
    for read in (image_size, decode_image):
        with pytest.raises(BadRecord, match=f"odd: .*{reason}|odd: {reason}"):
            read(tmp_path / "odd", 10**6)


def test_a_link_out_of_the_data_folder_is_called_one(tmp_path):
    data, store = tmp_path / "data", tmp_path / "store"
    (data / "real").mkdir(parents=True)
    store.mkdir()
    STORED.save(store / "a.png")
    STORED.save(data / "real" / "a.png")
    (data / "images").symlink_to(store)
    (data / "inside").symlink_to("real")
    assert image_path(data, "inside/a.png") == data / "real" / "a.png"
    with pytest.raises(BadRecord, match=f"images is a link to {store}; links out of {data} are not followed"):
        image_path(data, "images/a.png")
    for path in ("../store/a.png", str(store / "a.png"), "real/../../store/a.png"):
        with pytest.raises(BadRecord, match="leaves the data folder") as caught:
            image_path(data, path)
        assert " is a link to " not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("a\0.png", "NUL"), ("\ud800.png", "surrogate"), (7, "int, expected text"), (None, "expected text")],
)
def test_a_path_that_is_none_is_refused(tmp_path, path, reason):
    with pytest.raises(BadRecord, match=reason):
        image_path(tmp_path, path)


def saved(kind: str, mode: str = "RGB", size: tuple[int, int] = (801, 600), **options) -> bytes:
    data = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(data, kind, **options)
    return data.getvalue()


def never(data, size):
    raise AssertionError("not a case for the quick decoder")


@pytest.mark.parametrize(
    ("enough", "size"), [((800, 600), None), ((400, 301), None), ((400, 300), (401, 300)), ((90, 75), (101, 75))]
)
@pytest.mark.parametrize("as_file", [False, True])
def test_a_jpeg_is_decoded_reduced_but_large_enough(tmp_path, enough, size, as_file):
    source = saved("JPEG")
    if as_file:
        (tmp_path / "a.jpg").write_bytes(source)
    given = tmp_path / "a.jpg" if as_file else source
    image = decode_draft(given, 10**6, enough, lambda data, size: (data, size), planned=(801, 600))
    if size is None:  # too small to be reduced: its bytes go to the quick decoder
        assert image == (source, (801, 600))
        assert decode_draft(given, 10**6, enough, lambda data, size: None).size == (801, 600)  # which may refuse them
    else:
        assert image.size == size and image.width >= enough[0] and image.height >= enough[1]
        whole = decode_image(given, 10**6).resize(size, Image.Resampling.BOX)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(whole)).max() <= 4


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGB"), ("WEBP", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK")])
def test_other_files_are_decoded_as_always(kind, mode):
    data = saved(kind, mode)
    assert np.array_equal(decode_draft(data, 10**6, (100, 75), never), decode_image(data, 10**6))


def test_a_reduced_image_passes_the_checks_of_a_whole_one(tmp_path):
    data = saved("JPEG")
    with pytest.raises(BadRecord, match="801 x 600 px, more than data.max_pixels=400000"):
        decode_draft(data, 400_000, (100, 75), never)
    with pytest.raises(ImageChanged, match="800 x 600 px when it was planned, 801 x 600 px now"):
        decode_draft(data, 10**6, (100, 75), never, planned=(800, 600))
    (tmp_path / "cut.jpg").write_bytes(data[:2000])
    for enough in ((100, 75), (800, 600)):
        with pytest.raises(BadRecord, match="cut.jpg: .*truncated"):
            decode_draft(tmp_path / "cut.jpg", 10**6, enough, lambda data, size: None)
    assert decode_draft(STORED, 10**6, (1, 1), never, planned=STORED.size).size == STORED.size


def test_a_jpeg_file_that_is_far_longer_than_its_image_is_not_read_whole(tmp_path):
    path = tmp_path / "long.jpg"
    STORED.save(path)
    with open(path, "r+b") as file:
        file.truncate(1 << 40)
    assert decode_draft(path, 10**6, (40, 24), lambda data, size: pytest.fail("read")).size == STORED.size
