"""Conversations for tests of models, layouts and exports, and rows packed from them."""

from __future__ import annotations

from tests.models import Story

GRIDS = {1: (1, 1), 2: (2, 1), 3: (1, 3), 4: (2, 2), 5: (5, 1), 6: (3, 2)}
"""(columns, rows) by number of tiles."""

ONE = Story(
    "one",
    (("system", "Read the page."), ("user", "<image>\nwhich digit is first?"), ("assistant", "It is 7.")),
    ((2, 2),),
    form="parts",
)
ONE_TILE = Story("one-tile", (("user", "<image>\nhow many?"), ("assistant", "3")), ((1, 1),), form="unmarked")
TWO = Story(
    "two",
    (
        ("user", "Look: <image> what is it?"),
        ("assistant", "nine"),
        ("user", "and here\n<image>?"),
        ("assistant", "less of them"),
    ),
    ((3, 1), (1, 2)),
)
SIDE_BY_SIDE = Story(
    "side-by-side",
    (("user", "<image><image>"), ("assistant", "both, <image>, and more")),
    ((1, 1), (2, 1), (1, 1)),
)
SIX = Story("six", (("user", "all of <image>"), ("assistant", "three by two")), ((3, 2),))
VIDEO = Story("video", (("user", "<image> moves?"), ("assistant", "it does")), videos=(9,))
BESIDE_A_VIDEO = Story(
    "beside-a-video",
    (("user", "<image> or <image>"), ("assistant", "the second"), ("user", "why?"), ("assistant", "it moves")),
    ((2, 1),),
    videos=(20,),
)
TEXT = Story("text", (("user", "2 + 2?"), ("assistant", "4, of course"), ("user", "5?"), ("assistant", "no")))

INPUTS = {
    "one image": [[ONE]],
    "one tile": [[ONE_TILE]],
    "two images": [[TWO]],
    "packed rows": [[TWO, TEXT, ONE_TILE], [SIDE_BY_SIDE, ONE], [TEXT]],
    "text alone": [[TEXT]],
    "text and image": [[TEXT], [ONE]],
}
