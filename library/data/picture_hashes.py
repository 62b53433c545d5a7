"""What a picture file holds, as a hash that its cached latents are named by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from library.console import progress_bar
from library.data.picture_index import PictureIndex
from library.data.team import Team
from library.errors import DataError

_FACT = "hash"


def hash_pictures(
    paths: Sequence[Path], index: PictureIndex, team: Team, show_progress: bool = True
) -> dict[Path, str]:
    """{picture: hash of its content}, the same on every process; those that the index knows are not read again.

    DataError: a picture cannot be read, or the index cannot be written.
    """
    hashes = index.known(paths, _FACT)
    # Another run may have changed an index while the processes read it, so they may miss different pictures.
    unknown = sorted(set(team.gather([path for path in paths if path not in hashes])))
    found = dict(team.gather(_hash_all(team.share(unknown), show_progress)))
    index.remember(_FACT, found)
    return {**hashes, **found}


def _hash_all(paths: Sequence[Path], show_progress: bool) -> list[tuple[Path, str]]:
    shown = show_progress and len(paths) > 0
    with ThreadPoolExecutor() as pool, progress_bar(len(paths), "hashing pictures", shown=shown) as bar:
        hashed = []
        for path, content_hash in zip(paths, pool.map(hash_picture, paths), strict=True):
            hashed.append((path, content_hash))
            bar.update()
    return hashed


def hash_picture(path: Path) -> str:
    """32 hex digits that follow from the file's content. DataError: it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"picture {path} cannot be read: {error}") from error
    return digest.hexdigest()
