"""Images of rows: where a row may hold them, in which forms, and what is refused by name."""

from __future__ import annotations

import base64

import pytest
from PIL import Image

from nvlm.data.forms.auto import read
from nvlm.data.forms.pictures import listed
from nvlm.data.record import BadRecord

PNG = b"\x89PNG\r\n\x1a\n"
TEXT = base64.b64encode(PNG).decode()
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("value", "images"),
    [
        (None, []),
        ("", []),
        ([], []),
        ({}, []),
        ("a.png", ["a.png"]),
        (["a.png", "b.png"], ["a.png", "b.png"]),
        (PNG, [PNG]),
        ({"bytes": PNG, "path": "a.png"}, [PNG]),  # a row of a Parquet file that `datasets` wrote
        ({"bytes": None, "path": "a.png"}, ["a.png"]),
        ([{"bytes": PNG, "path": None}, {"bytes": None, "path": "b.png"}], [PNG, "b.png"]),
        ({"bytes": TEXT}, [PNG]),  # JSON has no bytes
        (f"data:image/png;base64,{TEXT}", [PNG]),
        ({"url": "a.png"}, ["a.png"]),
    ],
)
def test_an_image_may_be_a_path_bytes_or_a_struct(value, images):
    assert listed(value, "images") == images


def test_an_image_in_memory_stays_as_it_is(tmp_path):
    image = Image.new("RGB", (4, 4))
    assert read({"messages": TALK, "image": image}, "r:1", tmp_path).images == [image]
    assert read({"messages": TALK, "images": [image, "b.png"]}, "r:1", tmp_path).images == [image, tmp_path / "b.png"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (["a.png", None], "image 2 of 2 in `images` is null, expected a path"),
        ([""], "image 1 of 1 in `images` is empty, expected a path"),
        ([["a.png"]], "image 1 of 1 in `images` is a list"),
        (True, "`images` is true or false"),
        ({"bytes": None, "path": None}, "`images` is null, expected a path"),
        ({"bytes": "?"}, "base64 text is damaged"),
        ({"file": "a.png"}, "key 'file' of a struct of an image"),
        ("http://a.b/c.png", "is a URL, expected a path: download it first"),
        ({"path": "hf://a/b.png"}, "is a URL"),
    ],
)
def test_what_is_no_image_is_refused_by_name(value, reason):
    with pytest.raises(BadRecord, match=reason):
        listed(value, "images")


@pytest.mark.parametrize("path", ["../a.png", "/etc/hostname", {"path": "b/../../a.png"}])
def test_paths_stay_below_the_folder_of_the_images(path, tmp_path):
    with pytest.raises(BadRecord, match="leaves the data folder"):
        read({"messages": TALK, "image": path}, "r:1", tmp_path)


def test_a_row_has_its_images_in_one_place(tmp_path):
    row = {"messages": TALK, "image": "a.png", "images": ["b.png", "c.png"]}
    with pytest.raises(BadRecord, match="images in several places, 2 in `images` and 1 in `image`: expected them in"):
        read(row, "r:1", tmp_path)
    assert read(row | {"images": []}, "r:1", tmp_path).images == [tmp_path / "a.png"]
