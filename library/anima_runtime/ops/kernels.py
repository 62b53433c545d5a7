"""Where the Triton kernels are."""

from __future__ import annotations

import importlib
from types import ModuleType


def kernels_of(subject: str) -> ModuleType:
    """A module of Triton kernels. Triton is there on CUDA only, and takes a while to import."""
    return importlib.import_module(f"library.anima_runtime.ops.{subject}_kernels")
