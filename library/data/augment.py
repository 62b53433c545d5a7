"""How one use of a picture differs from the picture: mirrored, cropped elsewhere, in other colours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image

from library.data.faces import draw_crop, face_of
from library.data.pictures import Picture
from library.data.pixels import CENTRE, load_pixels
from library.randomness import python_random

# Share of the uses that color_aug changes, half of them in hue and half in gamma, and how far.
_RECOLOURED = 1 / 3
_HUE = 16 / 360
_GAMMA = 0.05


@dataclass(frozen=True)
class Variant:
    """centring, zoom: see `library.data.pixels.fit`. hue: which part of the colour circle it is turned by."""

    flipped: bool = False
    centring: tuple[float, float] = CENTRE
    zoom: float = 1.0
    hue: float = 0.0
    gamma: float = 1.0

    def recolour(self, image: Image.Image) -> Image.Image:
        """An RGB picture in this variant's colours."""
        if self.hue:
            hue, saturation, value = image.convert("HSV").split()
            shift = round(self.hue * 256)
            image = Image.merge("HSV", (hue.point(lambda h: (h + shift) % 256), saturation, value)).convert("RGB")
        if self.gamma != 1:
            image = image.point([round(255 * (v / 255) ** self.gamma) for v in range(256)] * 3)
        return image


def draw_variant(picture: Picture, seed: int, epoch: int, repeat: int) -> Variant:
    """The variant of one use of a picture, as its subset's settings have it; it follows from (seed, use) alone."""
    subset, key = picture.subset, (epoch, picture.key, repeat)
    centring, zoom, hue, gamma = CENTRE, 1.0, 0.0, 1.0
    face = None if subset.face_crop_aug_range is None else face_of(picture)
    if face is not None:
        centring, zoom = draw_crop(face, picture, python_random(seed, "face crop", *key))
    elif subset.random_crop:
        random = python_random(seed, "crop", *key)
        centring = random.random(), random.random()
    if subset.color_aug:
        random = python_random(seed, "colour", *key)
        kind = random.random()
        hue = random.uniform(-_HUE, _HUE) if kind < _RECOLOURED / 2 else 0.0
        gamma = random.uniform(1 - _GAMMA, 1 + _GAMMA) if _RECOLOURED / 2 <= kind < _RECOLOURED else 1.0
    flipped = subset.flip_aug and python_random(seed, "flip", *key).random() < 0.5
    return Variant(flipped, centring, zoom, hue, gamma)


def load_variant(picture: Picture, variant: Variant) -> torch.Tensor:
    """pixels_CHW in [-1, 1], fp32. DataError: the file cannot be read."""
    return load_pixels(
        picture.path,
        picture.bucket,
        variant.flipped,
        centring=variant.centring,
        zoom=variant.zoom,
        interpolation=picture.subset.resize_interpolation,
        recolour=variant.recolour,
    )
