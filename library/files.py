"""Crash-safe writing: a file or folder is complete under its final name, or not there at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

# The names below of files and folders that are being written, or that were moved aside, by which process.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)(?:-[0-9a-f]+)?\.(?P<kind>tmp|old)(?P<suffix>\.[^.]+)?")
# How far a process's start, as the system tells it, may be off: Linux counts from the second of its own start.
_START_ERROR = 2.0


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path beside `path`, flushes it to disk, then renames it into place.

    The temporary path has the same ending, which tells some writers the format. An interrupted or failed write leaves
    whatever was at `path` untouched. Of several writers at once, in threads or on machines that share a disk, each
    writes a file of its own, and the last one's stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # a writer may make a new file that only its owner can read
        write(temporary)
        temporary.chmod(mode)
        _sync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


@contextmanager
def folder_written_atomically(path: Path) -> Iterator[Path]:
    """Yields a hidden folder to fill; on success its files are flushed and it replaces `path` by renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    mode = temporary.stat().st_mode & 0o666  # a writer may make a new file that only its owner can read
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)
                _sync_file(file)
        _sync_folder(temporary)
        _replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder that is under its name complete or absent, so that it is never there in part."""
    doomed = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    path.replace(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(folder: Path, is_own: Callable[[str], bool]) -> list[str]:
    """Removes what writers here left in a folder when they were killed; returns the names of what was left.

    is_own: whether a name, as it would have become, is the caller's: others may be writing beside it. What a process
    that runs on this machine is writing stays. A folder that was moved aside, and whose successor had not taken its
    place, is put back.
    """
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir()):
        parts = _TEMPORARY.fullmatch(path.name)
        if parts is None or not is_own(parts["name"] + (parts["suffix"] or "")):
            continue
        if _is_being_written(path, int(parts["pid"])):
            continue
        found.append(path.name)
        final = folder / parts["name"]
        if parts["kind"] == "old" and not final.exists():
            path.replace(final)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return found


def _is_being_written(path: Path, pid: int) -> bool:
    """Whether the process of that number is the one that wrote `path`, and not one that got its number later."""
    try:
        process, written_at = psutil.Process(pid), path.stat().st_mtime
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= written_at + _START_ERROR
    except psutil.NoSuchProcess:
        return False
    except FileNotFoundError:  # complete by now
        return True


def _replace_folder(new: Path, path: Path) -> None:
    """A folder cannot be renamed over a full one, so the old one is moved aside first and removed afterwards."""
    if not path.exists():
        new.replace(path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    path.replace(old)
    new.replace(path)
    shutil.rmtree(old, ignore_errors=True)


def _sync_file(path: Path) -> None:
    """Forces a written file's bytes to disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Forces a folder's entries to disk; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
