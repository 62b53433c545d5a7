"""LoHa: a Hadamard-product update of one Linear (Hyeon-Woo et al., 2022, "FedPara"; LyCORIS)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.adapter import NO_DROPOUT, Adapter, Dropouts, drop_rows

SUFFIXES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


class LoHa(Adapter):
    """y = base(x) + (alpha / rank) · ((w1_a w1_b) ∘ (w2_a w2_b)) x, w?_a [out, rank], w?_b [rank, in].

    w1_a starts at N(0, 0.1²), w1_b and w2_b at N(0, 1), w2_a at zero, so that training starts from the base model.
    Dropouts as in LyCORIS: rank drops rows of ΔW, neuron drops elements of its output.
    """

    output_side = ("hada_w1_a", "hada_w2_a")

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float, dropouts: Dropouts = NO_DROPOUT
    ) -> None:
        super().__init__(dropouts)
        self.rank = rank
        self.alpha = float(alpha)
        self.hada_w1_a = nn.Parameter(torch.randn(out_features, rank) * 0.1)
        self.hada_w1_b = nn.Parameter(torch.randn(rank, in_features))
        self.hada_w2_a = nn.Parameter(torch.zeros(out_features, rank))
        self.hada_w2_b = nn.Parameter(torch.randn(rank, in_features))

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], dropouts: Dropouts = NO_DROPOUT) -> LoHa:
        """An adapter of the file's own sizes; without alpha the scale is 1."""
        out_features, rank = tensors["hada_w1_a"].shape
        return cls(tensors["hada_w1_b"].shape[1], out_features, rank, float(rank), dropouts)

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.hada_w1_a.shape[0], self.hada_w1_b.shape[1]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def add_delta(self, x: Tensor, base_output: Tensor) -> Tensor:
        dtype = base_output.dtype
        factors = [getattr(self, suffix) for suffix in SUFFIXES]
        delta = HadamardLinear.apply(x.to(dtype), self.scale, *factors)
        return base_output + (drop_rows(delta, self.dropouts) if self.training else delta)

    def delta_weight(self) -> Tensor:
        return self.scale * (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)

    def shrink(self, ratio: Tensor) -> None:
        self.hada_w2_a.mul_(ratio)

    def tensors(self) -> dict[str, Tensor]:
        factors = {suffix: getattr(self, suffix).detach() for suffix in SUFFIXES}
        return {**factors, "alpha": torch.tensor(self.alpha), **self._dora_tensors()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._copy(tensors, {suffix: getattr(self, suffix) for suffix in SUFFIXES})


class HadamardLinear(torch.autograd.Function):
    """x (scale · (w1_a w1_b) ∘ (w2_a w2_b))ᵀ.

    ΔW is as large as the Linear's weight, so the backward pass builds it anew rather than keep it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w1_a, w1_b, w2_a, w2_b)
        ctx.scale = scale
        return F.linear(x, (scale * (w1_a @ w1_b) * (w2_a @ w2_b)).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, w1_a, w1_b, w2_a, w2_b = ctx.saved_tensors
        w1, w2 = w1_a @ w1_b, w2_a @ w2_b
        grad_x = grad_output @ (ctx.scale * w1 * w2).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_delta = ctx.scale * (grad_output.flatten(0, -2).t() @ x.flatten(0, -2)).to(w1.dtype)
        grad_w1, grad_w2 = grad_delta * w2, grad_delta * w1
        return grad_x, None, grad_w1 @ w1_b.t(), w1_a.t() @ grad_w1, grad_w2 @ w2_b.t(), w2_a.t() @ grad_w2
