"""The text before each tile that gives the tile's position to the language model (NVLM section 4.2).

Tags are ordinary text for the language model's tokenizer, which this module does not need.
"""

from __future__ import annotations

from nvlm.tiling.grid import TilePlan

TAG_STYLES = ("none", "1d", "2d_grid", "2d_bbox")

# Other bounding boxes in the training data are integers below 1000, so tile boxes use the same scale.
_BOX_MAX = 999


def tile_tags(
    plan: TilePlan, style: str, max_tiles: int = 6, thumbnail: str = "<tile_global_thumbnail>"
) -> tuple[str, ...]:
    """One tag per tile of plan, thumbnail last; a 1x1 plan has only the thumbnail's tag.

    none: empty strings; so for the frames of videos in any style.
    1d: <tile_1>, <tile_2>, ... zero-padded to the digits of max_tiles, so that with common tokenizers all tags of a
        run have the same length.
    2d_grid: <tile_x0_y0>, ... where x is the column and y the row.
    2d_bbox: <box> (x0, y0), (x1, y1) </box>, the top-left and bottom-right corners of the tile in the whole image,
        where 0 is the left or top edge and 999 the right or bottom edge: edge e of n is 999 * e / n, rounded to the
        nearest integer, halves up. Adjacent tiles share an edge. The thumbnail has the box of the whole image, and
        `thumbnail` is not used. These tags differ in token length.

    Raises ValueError for an unknown style and, for 1d, if plan has more tiles than max_tiles.
    """
    if style not in TAG_STYLES:
        raise ValueError(
            f"tile tag style, got {style!r}, expected one of {', '.join(TAG_STYLES)}, fix: use one of them"
        )
    if style == "none" or not plan.tagged:
        return ("",) * plan.num_tiles
    if style == "1d":
        return (*_numbered(plan, max_tiles), thumbnail)
    if style == "2d_grid":
        return (*(f"<tile_x{col}_y{row}>" for col, row in _cells(plan)), thumbnail)
    whole_image = _box(plan, 0, 0, plan.cols, plan.rows)
    return (*(_box(plan, col, row, 1, 1) for col, row in _cells(plan)), whole_image)


def _numbered(plan: TilePlan, max_tiles: int) -> tuple[str, ...]:
    if plan.num_regular > max_tiles:
        raise ValueError(
            f"tiles to tag, got {plan.num_regular}, expected at most max_tiles = {max_tiles}, "
            "fix: pass the max_tiles that the plan was made with"
        )
    digits = len(str(max_tiles))
    return tuple(f"<tile_{k:0{digits}d}>" for k in range(1, plan.num_regular + 1))


def _cells(plan: TilePlan) -> tuple[tuple[int, int], ...]:
    return tuple((k % plan.cols, k // plan.cols) for k in range(plan.num_regular))


def _box(plan: TilePlan, col: int, row: int, cols: int, rows: int) -> str:
    """Box of the cells that start at (col, row) and span cols x rows."""
    left, right = _edge(col, plan.cols), _edge(col + cols, plan.cols)
    top, bottom = _edge(row, plan.rows), _edge(row + rows, plan.rows)
    return f"<box> ({left}, {top}), ({right}, {bottom}) </box>"


def _edge(index: int, count: int) -> int:
    return (2 * _BOX_MAX * index + count) // (2 * count)  # nearest integer, halves up, without floats
