"""Divides the images of a step among the ranks of a replica, so that each image is decoded once. Imports no torch."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import prod

from nvlm.data.plans import Pictures


def decoding_seats(records: Sequence[Pictures], seats: int) -> list[tuple[int, ...]]:
    """The seat that decodes each image, for each record. All ranks know the plans, so they find the same seats.

    The largest images are dealt first, each to the seat with the least work. An image's work is the pixels that are
    read and written: its own, of all used frames of a video, and those of its tiles.
    """
    work = [
        (-(prod(size) + plan.num_tiles * plan.tile_size**2), record, image)
        for record, pictures in enumerate(records)
        for image, (size, plan) in enumerate(zip(pictures.sizes, pictures.plans))
    ]
    dealt = [[0] * len(pictures.plans) for pictures in records]
    load = [(0, seat) for seat in range(seats)]
    for less, record, image in sorted(work):
        done, seat = load[0]
        dealt[record][image] = seat
        heapq.heapreplace(load, (done - less, seat))
    return [tuple(seats_of_images) for seats_of_images in dealt]
