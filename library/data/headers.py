"""What a picture file says of itself before it is decoded, and whether all of it is there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image

from library.data.pixels import opened_picture

_TURNED_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# JPEG's end mark may be followed by what a camera or program left there.
_END_OF_JPEG = 64 * 2**10


@dataclass(frozen=True)
class PictureHeader:
    """size: (width, height) in pixels with the EXIF orientation applied. frames: of an animation, or pages."""

    size: tuple[int, int]
    frames: int


def read_header(path: Path, decode: bool = False) -> PictureHeader:
    """What training needs to know of a picture before it is trained.

    A file that ends too early is found by its structure: PNG's chunks, JPEG's end mark, the lengths in WebP and BMP;
    files that do not show it so are decoded. decode: decode in any case, which also finds damage in the middle.
    DataError: the file cannot be read, or is not whole.
    """
    with opened_picture(path) as image:
        width, height = image.size
        orientation, whole = _look_through(path, image)
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a camera's JPEG with previews
        if decode or not whole:
            # JPEGs are decoded at 1/8 of their size, which still reads every byte.
            image.draft("RGB", (1, 1))
            image.load()
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    turned = orientation in _TURNED_SIDEWAYS
    return PictureHeader((height, width) if turned else (width, height), frames)


def _look_through(path: Path, image: Image.Image) -> tuple[int | None, bool]:
    """(EXIF orientation, whether the file's structure says that it is whole)."""
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        if image.format == "PNG":
            return _look_through_png(file, length)
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        if image.format in ("JPEG", "MPO"):
            file.seek(max(0, length - _END_OF_JPEG))
            return orientation, b"\xff\xd9" in file.read()
        if image.format == "WEBP":
            return orientation, _number(file, 4, "little") + 8 <= length
        if image.format == "BMP":
            return orientation, 0 < _number(file, 2, "little") <= length
        return orientation, False


def _look_through_png(file: BinaryIO, length: int) -> tuple[int | None, bool]:
    """A PNG is eight bytes and chunks of length, kind, data and check sum, of which IEND is the last.

    Its EXIF chunk may stand behind the pixels, where Pillow finds it by decoding them.
    """
    position, exif, kind = 8, Image.Exif(), b""
    while kind != b"IEND" and position + 12 <= length:
        size = _number(file, position, "big")
        kind = file.read(4)
        if kind == b"eXIf" and position + 12 + size <= length:
            exif.load(b"Exif\x00\x00" + file.read(size))
        elif kind in (b"zTXt", b"tEXt", b"iTXt") and file.read(21) == b"Raw profile type exif":
            return None, False  # an older way to keep EXIF, which Pillow reads when it decodes
        position += 12 + size
    return exif.get(ExifTags.Base.Orientation), kind == b"IEND" and position <= length


def _number(file: BinaryIO, position: int, order: str) -> int:
    file.seek(position)
    return int.from_bytes(file.read(4), order)
