"""The headers of many pictures: read by threads, and remembered between starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from library.console import progress_bar
from library.data.headers import PictureHeader, read_header
from library.data.picture_index import PictureIndex
from library.errors import DataError

# The facts of headers that were read, and of those of pictures that were decoded as well.
_READ, _DECODED = "header", "decoded"
# Files that a thread opens at a time; handing over each alone takes half as long as opening it.
_OPENED = 64


def read_headers(
    paths: Sequence[Path], decode: bool, show_progress: bool, index: PictureIndex | None = None
) -> dict[Path, PictureHeader | str]:
    """Each picture's header, or what is wrong with the file; see `read_header`.

    index: pictures that it knows are not opened, and it gets to know the others.
    """
    fact = _DECODED if decode else _READ
    remembered = {} if index is None else index.known(paths, fact)
    headers: dict[Path, PictureHeader | str] = {
        path: PictureHeader((width, height), frames) for path, (width, height, frames) in remembered.items()
    }
    unknown = [path for path in paths if path not in headers]
    shown = show_progress and len(unknown) > 0
    with ThreadPoolExecutor() as pool, progress_bar(len(unknown), "reading pictures", shown=shown) as bar:
        parts = [unknown[start : start + _OPENED] for start in range(0, len(unknown), _OPENED)]
        for part, found in zip(parts, pool.map(lambda part: _read_all(part, decode), parts), strict=True):
            headers.update(zip(part, found, strict=True))
            bar.update(len(part))
    if index is not None:
        read = ((path, headers[path]) for path in unknown)
        index.remember(
            fact, {path: [*header.size, header.frames] for path, header in read if isinstance(header, PictureHeader)}
        )
    return headers


def _read_all(paths: Iterable[Path], decode: bool) -> list[PictureHeader | str]:
    return [_header_or_problem(path, decode) for path in paths]


def _header_or_problem(path: Path, decode: bool) -> PictureHeader | str:
    try:
        return read_header(path, decode)
    except DataError as error:
        return str(error)
