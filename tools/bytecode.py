"""Whether Python finds imported modules compiled, or compiles them from their source at each start."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType


def count_uncompiled(modules: Iterable[ModuleType] | None = None) -> int:
    """How many of the modules, by default all that are imported, have a source and no compiled file that fits it.

    Where Python may write such files there are none of these after a start. Where it may not (PYTHONDONTWRITEBYTECODE,
    packages in a folder that is not writable), or where sources got other times when they were copied, importing takes
    three times as long, each time.
    """
    specs = [getattr(module, "__spec__", None) for module in modules or tuple(sys.modules.values())]
    found = [(Path(spec.origin), spec.cached) for spec in specs if spec is not None and spec.origin and spec.cached]
    return sum(not _fits(Path(compiled), source) for source, compiled in found if source.suffix == ".py")


def _fits(compiled: Path, source: Path) -> bool:
    """By the header that every compiled file has (PEP 552): format, flags, the source's time and size."""
    try:
        with compiled.open("rb") as file:
            header = file.read(16)
        status = source.stat()
    except OSError:
        return False
    if header[:4] != importlib.util.MAGIC_NUMBER:
        return False
    if int.from_bytes(header[4:8], "little"):  # by the source's hash, which Python may be told not to look at
        return True
    stamped = [int.from_bytes(header[start : start + 4], "little") for start in (8, 12)]
    return stamped == [int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF]
