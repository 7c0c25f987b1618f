"""Images of records: looked up in the data folder, opened only if they are regular files, decoded as stored.

Input is untrusted: no URL in a record is fetched, paths must stay inside the folder of the records file, and an image's
header is checked before its pixels are read. Orientation tags are ignored in every format. Imports no torch.
"""

from __future__ import annotations

import io
import os
import posixpath
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from nvlm.data.record import BadRecord, ImageChanged
from nvlm.data.remote import Remote

_SPARE = 1 << 22  # bytes of a JPEG file beside its pixels
_ORIENTATION, _WIDTH, _HEIGHT = 274, 256, 257  # TIFF tags
_TURN_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def image_path(root: Path | Remote, path: Any, kind: str = "image") -> Path | Remote:
    """The file that a record's `path` refers to, inside the data folder `root` (resolved). Raises BadRecord.

    `kind` of file, for messages.
    """
    if not isinstance(path, str):
        raise BadRecord(f"{kind} path is {type(path).__name__}, expected text")
    if "\0" in path:
        raise BadRecord(f"{kind} path {path!r} contains a NUL character")
    if isinstance(root, Remote):
        return _remote_path(root, path, kind)
    try:
        full = Path(os.path.realpath(root / path))
    except UnicodeEncodeError:
        raise BadRecord(f"{kind} path {path!r} contains half of a surrogate pair") from None
    if full.is_relative_to(root):
        return full
    link = _link_that_leaves(root, path)
    if link is None:
        raise BadRecord(f"{kind} path leaves the data folder: {path}")
    raise BadRecord(
        f"{kind} path leaves the data folder: {path} ({link} is a link to {os.path.realpath(root / link)}; links out "
        f"of {root} are not followed: set data.root to the folder of the {kind}s)"
    )


def _remote_path(root: Remote, path: str, kind: str) -> Remote:
    plain = posixpath.normpath(path)
    if "://" in path or plain.startswith(("/", "..")):
        raise BadRecord(f"{kind} path leaves the data folder: {path}")
    return root / plain


def _link_that_leaves(root: Path, path: str) -> Path | None:
    """The first part of `path` that is a link out of `root`; None if the path leaves it without a link."""
    if not Path(os.path.normpath(root / path)).is_relative_to(root):
        return None
    parts = Path(path).parts
    prefixes = (Path(*parts[: end + 1]) for end in range(len(parts)))
    return next((p for p in prefixes if not Path(os.path.realpath(root / p)).is_relative_to(root)), None)


def open_regular(path: Path | Remote) -> io.BufferedReader:
    """Open a regular file for reading. Raises OSError for anything else: reading a pipe or a device could hang."""
    if isinstance(path, Remote):
        return path.open()
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(f"{_KINDS.get(stat.S_IFMT(mode), 'something')}, not a regular file")
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def image_size(source: bytes | Path | Remote | Image.Image, max_pixels: int) -> tuple[int, int]:
    """(width, height) in px from an image's header, without its pixels. Raises BadRecord like `decode_image`."""
    if isinstance(source, Image.Image):
        return _stored_size(source)
    with _opened(source, max_pixels) as image:
        return _stored_size(image)


def decode_image(
    source: bytes | Path | Remote | Image.Image, max_pixels: int, planned: tuple[int, int] | None = None
) -> Image.Image:
    """The decoded image. Raises BadRecord if it is missing, broken or larger than `max_pixels` px, and ImageChanged if
    its header does not have the size `planned` (width, height)."""
    if isinstance(source, Image.Image):
        _check_planned(source, planned)
        return _as_stored(source)
    with _opened(source, max_pixels) as image:
        _check_planned(image, planned)
        return _loaded(image)


def decode_draft[Pixels](
    source: bytes | Path | Remote | Image.Image,
    max_pixels: int,
    enough: tuple[int, int],
    jpeg: Callable[[bytes, tuple[int, int]], Pixels | None],
    planned: tuple[int, int] | None = None,
) -> Image.Image | Pixels:
    """As `decode_image`, but for a JPEG file in RGB the quickest way that keeps (width, height) of at least `enough`.

    It is decoded at 1/2, 1/4 or 1/8 of its size, or if it is too small for that, by `jpeg`, a function of the file's
    bytes and size that returns None for what it cannot decode. `max_pixels` counts the full size.
    """
    if isinstance(source, Image.Image):
        return decode_image(source, max_pixels, planned)
    with _opened(source, max_pixels) as image:
        _check_planned(image, planned)
        if image.format == "JPEG" and image.mode == "RGB":
            whole = image.size
            image.draft(None, enough)
            if image.size == whole:
                data = _bytes_of(source, image)
                found = None if data is None else jpeg(data, whole)
                if found is not None:
                    return found
        return _loaded(image)


def _loaded(image: Image.Image) -> Image.Image:
    decoded = _as_stored(image)
    return decoded.copy() if decoded.mode == "P" else decoded


def _bytes_of(source: bytes | Path | Remote, image: Image.Image) -> bytes | None:
    """The file's bytes; None if there are more than an image of its size takes."""
    if isinstance(source, bytes):
        return source
    if image.fp.seek(0, io.SEEK_END) > _SPARE + 8 * image.width * image.height:
        return None
    image.fp.seek(0)  # Pillow finds its own place again
    return image.fp.read()


def _check_planned(image: Image.Image, planned: tuple[int, int] | None) -> None:
    size = _stored_size(image)
    if planned not in (None, size):
        raise ImageChanged(f"{planned[0]} x {planned[1]} px when it was planned, {size[0]} x {size[1]} px now")


def _orientation(image: Image.Image) -> int:
    """The orientation that Pillow applies when it loads `image`, which it does only for TIFF; 1 for none."""
    return image.getexif().get(_ORIENTATION, 1) if image.format == "TIFF" else 1


def _stored_size(image: Image.Image) -> tuple[int, int]:
    if _orientation(image) not in _TURN_BACK:
        return image.size
    return image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]


def _as_stored(image: Image.Image) -> Image.Image:
    size, turned = _stored_size(image), _orientation(image)
    image.load()
    stored = image.transpose(_TURN_BACK[turned]) if turned in _TURN_BACK else image
    if stored.size != size:
        raise BadRecord(f"{size[0]} x {size[1]} px in its header, but {stored.width} x {stored.height} px of pixels")
    return stored


@contextmanager
def _opened(source: bytes | Path | Remote, max_pixels: int) -> Iterator[Image.Image]:
    """An image of which only the header has been read. Anything that Pillow raises, even within the block, becomes
    BadRecord with the image's name."""
    name = "embedded image" if isinstance(source, bytes) else source.name
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open_regular(source)
        # Pillow's own limit only warns up to twice its value.
        with file, Image.open(file) as image:
            if image.format == "EPS":
                raise BadRecord("EPS, a program that Ghostscript would have to run")
            if image.width * image.height > max_pixels:
                raise BadRecord(f"{image.width} x {image.height} px, more than data.max_pixels={max_pixels}")
            yield image
    except (MemoryError, ImageChanged):
        raise
    except FileNotFoundError:
        raise BadRecord(f"{name}: no such image") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, RuntimeError, struct.error, ...
        raise BadRecord(f"{name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
