"""Latents cached where the settings ask for it: in memory, or on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from library.data.latent_files import LatentFiles
from library.data.latents import Encode, LatentCache, cache_latents, cache_latents_to_disk
from library.data.pictures import Picture
from library.data.settings import DataSettings
from library.data.team import Team


def latents_of(
    pictures: Sequence[Picture],
    settings: DataSettings,
    encode: Encode,
    identity: Callable[[], str],
    team: Team,
    show_progress: bool,
) -> LatentCache:
    """Every picture's latents. identity: what they depend on beside the picture, which files on disk are known by."""
    common = {"team": team, "show_progress": show_progress}
    if not settings.cache_latents_to_disk:
        return cache_latents(pictures, encode, settings.vae_batch_size, **common)
    files = LatentFiles(identity(), settings.cache_dir)
    return cache_latents_to_disk(pictures, encode, settings.vae_batch_size, files, settings.skip_cache_check, **common)
