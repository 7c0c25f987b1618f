"""Record -> Sample: an outline with its pixels, placeholder runs of exactly K per tile, labels, visibility numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from nvlm.data.batch import ALL_TILES, IGNORE, IMAGE, PAD, Sample
from nvlm.data.images import decode_image
from nvlm.data.outline import Outline, Processor, outline
from nvlm.data.record import ImageChanged, Record
from nvlm.tiling.pixels import tile_image
from nvlm.tiling.placement import Piece, Words


def encode(record: Record, processor: Processor, generate: bool = False) -> Sample:
    """Encode a conversation for training, or with `generate` as a prompt for its next turn. Raises BadRecord."""
    return fill(record, outline(record, processor, generate), processor)


def fill(record: Record, sketch: Outline, processor: Processor) -> Sample:
    """`sketch`, the outline of `record`, with its pixels. Raises BadRecord."""
    return _assemble(record.id, sketch, _tiles(record, sketch, processor))


def _tiles(record: Record, sketch: Outline, processor: Processor) -> torch.Tensor:
    """uint8 [T, 3, px, px] of all images, cut as planned from their headers."""
    parts = [torch.zeros(0, 3, processor.tile_size, processor.tile_size, dtype=torch.uint8)]
    pictures = sketch.pictures
    for source, size, plan in zip(record.images, pictures.sizes, pictures.plans, strict=True):
        image = decode_image(source, processor.max_pixels)
        if image.size != size:
            raise ImageChanged(
                f"{size[0]} x {size[1]} px when it was planned, {image.width} x {image.height} px decoded"
            )
        parts.append(tile_image(image, plan, processor.resize))
    return torch.cat(parts)


def _assemble(name: str, sketch: Outline, pixels: torch.Tensor) -> Sample:
    runs, placements = sketch.runs, sketch.placements
    first_tile = [0, *accumulate(plan.num_tiles for plan in sketch.pictures.plans)]
    tokens: list[int] = []
    trained: list[bool] = []
    image_of: list[int] = []
    tile_of: list[int] = []
    stream_tiles: list[int] = []

    def add(ids: Sequence[int], learns: bool, image: int, tile: int) -> None:
        tokens.extend(ids)
        trained.extend([learns] * len(ids))
        image_of.extend([image] * len(ids))
        tile_of.extend([tile] * len(ids))

    latest = PAD
    for run in runs:
        if run.image is None:
            add(run.ids, run.trained, latest, ALL_TILES)
            continue
        latest = run.image
        for piece in placements[run.image].stream:
            if not isinstance(piece.content, Words):
                stream_tiles.append(first_tile[run.image] + piece.tile)
            add(_ids(piece), False, latest, piece.tile if piece.own_tile else ALL_TILES)

    cross = [(image, piece) for image, placement in enumerate(placements) for piece in placement.cross]
    tags = {(image, piece.tile): piece.content.ids for image, piece in cross if isinstance(piece.content, Words)}
    tiles = [(image, piece.tile) for image, piece in cross if not isinstance(piece.content, Words)]
    # The logits at t predict the token at t + 1, so a label stands one place before its token.
    labels = [tokens[t] if trained[t] else IGNORE for t in range(1, len(tokens))] + [IGNORE]

    def long(values) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.long)

    return Sample(
        id=name,
        tokens=long(tokens),
        labels=long(labels),
        image=long(image_of),
        tile=long(tile_of),
        stream_tiles=long(stream_tiles),
        cross_tokens=long(i for _, piece in cross for i in _ids(piece)),
        cross_image=long(i for i, piece in cross for _ in range(piece.length)),
        cross_tile=long(piece.tile for _, piece in cross for _ in range(piece.length)),
        cross_tiles=long(first_tile[i] + t for i, t in tiles),
        cross_tags=tuple(tags.get(key, ()) for key in tiles),
        pixels=pixels,
    )


def _ids(piece: Piece) -> Sequence[int]:
    return piece.content.ids if isinstance(piece.content, Words) else [IMAGE] * piece.length
