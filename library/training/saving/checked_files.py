"""Folders whose manifest.json lists every file with its size and SHA-256, so that damage is found before it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

MANIFEST = "manifest.json"
_CHUNK = 2**20


class HashingFile:
    """Writes to a file, and hashes what it writes; a file object as far as torch.save needs one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes | memoryview) -> int:
        """Returns the number of bytes."""
        self.sha256.update(content)
        self.size += len(content)
        return self._file.write(content)

    def flush(self) -> None:
        """Hands on what the file still holds."""
        self._file.flush()


# Writes a file's content, in as many pieces as it likes.
WriteContent = Callable[[HashingFile], None]


def write_checked(folder: Path, files: Mapping[str, WriteContent]) -> None:
    """Writes files and their manifest into a folder, and reads each back. OSError where what is read differs.

    In pieces, as a thread that makes one large piece holds Python's lock, and with it the run, for a tenth of a second.
    """
    manifest = {}
    for name, write in files.items():
        path = folder / name
        with path.open("wb") as opened:
            file = HashingFile(opened)
            write(file)
        manifest[name] = {"bytes": file.size, "sha256": file.sha256.hexdigest()}
        if file_sha256(path) != manifest[name]["sha256"]:
            raise OSError(f"{path} reads back other than it was written: the disk may be failing")
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def damage_of(folder: Path) -> str | None:
    """What is wrong with a folder by its manifest; None where nothing is, or where it has none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if file_sha256(path) != entry["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def file_sha256(path: Path) -> str:
    """In hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
