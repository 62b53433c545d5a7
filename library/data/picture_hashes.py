"""What a picture file holds, as a hash, remembered so that unchanged files are not read again at the next start."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from library.console import progress_bar
from library.data.team import Team
from library.errors import DataError
from library.files import write_atomically

_INDEX = "pictures.json"
# A file system may stamp two changes of one moment alike, so times as young as this prove nothing yet.
_TOO_YOUNG_NS = 2 * 10**9

# File name -> [size, time of the last change of its content, of it at all (both in ns), content hash]
_Index = dict[str, list]


def hash_pictures(
    folders: Mapping[Path, Path], trust_times: bool, team: Team, show_progress: bool = True
) -> dict[Path, str]:
    """{picture: hash of its content}, the same on every process.

    folders: each picture's cache folder, which holds an index of hashes. A picture is hashed again unless its size and
    times are those of the index. trust_times: the time of the last change of content is enough; the other also tells a
    replaced file that got an older one's time, but changes when a folder is copied.
    DataError: a picture cannot be read, or the index cannot be written.
    """
    indexes = {folder: _read_index(folder) for folder in set(folders.values())}
    hashes, unknown, stamps = {}, [], {}
    for path, folder in folders.items():
        stamps[path] = stamp = _stamp(path)
        entry = indexes[folder].get(path.name)
        compared = 2 if trust_times else 3
        if entry is not None and entry[:compared] == stamp[:compared]:
            hashes[path] = entry[3]
        else:
            unknown.append(path)
    # Another run may have changed an index while the processes read it, so they may miss different pictures.
    unknown = sorted(set(team.gather(unknown)))
    hashes.update(team.gather(_hash_all(team.share(unknown), show_progress)))
    if team.rank == 0 and unknown:
        _remember(unknown, folders, indexes, stamps, hashes)
    return hashes


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"picture {path} cannot be read: {error}") from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


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


def _remember(
    paths: Sequence[Path],
    folders: Mapping[Path, Path],
    indexes: Mapping[Path, _Index],
    stamps: Mapping[Path, list[int]],
    hashes: Mapping[Path, str],
) -> None:
    """Adds the new hashes to the indexes; entries of pictures that are gone stay, in case they come back."""
    by_folder = defaultdict(list)
    for path in paths:
        by_folder[folders[path]].append(path)
    now = time.time_ns()
    for folder, members in by_folder.items():
        index = indexes[folder]
        for path in members:
            index.pop(path.name, None)
            if now - max(stamps[path][1:]) > _TOO_YOUNG_NS:
                index[path.name] = [*stamps[path], hashes[path]]
        text = json.dumps({"version": 1, "pictures": index}, separators=(",", ":"))
        try:
            write_atomically(folder / _INDEX, lambda file, text=text: file.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise cannot_write(folder, error) from error


def cannot_write(folder: Path, error: OSError) -> DataError:
    """What to do about a cache folder that cannot be written to."""
    return DataError(
        f"latents cannot be cached in {folder}: {os.strerror(error.errno) if error.errno else error}. Free some space "
        "or set cache_dir to another folder; what was cached already is kept. Or turn cache_latents_to_disk off"
    )


def _read_index(folder: Path) -> _Index:
    """Empty where there is none, or none of this form."""
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    pictures = index.get("pictures") if isinstance(index, dict) and index.get("version") == 1 else None
    if not isinstance(pictures, dict):
        return {}
    return {name: entry for name, entry in pictures.items() if isinstance(entry, list) and len(entry) == 4}
