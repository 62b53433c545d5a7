"""What all adapters share: how one joins a module's output, dropout of whole modules, and DoRA's rescaling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Dropouts:
    """Chances (0 to 1) of leaving things out in training; each adapter type says what a neuron and a rank are to it.

    module: of skipping the adapter for a whole batch; what is kept is not scaled up.
    rank_scale: whether what rank dropout keeps is scaled up by the share it kept.
    """

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0
    rank_scale: bool = False


NO_DROPOUT = Dropouts()


class Adapter(nn.Module, ABC):
    """Changes the output of one module of the model. Parameters are float32 whatever the model's dtype.

    A subclass fills in the abstract methods.
    """

    rank: int
    alpha: float
    # Its parameters that come after the input-side ones; LoRA+ trains them at a higher rate.
    output_side: tuple[str, ...] = ()

    def __init__(self, dropouts: Dropouts) -> None:
        super().__init__()
        self.dropouts = dropouts
        self.register_parameter("dora_scale", None)

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the module's weight."""

    @abstractmethod
    def add_delta(self, x: Tensor, base_output: Tensor) -> Tensor:
        """base_output [..., out] plus what the adapter makes of x [..., in]; in base_output's dtype."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """What is added to the module's weight: float32, in its shape (before DoRA's rescaling)."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of this adapter, by suffix; detached, float32."""

    @abstractmethod
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes over a file's values of equal shapes, and alpha where it is given."""

    @abstractmethod
    def shrink(self, ratio: Tensor) -> None:
        """Multiplies the delta by a 0-d ratio, in place."""

    def delta_norm(self) -> Tensor:
        """Frobenius norm of the delta, 0-d."""
        return self.delta_weight().norm()

    @torch.no_grad()
    def limit_norm(self, limit: float) -> None:
        """Shrinks a delta that is longer than `limit` to it; nothing is read back from the device."""
        self.shrink((limit / self.delta_norm()).clamp(max=1.0))

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """The module's output with the adapter: shapes and dtype of base_output."""
        output = self.add_delta(x, base_output)
        if self.dora_scale is not None:
            output = self._rescaled(output)
        if self.dropouts.module and self.training:
            # Drawn on the device: a choice made on the host would be a branch in a captured graph.
            kept = torch.rand((), device=output.device) >= self.dropouts.module
            output = torch.where(kept, output, base_output)
        return output

    def merged(self, weight: Tensor) -> Tensor:
        """The module's weight with the adapter in it: float32, from a float32 weight."""
        merged = weight + self.delta_weight()
        if self.dora_scale is not None:
            merged = merged * (self.dora_scale / self.base_norm[:, None])
        return merged

    def get_extra_state(self) -> Tensor:
        """alpha goes into a training state with the weights: it sets their strength."""
        return torch.tensor(self.alpha, dtype=torch.float32)

    def set_extra_state(self, state: Tensor) -> None:
        self.alpha = float(state)

    # --- DoRA (Liu et al., 2024, "Weight-Decomposed Low-Rank Adaptation"), in ComfyUI's arithmetic ---

    def enable_dora(self, linear: nn.Linear) -> None:
        """Makes the length of each row of the Linear's weight trainable, starting from what it is.

        W' = (W + ΔW) · dora_scale / ‖W‖, row by row. ComfyUI divides by the norm of the original weight, LyCORIS and
        PEFT by that of W + ΔW: a file trained here renders as trained in ComfyUI only.
        """
        norm = linear.weight.detach().float().norm(dim=1)
        self.register_buffer("base_norm", norm, persistent=False)
        bias = linear.bias.detach().clone() if linear.bias is not None else None
        self.register_buffer("base_bias", bias, persistent=False)
        self.dora_scale = nn.Parameter(norm[:, None].clone())

    def _rescaled(self, output: Tensor) -> Tensor:
        scale = (self.dora_scale[:, 0] / self.base_norm).to(output.dtype)
        if self.base_bias is None:
            return output * scale
        bias = self.base_bias.to(output.dtype)
        return (output - bias) * scale + bias

    def _dora_tensors(self) -> dict[str, Tensor]:
        return {} if self.dora_scale is None else {"dora_scale": self.dora_scale.detach()}

    def _copy(self, tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
        """Copies file values into parameters by suffix, dora_scale and alpha with them."""
        with torch.no_grad():
            for suffix, parameter in parameters.items():
                parameter.copy_(tensors[suffix])
            if self.dora_scale is not None:
                self.dora_scale.copy_(tensors["dora_scale"])
        if "alpha" in tensors:
            self.alpha = float(tensors["alpha"])


def drop_rows(delta: Tensor, dropouts: Dropouts) -> Tensor:
    """LyCORIS' dropouts for a delta that is not factored through ranks: [..., out] -> [..., out].

    rank: leaves out rows of ΔW, the same for the whole batch, scaled by the share kept with rank_scale.
    neuron: leaves out elements of the delta's output, scaled by 1 / (1 - p).
    """
    if dropouts.rank:
        kept = (torch.rand(delta.shape[-1], device=delta.device) >= dropouts.rank).to(delta.dtype)
        delta = delta * (kept / kept.mean() if dropouts.rank_scale else kept)
    return torch.nn.functional.dropout(delta, dropouts.neuron) if dropouts.neuron else delta
