"""Tensors kept between runs, one small safetensors file for each key.

A key is made of everything an entry depends on, so an entry is never changed: what depends on something else has
another key. Each file carries its key and a checksum, and is written whole or not at all (`library.files`), so several
runs can share a folder, and a damaged file counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from library.files import write_atomically

_ENDING = ".safetensors"
_KEY_LENGTH = 32
# Bytes in which an entry's header is found; most have a few hundred. 4 KiB of latents are read in 11 us, 64 KiB in 53.
_SHORT, _LONGEST_HEADER = 2**12, 2**16


def cache_key(*parts: str) -> str:
    """32 hex digits that depend on every part (BLAKE2b)."""
    return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=_KEY_LENGTH // 2).hexdigest()


def identity_of(module: nn.Module) -> str:
    """32 hex digits that depend on the module's tensors: their names, shapes, number formats and values.

    A model has the same identity whatever file it came from; 1.2 GB take about 1.5 s.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class TensorCache:
    """The entries of a folder.

    limit: bytes that the folder may hold; those unused for longest make room for new ones. Several threads may read and
    write at once.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        self._limit = limit
        self._lock = threading.Lock()
        self._sizes = None if limit is None else self._sizes_by_age()
        self._total = sum(self._sizes.values()) if self._sizes else 0

    def read(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors of an entry; None where it is missing, damaged or not what its name says."""
        try:
            data = self._path(key).read_bytes()
            header, start = _header(data)
            about = header["__metadata__"]
            if about["key"] != key or about["checksum"] != _checksum(data[start:]):
                return None
            tensors = load(data)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None
        self._count(key, len(data))
        if self._limit is not None:
            with suppress(OSError):  # of another user, or on a disk that cannot be written to
                os.utime(self._path(key))
        return tensors

    def holds(self, key: str) -> bool:
        """Whether the entry is there and of the length its header promises; its values are checked by `read` only."""
        try:
            with self._path(key).open("rb", buffering=0) as file:
                data = file.read(_SHORT)
                if _start(data) > _SHORT:
                    data += file.read(_LONGEST_HEADER)
                header, start = _header(data)
                length = os.fstat(file.fileno()).st_size
            about = header.pop("__metadata__")
            end = max(tensor["data_offsets"][1] for tensor in header.values())
            return about["key"] == key and length == start + end
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def write(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Adds an entry. OSError: the folder cannot be written to, or the disk is full."""
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = save(plain)
        checksum = _checksum(content[_header(content)[1] :])
        data = save(plain, {"key": key, "checksum": checksum})
        self._count(key, len(data))
        write_atomically(self._path(key), lambda file: file.write_bytes(data))

    def keys(self) -> set[str]:
        """The keys of all files that are there, whole or not."""
        return {entry.name.removesuffix(_ENDING) for entry in self._files()}

    def remove(self, key: str) -> None:
        """Deletes an entry, if it is there."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        """Spread over 256 folders: some file systems and all file managers are slow with 100,000 files in one."""
        return self.folder / key[:2] / f"{key}{_ENDING}"

    def _files(self) -> Iterator[os.DirEntry[str]]:
        if not self.folder.is_dir():
            return
        for shard in os.scandir(self.folder):
            if shard.is_dir():
                for entry in os.scandir(shard):
                    if entry.name.endswith(_ENDING) and len(entry.name) == _KEY_LENGTH + len(_ENDING):
                        yield entry

    def _sizes_by_age(self) -> OrderedDict[str, int]:
        """{key: bytes}, those written or read longest ago first."""
        found = sorted((entry.stat().st_mtime_ns, entry.name, entry.stat().st_size) for entry in self._files())
        return OrderedDict((name.removesuffix(_ENDING), size) for _, name, size in found)

    def _count(self, key: str, size: int) -> None:
        """Notes that an entry is used, or about to be written, and makes room for it."""
        if self._sizes is None:
            return
        with self._lock:
            self._total += size - self._sizes.pop(key, 0)
            while self._sizes and self._total > self._limit:
                oldest, freed = self._sizes.popitem(last=False)
                self.remove(oldest)
                self._total -= freed
            self._sizes[key] = size


def _header(data: bytes) -> tuple[dict[str, dict], int]:
    """A safetensors file's header, and where the tensors begin. ValueError or TypeError: it is not a whole one."""
    start = _start(data)
    if not 8 < start <= len(data):
        raise ValueError("the header is cut off")
    header = json.loads(data[8:start])
    if not isinstance(header, dict):
        raise ValueError("the header is not a table")
    return header, start


def _start(data: bytes) -> int:
    """Where the tensors of a safetensors file begin."""
    return 8 + int.from_bytes(data[:8], "little")


def _checksum(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"
