"""What one module's adapter tensors change, as dense matrices: for tools that measure, merge or refactor files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from library.errors import ModelFileError
from networks.adapter import Adapter
from networks.adapter_types import adapter_kind
from networks.loha import LoHa
from networks.lokr import LoKr
from networks.lora import LoRA
from networks.norm import NormDelta

ADAPTER_CLASSES: dict[str, type[Adapter]] = {"lora": LoRA, "lokr": LoKr, "loha": LoHa, "norm": NormDelta}


def delta_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """What one module's adapter adds to its weight: float32, in the weight's shape.

    tensors: by suffix, whole and with alpha, as `read_adapter_file` gives them.
    Raises ModelFileError where the tensors alone do not tell it: DoRA (W' = (W + ΔW) · dora_scale / ‖W‖ needs W),
    absolute norm values, and adapters that change the bias only.
    """
    if "dora_scale" in tensors:
        raise ModelFileError("DoRA rescales the base weight: it has no difference without the base model")
    if "diff" in tensors:
        return tensors["diff"].float()
    return adapter_of(tensors).delta_weight()


@torch.no_grad()
def adapter_of(tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter of the tensors' own sizes with their values, in float32; DoRA's scales are left out.

    Raises ModelFileError for a plain difference (`.diff`), absolute norm values, and changes of the bias only.
    """
    kind = adapter_kind("the adapter", tensors)
    if kind not in ADAPTER_CLASSES or (kind == "norm" and "w_norm" not in tensors):
        raise ModelFileError(f"{', '.join(tensors)}: no adapter that changes a weight")
    factors = {suffix: tensor for suffix, tensor in tensors.items() if suffix != "dora_scale"}
    adapter = ADAPTER_CLASSES[kind].from_tensors(factors)
    adapter.load_tensors(factors)
    return adapter.requires_grad_(False)


def bias_delta_of(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """What one module's adapter adds to its bias, float32 [out]; None where it leaves it alone."""
    bias = tensors.get("b_norm", tensors.get("diff_b"))
    return None if bias is None else bias.float()
