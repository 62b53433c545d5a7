"""What was found out about picture files, remembered so that unchanged files are not read again at the next start."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from library.data.folders import folder_of
from library.data.settings import DataSettings
from library.errors import DataError
from library.files import write_atomically
from library.tensor_cache import cache_key

CACHE_FOLDER = ".anima_cache"
_INDEX = "pictures.json"
_VERSION = 2
# A file system may stamp two changes of one moment alike, so times as young as this prove nothing yet.
_TOO_YOUNG_NS = 2 * 10**9

# File name -> [size, time of the last change of its content, of it at all (both in ns), {name of a fact: the fact}]
_Entries = dict[str, list[Any]]


def cache_folder(pictures: Path, cache_dir: Path | None) -> Path:
    """The cache folder of a folder of pictures: in it, or, given cache_dir, there, named by it and its path's hash."""
    if cache_dir is None:
        return pictures / CACHE_FOLDER
    whole = pictures.resolve()
    return cache_dir / f"{whole.name}-{cache_key(str(whole))[:8]}"


class PictureIndex:
    """Facts about files, kept in an index in the cache folder of each folder of pictures.

    cache_dir: see `cache_folder`. trust_times: a file is unchanged when its size and the time of the last change of its
    content are; else the time of its last change at all counts too, which also tells a replaced file that got an older
    one's time, but is another when a folder is copied. writes: False for all but one of the processes of a run.
    """

    def __init__(self, cache_dir: Path | None = None, trust_times: bool = False, writes: bool = True) -> None:
        self._cache_dir = cache_dir
        self._writes = writes
        self._compared = 2 if trust_times else 3
        self._stamps: dict[Path, list[int]] = {}

    def known(self, paths: Sequence[Path], fact: str) -> dict[Path, Any]:
        """The fact about those of the files that have not changed since. DataError: a file is not there."""
        folders: dict[str, _Entries] = {}
        found = {}
        for path in paths:
            self._stamps[path] = stamp = _stamp(path)
            folder = folder_of(path)
            if folder not in folders:
                folders[folder] = _read_entries(self._folder(Path(folder)))
            entry = folders[folder].get(path.name)
            if entry is not None and self._is_of(entry, stamp) and fact in entry[3]:
                found[path] = entry[3][fact]
        return found

    def remember(self, fact: str, values: Mapping[Path, Any]) -> None:
        """Adds what was found out about files that `known` did not know; those of files that are gone stay.

        DataError: an index cannot be written.
        """
        by_folder = defaultdict(list)
        for path in values if self._writes else ():
            by_folder[path.parent].append(path)
        now = time.time_ns()
        for parent, paths in by_folder.items():
            entries = _read_entries(self._folder(parent))
            for path in paths:
                stamp, entry = self._stamps[path], entries.pop(path.name, None)
                if now - max(stamp[1:]) > _TOO_YOUNG_NS:
                    kept = entry if entry is not None and self._is_of(entry, stamp) else [*stamp, {}]
                    kept[3][fact] = values[path]
                    entries[path.name] = kept
            _write_entries(self._folder(parent), entries)

    def _folder(self, pictures: Path) -> Path:
        return cache_folder(pictures, self._cache_dir)

    def _is_of(self, entry: list[Any], stamp: list[int]) -> bool:
        return entry[: self._compared] == stamp[: self._compared]


def picture_index(settings: DataSettings, writes: bool) -> PictureIndex | None:
    """A run's index; none where it keeps no latents in files, as it then leaves nothing beside pictures."""
    if not settings.cache_latents_to_disk:
        return None
    return PictureIndex(settings.cache_dir, settings.skip_cache_check, writes)


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"picture {path} cannot be read: {error}") from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _read_entries(folder: Path) -> _Entries:
    """Empty where there is no index, or none of this form."""
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = index.get("pictures") if isinstance(index, dict) and index.get("version") == _VERSION else None
    if not isinstance(entries, dict):
        return {}
    return {
        name: entry
        for name, entry in entries.items()
        if isinstance(entry, list) and len(entry) == 4 and isinstance(entry[3], dict)
    }


def _write_entries(folder: Path, entries: _Entries) -> None:
    text = json.dumps({"version": _VERSION, "pictures": entries}, separators=(",", ":"))
    try:
        write_atomically(folder / _INDEX, lambda file: file.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(folder: Path, error: OSError) -> DataError:
    """What to do about a cache folder that cannot be written to."""
    return DataError(
        f"latents cannot be cached in {folder}: {os.strerror(error.errno) if error.errno else error}. Free some space "
        "or set cache_dir to another folder; what was cached already is kept. Or turn cache_latents_to_disk off"
    )
