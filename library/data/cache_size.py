"""How much room caches take."""

from __future__ import annotations

from collections.abc import Iterable

from library.data.pictures import Picture


def latent_bytes(pictures: Iterable[Picture]) -> int:
    """Bytes of all latents: 16 channels in float32 for 8x8 pixels, which is one byte a pixel; with mirror images."""
    return sum(picture.bucket[0] * picture.bucket[1] * (1 + picture.subset.flip_aug) for picture in pictures)
