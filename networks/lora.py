"""LoRA: a low-rank update of one Linear (Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models")."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.adapter import NO_DROPOUT, Adapter, Dropouts


class LoRA(Adapter):
    """y = base(x) + (alpha / rank) · up(down(x)).

    down is [rank, in] with Kaiming initialisation (a = √5), up is [out, rank] and starts at zero, so that training
    starts from the base model. Both are float32 whatever the base's dtype; products are taken in the base's.

    Dropouts: neuron drops rank activations and scales up the rest; rank drops a rank for a whole sample and scales up
    the rest by 1 / (1 - p).
    """

    output_side = ("lora_up.weight",)

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float, dropouts: Dropouts = NO_DROPOUT
    ) -> None:
        super().__init__(dropouts)
        self.rank = rank
        self.alpha = float(alpha)
        self.lora_down = nn.Linear(in_features, rank, bias=False, dtype=torch.float32)
        self.lora_up = nn.Linear(rank, out_features, bias=False, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], dropouts: Dropouts = NO_DROPOUT) -> LoRA:
        """An adapter of the file's own sizes; without alpha the scale is 1, as ComfyUI reads it."""
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        return cls(down.shape[1], up.shape[0], down.shape[0], float(down.shape[0]), dropouts)

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.lora_up.out_features, self.lora_down.in_features

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def add_delta(self, x: Tensor, base_output: Tensor) -> Tensor:
        dtype = base_output.dtype
        hidden = F.linear(x.to(dtype), self.lora_down.weight.to(dtype))
        if self.training:
            hidden = self._dropped(hidden)
        return base_output + F.linear(hidden, (self.lora_up.weight * self.scale).to(dtype))

    def _dropped(self, hidden: Tensor) -> Tensor:
        if self.dropouts.neuron:
            hidden = F.dropout(hidden, self.dropouts.neuron)
        if self.dropouts.rank:
            shape = (hidden.shape[0], *[1] * (hidden.ndim - 2), self.rank)
            kept = torch.rand(shape, device=hidden.device) >= self.dropouts.rank
            hidden = hidden * (kept / (1 - self.dropouts.rank)).to(hidden.dtype)
        return hidden

    def delta_weight(self) -> Tensor:
        return self.scale * (self.lora_up.weight @ self.lora_down.weight)

    def delta_norm(self) -> Tensor:
        """‖up down‖² = Σ (upᵀ up) ∘ (down downᵀ): rank × rank products instead of out × in."""
        up, down = self.lora_up.weight, self.lora_down.weight
        return self.scale * ((up.t() @ up) * (down @ down.t())).sum().clamp(min=0).sqrt()

    def shrink(self, ratio: Tensor) -> None:
        self.lora_up.weight.mul_(ratio)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "lora_down.weight": self.lora_down.weight.detach(),
            "lora_up.weight": self.lora_up.weight.detach(),
            "alpha": torch.tensor(self.alpha, dtype=torch.float32),
            **self._dora_tensors(),
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._copy(tensors, {"lora_down.weight": self.lora_down.weight, "lora_up.weight": self.lora_up.weight})
