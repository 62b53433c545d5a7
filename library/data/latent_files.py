"""Where the latents of a picture lie on disk, and what they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from library.data.folders import folder_of
from library.data.picture_hashes import hash_pictures
from library.data.picture_index import PictureIndex, cache_folder
from library.data.pictures import Picture
from library.data.team import Team
from library.tensor_cache import TensorCache, cache_key

# To be raised when pixels are made in another way, or latents kept in another form.
_VERSION = "latents 1"
# Files that a thread looks into at a time; handing over each alone takes as long as looking. Two threads wait for a
# slow disk in turn; of more, on a fast one, each waits for Python's lock, which takes up to four times the work.
_OPENED, _OPENERS = 256, 2


@dataclass(frozen=True)
class View:
    """A picture as it is or mirrored."""

    picture: Picture
    flipped: bool

    @property
    def key(self) -> tuple[str, bool]:
        """(picture key, flipped)"""
        return self.picture.key, self.flipped


@dataclass(frozen=True)
class LatentFile:
    """One entry of a picture folder's cache. content: hash of the picture that it belongs to."""

    cache: TensorCache
    key: str
    content: str

    def read(self) -> torch.Tensor | None:
        """latents_CTHW, fp32; None where the file is missing or damaged."""
        tensors = self.cache.read(self.key)
        return None if tensors is None else tensors["latents"]

    def write(self, latents_CTHW: torch.Tensor) -> None:
        """OSError: it cannot be written."""
        self.cache.write(self.key, {"latents": latents_CTHW})


@dataclass(frozen=True)
class LatentFiles:
    """Finds the files of latents.

    encoder: identity of the VAE. cache_dir: where the cache folders lie; None for beside the pictures.
    """

    encoder: str
    cache_dir: Path | None = None

    def locate(
        self, views: Sequence[View], trust_times: bool, team: Team, show_progress: bool = True
    ) -> list[LatentFile]:
        """Each view's file, whether it is there or not: named by picture content, bucket, mirroring and VAE.

        trust_times: see `PictureIndex`. Errors: see `hash_pictures`.
        """
        paths = list(dict.fromkeys(view.picture.path for view in views))
        folders = set(map(folder_of, paths))
        caches = {folder: TensorCache(cache_folder(Path(folder), self.cache_dir) / "latents") for folder in folders}
        index = PictureIndex(self.cache_dir, trust_times, writes=team.rank == 0)
        hashes = hash_pictures(paths, index, team, show_progress)
        return [self._file(view, caches[folder_of(view.picture.path)], hashes[view.picture.path]) for view in views]

    def _file(self, view: View, cache: TensorCache, content: str) -> LatentFile:
        size = "{}x{}".format(*view.picture.bucket)
        mirroring = "flipped" if view.flipped else ""
        scaling = view.picture.subset.resize_interpolation or ""
        return LatentFile(cache, cache_key(_VERSION, self.encoder, content, size, mirroring, scaling), content)


def are_there(files: Sequence[LatentFile], by_name: bool) -> list[bool]:
    """Whether each is there and whole. by_name: do not open them to see the latter."""
    if by_name:
        keys = {cache: cache.keys() for cache in {file.cache for file in files}}
        return [file.key in keys[file.cache] for file in files]
    parts = [files[start : start + _OPENED] for start in range(0, len(files), _OPENED)]
    with ThreadPoolExecutor(_OPENERS) as pool:
        whole = pool.map(lambda part: [file.cache.holds(file.key) for file in part], parts)
        return [is_whole for part in whole for is_whole in part]
