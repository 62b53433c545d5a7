"""Trained norm weights, as differences from the model's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.adapter import NO_DROPOUT, Adapter


class NormDelta(Adapter):
    """RMSNorm with its weight w changed to w + δ: y = base(x) + x / rms(x) · δ, with eps 1e-6 as the model's norms.

    δ is float32 and starts at zero. Weight decay pulls it to zero, and so the norm to its base value.
    """

    rank = 1
    alpha = 1.0

    def __init__(self, size: int) -> None:
        super().__init__(NO_DROPOUT)
        self.w_norm = nn.Parameter(torch.zeros(size))

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> NormDelta:
        """A delta of the file's own size."""
        return cls(tensors["w_norm"].shape[0])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.w_norm.shape)

    def add_delta(self, x: Tensor, base_output: Tensor) -> Tensor:
        return base_output + F.rms_norm(x, self.w_norm.shape, self.w_norm.to(x.dtype), eps=1e-6)

    def delta_weight(self) -> Tensor:
        return self.w_norm

    def shrink(self, ratio: Tensor) -> None:
        self.w_norm.mul_(ratio)

    def tensors(self) -> dict[str, Tensor]:
        return {"w_norm": self.w_norm.detach()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._copy(tensors, {"w_norm": self.w_norm})
