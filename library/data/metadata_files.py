"""Metadata files: the captions of many pictures in one file, as Kohya's scripts and others write them.

.json: {"a/1.png": {"caption": "a cat", "tags": "cat, sitting", "nl": "A cat.", "image_size": [832, 1216]}}, the ending
of a picture may be left out. .jsonl: a line {"image_path": "a/1.png", ...} for each picture, with the same keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from library.data.folders import PICTURE_ENDINGS
from library.data.wildcards import text_lines
from library.errors import DataError

_PATH_KEYS = ("image_path", "file_name", "image", "path")


@dataclass(frozen=True)
class PictureMetadata:
    """What a metadata file says of one picture.

    name: as the file spells it. path: None where there is no such picture. size: (width, height) of the upright
    picture; None where it is not told.
    """

    name: str
    path: Path | None
    caption: str | None
    tags: str | None
    nl: str | None
    size: tuple[int, int] | None

    def whole_caption(self, separator: str) -> str | None:
        """Caption and tags, joined by the separator as Kohya's scripts do; None where there is neither.

        Where they have several lines, each line of the one is joined to each of the other.
        """
        lines = [text_lines(text) for text in (self.caption, self.tags) if text and text.strip()]
        return "\n".join(f"{separator.strip()} ".join(parts) for parts in product(*lines)) if lines else None


def read_metadata_file(file: Path, image_dir: Path | None) -> list[PictureMetadata]:
    """What the file says, in its order. Its paths begin at image_dir, or, unset, where the file lies.

    DataError: the file is missing, is no UTF-8 JSON of this form, or tells something of a wrong type, with the place.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"metadata_file {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"metadata_file {file} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    folder = _Pictures(image_dir if image_dir is not None else file.parent)
    entries = _lines(file, text) if file.suffix.lower() == ".jsonl" else _table(file, text)
    return [_metadata(file, folder, name, entry) for name, entry in entries]


def _table(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    table = _parsed(str(file), text)
    if not isinstance(table, dict):
        raise DataError(f"metadata_file {file}: expected {{picture: {{...}}}}; a list of lines is a .jsonl file")
    yield from table.items()


def _lines(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        entry = _parsed(f"{file}:{number}", line)
        name = next((entry[key] for key in _PATH_KEYS if key in entry), None) if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise DataError(f'metadata_file {file}:{number}: expected {{"image_path": "...", ...}}')
        yield name, entry


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"metadata_file {place} is not valid JSON: {error}") from error


def _metadata(file: Path, folder: _Pictures, name: str, entry: Any) -> PictureMetadata:
    place = f"metadata_file {file}: {name}"
    if not isinstance(entry, dict):
        raise DataError(f"{place}: expected {{caption, tags, image_size}}, not {str(entry)[:80]!r}")
    tags = entry.get("tags")
    tags = ", ".join(map(str, tags)) if isinstance(tags, list) else tags
    caption, nl = entry.get("caption"), entry.get("nl")
    for key, value in (("caption", caption), ("tags", tags), ("nl", nl)):
        if value is not None and not isinstance(value, str):
            raise DataError(f"{place}: {key} is {str(value)[:80]!r}, not a text")
    return PictureMetadata(name, folder.find(name), caption, tags, nl, _size(place, entry))


def _size(place: str, entry: Mapping[str, Any]) -> tuple[int, int] | None:
    size = entry.get("image_size")
    if size is None:
        return None
    whole = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    if not whole:
        raise DataError(f"{place}: image_size is {size!r}, not [width, height]")
    return size[0], size[1]


class _Pictures:
    """Finds pictures by the names in a metadata file; each folder is listed once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listed: dict[Path, dict[str, Path]] = {}

    def find(self, name: str) -> Path | None:
        path = self._folder / name.replace("\\", "/")
        if path.parent not in self._listed:
            self._listed[path.parent] = _by_name_and_stem(path.parent)
        return self._listed[path.parent].get(path.name)


def _by_name_and_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    pictures = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURE_ENDINGS]
    return {**{path.stem: path for path in reversed(pictures)}, **{path.name: path for path in pictures}}
