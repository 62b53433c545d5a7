"""From a picture file to the pixels the model sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from library.errors import DataError

_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    **dict.fromkeys(("bicubic", "cubic"), Image.Resampling.BICUBIC),
    **dict.fromkeys(("bilinear", "linear"), Image.Resampling.BILINEAR),
    **dict.fromkeys(("area", "box"), Image.Resampling.BOX),
    "nearest": Image.Resampling.NEAREST,
}
CENTRE = (0.5, 0.5)


def read_rgb(path: Path) -> Image.Image:
    """The picture upright, in 8-bit RGB, transparent parts over white. DataError: the file cannot be read."""
    with opened_picture(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            upright = _eight_bit(upright)
        if upright.mode == "F":
            raise ValueError("it holds floating-point numbers, whose black and white are unknown; save it as PNG")
        if upright.has_transparency_data:
            picture = upright.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            upright = Image.alpha_composite(white, picture)
        return upright.convert("RGB")


def read_alpha(path: Path) -> Image.Image:
    """How opaque the upright picture is, in 8-bit grey; white where it has no alpha. DataError: it cannot be read."""
    with opened_picture(path) as image:
        upright = ImageOps.exif_transpose(image)
        if not upright.has_transparency_data:
            return Image.new("L", upright.size, 255)
        return upright.convert("RGBA").getchannel("A")


def load_pixels(
    path: Path,
    bucket: tuple[int, int],
    flipped: bool,
    *,
    centring: tuple[float, float] = CENTRE,
    zoom: float = 1.0,
    interpolation: str | None = None,
    recolour: Callable[[Image.Image], Image.Image] | None = None,
) -> torch.Tensor:
    """pixels_CHW in [-1, 1], fp32: cropped and scaled to the bucket (width, height), recoloured, mirrored.

    centring, zoom: see `fit`. interpolation: as resize_interpolation says; shrinking takes the wider support that it
    needs. DataError: the file cannot be read.
    """
    image = fit(read_rgb(path), bucket, _FILTERS[interpolation or "lanczos"], centring, zoom)
    if recolour is not None:
        image = recolour(image)
    if flipped:
        image = ImageOps.mirror(image)
    pixels_HWC = torch.from_numpy(np.array(image))
    return pixels_HWC.permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1.0)


def fit(
    image: Image.Image,
    bucket: tuple[int, int],
    method: Image.Resampling,
    centring: tuple[float, float] = CENTRE,
    zoom: float = 1.0,
) -> Image.Image:
    """The largest part of the bucket's shape that the picture has, or one `zoom` times as large, scaled to the bucket.

    centring: how much of what is cropped away lies to the left and above, from 0 to 1. zoom: above 0, at most 1.
    """
    if zoom == 1:
        return ImageOps.fit(image, bucket, method=method, centering=centring)
    scale = zoom * min(image.width / bucket[0], image.height / bucket[1])
    width, height = bucket[0] * scale, bucket[1] * scale
    left, top = (image.width - width) * centring[0], (image.height - height) * centring[1]
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    return image.resize(bucket, method, box)


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey (modes I and I;16…) to 8 bits: 65535 becomes 255. Pillow's own conversion would clip at 255."""
    grey = np.asarray(image).astype(np.float32) / 257.0
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))


@contextmanager
def opened_picture(path: Path) -> Iterator[Image.Image]:
    """Inside, whatever goes wrong is a DataError that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise many unrelated kinds for damaged files
        raise DataError(f"picture {path} cannot be read: {error}") from error
