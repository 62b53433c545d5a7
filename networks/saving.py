"""An adapter in the number format it is to be saved in."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from library.errors import ModelFileError
from networks.adapter_files import export_tensors

logger = logging.getLogger(__name__)


def tensors_to_save(
    adapters: Mapping[str, Mapping[str, Tensor]], file_format: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A file's tensors by key: float32, with a warning, where a value is too large for dtype (fp16 ends at 65504)."""
    try:
        return export_tensors(adapters, file_format, dtype)
    except ModelFileError as error:
        tensors = export_tensors(adapters, file_format, torch.float32)
        logger.warning("%s This file is saved as float.", error)
        return tensors
