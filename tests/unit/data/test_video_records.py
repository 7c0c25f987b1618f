"""Records with videos: where they may be named, their marks among those of images, and paths below the data's root."""

from __future__ import annotations

import base64

import pytest

from nvlm.data.forms.auto import read
from nvlm.data.forms.tasks import task_form
from nvlm.data.messages import read_turns
from nvlm.data.record import BadRecord
from nvlm.data.sources.tars import row_of
from nvlm.data.video.clip import Video


def talk(content) -> list[dict]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]


def opened(root, content="What?", **keys):
    """The question of a record, and its pictures by name."""
    record = read({"messages": talk(content), **keys}, "r:1", root.resolve())
    return record.messages[0]["content"], [one.name for one in record.images]


@pytest.mark.parametrize(
    ("content", "keys", "question", "pictures"),
    [
        ("What?", {"video": "a.mp4"}, "What?", ["a.mp4"]),
        ("What?", {"videos": ["a.mp4", "b.mp4"], "image": "c.png"}, "What?", ["c.png", "a.mp4", "b.mp4"]),
        ("<video>\nWhat?", {"video": "a.mp4"}, "<image>\nWhat?", ["a.mp4"]),
        ("<image>\nWhat?", {"video": "a.mp4"}, "<image>\nWhat?", ["a.mp4"]),  # as in LLaVA's files
        (
            "<video> then <image> then <video>",
            {"videos": ["a.mp4", "b.mp4"], "images": ["c.png"]},
            "<image> then <image> then <image>",
            ["a.mp4", "c.png", "b.mp4"],
        ),
        (r"<video> is no \<video>", {"video": "a.mp4"}, "<image> is no <video>", ["a.mp4"]),
        (r"\\<video>", {"video": "a.mp4"}, r"\\<image>", ["a.mp4"]),
        ("The tag <video> of HTML", {}, "The tag <video> of HTML", []),  # no video, so it is text
    ],
)
def test_videos_take_their_places_among_the_images(tmp_path, content, keys, question, pictures):
    assert opened(tmp_path, content, **keys) == (question, pictures)


def test_parts_of_type_video_name_their_files_or_take_those_of_the_record(tmp_path):
    parts = [
        {"type": "text", "text": "Compare "},
        {"type": "video", "video": "a.mp4"},
        {"type": "image", "image": "b.png"},
    ]
    content, pictures = opened(tmp_path, parts)
    assert pictures == ["a.mp4", "b.png"] and content[1] == {"type": "image"}
    unnamed = [{"type": "video"}, {"type": "text", "text": "and <image>"}]
    assert opened(tmp_path, unnamed, videos=["a.mp4"], images=["b.png"])[1] == ["a.mp4", "b.png"]


def test_a_video_may_be_in_the_record_itself(tmp_path):
    data = base64.b64encode(b"film").decode()
    for value in (f"data:video/mp4;base64,{data}", {"bytes": data}):
        record = read({"messages": talk("What?"), "video": value}, "r:1", tmp_path.resolve())
        assert record.images == [Video(b"film")]


@pytest.mark.parametrize(
    ("content", "keys", "reason"),
    [
        ("<video>", {"videos": ["a.mp4", "b.mp4"]}, "0 <image> and 1 <video> marks, but 0 images and 2 videos"),
        ("<image><video>", {"videos": ["a.mp4", "b.mp4"]}, "1 <image> and 1 <video> marks, but 0 images and 2 videos"),
        ("<image>", {"video": "a.mp4", "image": "a.png"}, "1 <image> and 0 <video> marks, but 1 images and 1 videos"),
        ("?", {"video": "../a.mp4"}, "video path leaves the data folder: ../a.mp4"),
        ("?", {"video": "/etc/a.mp4"}, "video path leaves the data folder: /etc/a.mp4"),
        ("?", {"video": "http://a/b.mp4"}, "video http://a/b.mp4 is a URL, expected a path"),
        ("?", {"video": "a.mp4", "videos": ["b.mp4"]}, "videos in several places"),
        ("?", {"videos": ["a.mp4", None]}, "video 2 of 2 in `videos` is null, expected a path"),
        ([{"type": "video", "video": "a.mp4"}, {"type": "video"}], {}, "2 parts of type video, 1 with a path"),
        ([{"type": "video", "video": "a.mp4", "fps": 2}], {}, "key 'fps' of a part of type video is not supported"),
        ([{"type": "video"}], {}, "a part of type 'video'"),
        ("?", {"audio": "a.mp3"}, "sound is not supported"),
    ],
)
def test_videos_that_cannot_be_read_are_refused_by_name(tmp_path, content, keys, reason):
    with pytest.raises(BadRecord, match=reason):
        record = read({"messages": talk(content), **keys}, "r:1", tmp_path.resolve())
        read_turns(record.messages)


def test_questions_in_columns_may_be_about_videos_but_boxes_may_not(tmp_path):
    row = {"question": "Who?", "answer": "A dog.", "video": "a.mp4"}
    record = task_form("vqa", 0)(row, "r:1", tmp_path.resolve())
    assert [one.name for one in record.images] == ["a.mp4"]
    with pytest.raises(BadRecord, match="a video, expected an image: boxes belong to one image"):
        task_form("ocr", 0)({"text": "a", "boxes": [0, 0, 1, 1], "video": "a.mp4"}, "r:1", tmp_path.resolve())


def test_a_tar_holds_videos_beside_images():
    row = row_of("7", {"json": b'{"videos": ["7.b.mp4", "7.a.mp4"]}', "a.mp4": b"a", "b.mp4": b"b", "png": b"c"})
    assert row == {"id": "7", "videos": [b"b", b"a"], "video": None, "images": [b"c"]}
