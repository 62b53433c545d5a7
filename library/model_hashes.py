"""Hashes by which other programs recognise a model or an adapter file."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import BinaryIO

logger = logging.getLogger(__name__)

# Metadata that `fill_hashes` fills in, at its final width: what a hash is taken of must not move when it is written.
BLANK_HASHES = {
    "sshs_model_hash": "0" * 64,
    "sshs_legacy_hash": "0" * 8,
    "modelspec.hash_sha256": "0x" + "0" * 64,
}

_CHUNK = 2**20


def fill_hashes(file: Path) -> None:
    """Replaces BLANK_HASHES in the metadata of a safetensors file by the hashes of that very file.

    sshs_model_hash: SHA-256 of all tensor data, that is of what follows the header; the same whatever the metadata is.
    modelspec.hash_sha256: the same, as sai_model_spec 1.0.1 writes it.
    sshs_legacy_hash: see `legacy_hash`. A header of more than 1 MiB may put this value into the hashed part; it is then
        the hash of the file with zeros in its place.
    Keys that are absent or not blank are left alone.
    """
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length)
        digest = _sha256(opened)
        header = _filled(header, "sshs_model_hash", digest)
        header = _filled(header, "modelspec.hash_sha256", f"0x{digest}")
        _write_header(opened, header)
        _write_header(opened, _filled(header, "sshs_legacy_hash", legacy_hash(opened)))


def legacy_hash(opened: BinaryIO) -> str:
    """The short hash of the Stable Diffusion web UI: of 64 KiB at 1 MiB into the file, its first 8 hex digits."""
    opened.seek(0x100000)
    return hashlib.sha256(opened.read(0x10000)).hexdigest()[:8]


def sha256_of(file: Path) -> str:
    """Of the whole file, 64 hex digits."""
    with file.open("rb") as opened:
        return _sha256(opened)


def start_hashing(files: Mapping[str, Path]) -> dict[str, str]:
    """{"sd_model": path} -> {"sd_model_hash": legacy hash}, to which a thread adds new_sd_model_hash, the SHA-256.

    Reading gigabytes must not hold up a run, so a file saved before the thread is done does without that one. Folders
    have no hash.
    """
    files = {name: path for name, path in files.items() if path.is_file()}
    hashes = {}
    for name, path in files.items():
        with path.open("rb") as opened:
            hashes[f"{name}_hash"] = legacy_hash(opened)
    Thread(target=_add_sha256, args=(files, hashes), name="model hashes", daemon=True).start()
    return hashes


def _add_sha256(files: Mapping[str, Path], hashes: dict[str, str]) -> None:
    for name, path in files.items():
        try:
            hashes[f"new_{name}_hash"] = sha256_of(path)
        except OSError as error:
            logger.warning("%s: no SHA-256 in the metadata: %s", path, error.strerror)


def _sha256(opened: BinaryIO) -> str:
    """Of what is left to read."""
    digest = hashlib.sha256()
    while chunk := opened.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _filled(header: bytes, key: str, value: str) -> bytes:
    """Within another metadata value the key's quotes would be escaped, so only the key itself is found."""
    blank = f'"{key}":"{BLANK_HASHES[key]}"'
    return header.replace(blank.encode(), f'"{key}":"{value}"'.encode())


def _write_header(opened: BinaryIO, header: bytes) -> None:
    opened.seek(8)
    opened.write(header)
