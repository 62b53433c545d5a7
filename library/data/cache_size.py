"""How much room caches take."""

from __future__ import annotations

from collections.abc import Iterable

from library.data.pictures import Picture
from library.data.settings import DataSettings


def latent_bytes(pictures: Iterable[Picture]) -> int:
    """Bytes of all latents: 16 channels in float32 for 8x8 pixels, which is one byte a pixel; with mirror images."""
    return sum(picture.bucket[0] * picture.bucket[1] * (1 + picture.subset.flip_aug) for picture in pictures)


def described_caches(settings: DataSettings, pictures: Iterable[Picture]) -> str:
    """What a run caches of its pictures and captions, where, and how much that is; "" for nothing."""
    caches = []
    if settings.caches_latents:
        place = "on disk" if settings.cache_latents_to_disk else "in main memory"
        caches.append(f"{latent_bytes(pictures) / 2**20:.0f} MiB of latents {place}")
    if settings.caches_text:
        caches.append(f"encoded captions, up to {settings.text_cache_memory_gb:g} GiB in main memory")
    if settings.cache_text_encoder_outputs_to_disk:
        caches.append(f"and up to {settings.text_cache_disk_gb:g} GiB on disk")
    return ", ".join(caches)
