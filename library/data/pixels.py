"""From a picture file to the pixels the model sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from library.errors import DataError

_TURNED_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels with the EXIF orientation applied.

    The whole file is decoded, because Pillow's quicker checks do not notice missing data at the end; JPEGs are decoded
    at 1/8 of their size, which still reads every byte. DataError: the file cannot be read.
    """
    with _opened(path) as image:
        width, height = image.size
        image.draft("RGB", (1, 1))
        image.load()
        turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED_SIDEWAYS
    return (height, width) if turned else (width, height)


def read_rgb(path: Path) -> Image.Image:
    """The picture upright, in 8-bit RGB, transparent parts over white. DataError: the file cannot be read."""
    with _opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            upright = _eight_bit(upright)
        if upright.has_transparency_data:
            picture = upright.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            upright = Image.alpha_composite(white, picture)
        return upright.convert("RGB")


def load_pixels(path: Path, bucket: tuple[int, int], flipped: bool) -> torch.Tensor:
    """pixels_CHW in [-1, 1], fp32: scaled to cover the bucket (width, height), then cropped around the centre.

    Lanczos filtering, over the wider support that shrinking needs. DataError: the file cannot be read.
    """
    image = ImageOps.fit(read_rgb(path), bucket, method=Image.Resampling.LANCZOS)
    if flipped:
        image = ImageOps.mirror(image)
    pixels_HWC = torch.from_numpy(np.array(image))
    return pixels_HWC.permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1.0)


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey (modes I and I;16…) to 8 bits: 65535 becomes 255. Pillow's own conversion would clip at 255."""
    grey = np.asarray(image).astype(np.float32) / 257.0
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise many unrelated kinds for damaged files
        raise DataError(f"picture {path} cannot be read: {error}") from error
