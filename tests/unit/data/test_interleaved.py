"""Interleaved documents: which texts and images are kept, where images go, and where a long document is cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvlm.data.documents import by_sentence, interleaved
from nvlm.data.messages import check_learns, place_images, read_turns
from nvlm.data.record import BadRecord

A, B, C = (Path(f"{name}.png") for name in "abc")


@pytest.mark.parametrize(
    ("parts", "most", "texts", "images"),
    [
        ([A, "One.", B, "Two."], 6, ("", "One.", "Two."), [A, B]),
        (["One.", A, "Two.", B, C], 6, ("One.", "Two."), [A]),  # nothing can be learned from the last images
        (["One.", A, " \n", B], 6, ("One.",), []),
        ([A, B, "One.", "Two.", C, "Three."], 2, ("", "", "One.\n\nTwo.\n\nThree."), [A, B]),
        ([A, "One.", B, "Two.", C, "Three."], 1, ("", "One.\n\nTwo.\n\nThree."), [A]),
        ([A, "One."], 0, ("One.",), []),
        (["a \\", A, "<image> \\<image>"], 6, ("a \\", "<image> \\<image>"), [A]),  # marks of the web are text
        ([A, b"JPEG", "x"], 6, ("", "", "x"), [A, b"JPEG"]),
        ([], 6, ("",), []),
    ],
)
def test_what_a_document_keeps(parts, most, texts, images):
    messages, kept = interleaved(parts, most)
    (turn,) = place_images(read_turns(messages), len(kept))
    assert (turn.texts, kept) == (texts, images)


def test_seven_images_become_six():
    parts = [part for number in range(7) for part in (Path(f"{number}.png"), f"{number}.")]
    messages, images = interleaved(parts, 6)
    (turn,) = place_images(read_turns(messages), 6)
    assert turn.texts == ("", "0.", "1.", "2.", "3.", "4.", "5.\n\n6.") and images == parts[:12:2]


def test_images_go_directly_before_their_sentences():
    sentences = ["One.", "Two.", "Three.", "Four."]
    assert by_sentence(sentences, [(C, 3), (A, 0), (B, 0)]) == [A, B, "One. Two. Three.", C, "Four."]
    assert by_sentence(sentences, [(A, 1), (B, 9)]) == ["One.", A, "Two. Three. Four."]
    assert by_sentence([], [(A, 0)]) == []
    messages, _ = interleaved(by_sentence(["", " "], [(A, 0)]), 6)
    with pytest.raises(BadRecord, match="the document has none"):
        check_learns(read_turns(messages))
