"""The beginning of a document that is longer than a sample may be. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm.data.text.assemble import Run


def cut(runs: Sequence[Run], image_tokens: Sequence[int], window: int) -> list[Run]:
    """The beginning of a document's runs that fits `window` tokens, and with it the images that are left.

    `image_tokens`: how many tokens the images take that may be kept, from the first on. Text is cut between two tokens.
    An image is kept with its marks or not at all, and only if text follows it. A document that fits stays whole.
    """
    kept: list[Run] = []
    room = window
    for unit in _units(runs):
        image = next((run.image for run in unit if run.image is not None), None)
        if image is not None and image >= len(image_tokens):
            break
        tokens = sum(len(run.ids) for run in unit) + (0 if image is None else image_tokens[image])
        if tokens <= room:
            kept += unit
            room -= tokens
            continue
        if image is None and room:
            kept.append(Run(unit[0].ids[:room], unit[0].trained))
        break
    else:
        return kept
    while len(kept) >= 3 and kept[-2].image is not None:
        del kept[-3:]
    return kept


def _units(runs: Sequence[Run]) -> list[tuple[Run, ...]]:
    """The runs one by one, but an image together with the marks around it."""
    images = {at for at, run in enumerate(runs) if run.image is not None}
    marks = {at + side for at in images for side in (-1, 1)}
    units = (runs[at - 1 : at + 2] if at in images else (run,) for at, run in enumerate(runs) if at not in marks)
    return [tuple(unit) for unit in units]
