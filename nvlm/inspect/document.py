"""HTML from Jinja templates, in the style of base.css, and pictures inside it. Jinja escapes all values, so texts from
the data stay text. Imports no torch."""

from __future__ import annotations

import base64
import io
from functools import cache

import jinja2
from PIL import Image

_QUALITIES = (85, 70, 50, 30)


@cache
def environment(package: str) -> jinja2.Environment:
    """The templates in the folder of `package`, which may include those of this one."""
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name, ".") for name in (package, __package__)]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def data_url(image: Image.Image, side: int, most: int) -> str:
    """`image` as a JPEG of at most `side` px and about `most` bytes: of the best quality that fits, else smaller."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    for quality in _QUALITIES:
        file = io.BytesIO()
        small.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= most:
            break
    else:
        if side > 64:
            return data_url(image, side // 2, most)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
