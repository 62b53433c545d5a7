"""LoRA: a low-rank update of one Linear (Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models")."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LoRA(nn.Module):
    """y = base(x) + (alpha / rank) · up(down(x)).

    down is [rank, in] with Kaiming initialisation (a = √5), up is [out, rank] and starts at zero, so that training
    starts from the base model. Both are float32 whatever the base's dtype; products are taken in the base's.

    dropout: chance of each rank activation to be dropped in training.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.rank = rank
        self.alpha = float(alpha)
        self.dropout = dropout
        self.lora_down = nn.Linear(in_features, rank, bias=False, dtype=torch.float32)
        self.lora_up = nn.Linear(rank, out_features, bias=False, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], dropout: float = 0.0) -> LoRA:
        """Rebuilds an adapter from what `tensors()` gave; without alpha the scale is 1, as ComfyUI reads it."""
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        rank = down.shape[0]
        alpha = float(tensors["alpha"]) if "alpha" in tensors else float(rank)
        adapter = cls(down.shape[1], up.shape[0], rank, alpha, dropout)
        adapter.load_tensors(tensors)
        return adapter

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """x [..., in], base_output [..., out] -> [..., out] in base_output's dtype."""
        dtype = base_output.dtype
        hidden = F.linear(x.to(dtype), self.lora_down.weight.to(dtype))
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout, self.training)
        return base_output + F.linear(hidden, (self.lora_up.weight * self.scale).to(dtype))

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the Linear's weight: float32 [out, in]."""
        return self.scale * (self.lora_up.weight @ self.lora_down.weight)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of this adapter, by suffix."""
        return {
            "lora_down.weight": self.lora_down.weight.detach(),
            "lora_up.weight": self.lora_up.weight.detach(),
            "alpha": torch.tensor(self.alpha, dtype=torch.float32),
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes over weights of equal shapes, and alpha where it is given."""
        with torch.no_grad():
            self.lora_down.weight.copy_(tensors["lora_down.weight"])
            self.lora_up.weight.copy_(tensors["lora_up.weight"])
        self.alpha = float(tensors["alpha"]) if "alpha" in tensors else float(self.rank)
