"""LoKr: a Kronecker-product update of one Linear (Yeh et al., 2023, "Navigating Text-To-Image Customization", LyCORIS).

ΔW = scale · (w1 ⊗ w2), w1 [out_small, in_small], w2 [out_large, in_large]. The product is not built here:
(w1 ⊗ w2) x is w1 X w2ᵀ with x seen as a matrix X [in_small, in_large], which for 2048 × 2048 at factor 8 costs an
eighth of a dense product. `joint_lokr`, for passes that are written out, does build it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.adapter import NO_DROPOUT, Adapter, Dropouts, drop_rows

# Rows are grouped until the small product's matrix has sides about this long, a tile of the matrix units.
_GROUPED_SIDE = 128


def factorize(dimension: int, factor: int) -> tuple[int, int]:
    """The (small, large) divisor pair of a dimension that LyCORIS chooses.

    A positive factor that divides it gives that pair. Otherwise the pair closest to square whose small part is at most
    the factor; -1 sets no bound.
    """
    if factor > 0 and dimension % factor == 0:
        small, large = sorted((factor, dimension // factor))
        return small, large
    bound = math.isqrt(dimension) if factor < 0 else min(factor, math.isqrt(dimension))
    small = max(divisor for divisor in range(1, bound + 1) if dimension % divisor == 0)
    return small, dimension // small


class LoKr(Adapter):
    """y = base(x) + scale · (w1 ⊗ w2) x, with w1 and w2 whole or each a product of two low-rank factors.

    w2 is whole with full_matrix, or when the rank is at least half its longer side; w1 is low-rank only with
    decompose_both, when the rank is below half its longer side, and not with full_matrix. The scale is alpha / rank,
    or 1 when both are whole. w1 starts at Kaiming (a = √5), w2 (or w2_b) at zero, so that training starts from the
    base model.

    Dropouts as in LyCORIS: rank drops rows of ΔW, neuron drops elements of its output.
    """

    output_side = ("lokr_w1", "lokr_w1_a")

    def __init__(
        self,
        w1_shape: tuple[int, int],
        w2_shape: tuple[int, int],
        w1_rank: int | None,
        w2_rank: int | None,
        rank: int,
        alpha: float,
        dropouts: Dropouts = NO_DROPOUT,
    ) -> None:
        """w1_rank, w2_rank: of the low-rank factors; None for a whole one."""
        super().__init__(dropouts)
        self.rank = rank
        self.alpha = float(alpha)
        self._make_factor("lokr_w1", w1_shape, w1_rank)
        self._make_factor("lokr_w2", w2_shape, w2_rank)
        for name, parameter in self._factors().items():
            if name not in ("lokr_w2", "lokr_w2_b"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    def _make_factor(self, name: str, shape: tuple[int, int], rank: int | None) -> None:
        sizes = {name: shape} if rank is None else {f"{name}_a": (shape[0], rank), f"{name}_b": (rank, shape[1])}
        for key in (name, f"{name}_a", f"{name}_b"):
            self.register_parameter(key, nn.Parameter(torch.zeros(sizes[key])) if key in sizes else None)

    @classmethod
    def for_linear(
        cls,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dropouts: Dropouts = NO_DROPOUT,
        *,
        factor: int = 8,
        full_matrix: bool = False,
        decompose_both: bool = False,
    ) -> LoKr:
        """An adapter for a Linear of these sizes; the class says which factors are whole."""
        (out_small, out_large), (in_small, in_large) = factorize(out_features, factor), factorize(in_features, factor)
        w1_whole = full_matrix or not decompose_both or rank >= max(out_small, in_small) / 2
        w2_whole = full_matrix or rank >= max(out_large, in_large) / 2
        shapes = (out_small, in_small), (out_large, in_large)
        return cls(*shapes, None if w1_whole else rank, None if w2_whole else rank, rank, alpha, dropouts)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], dropouts: Dropouts = NO_DROPOUT) -> LoKr:
        """An adapter of the file's own structure. The rank is that of w2_b's rows, else of w1_b's."""
        w1_shape, w1_rank = _factor_sizes(tensors, "lokr_w1")
        w2_shape, w2_rank = _factor_sizes(tensors, "lokr_w2")
        rank = w2_rank or w1_rank or max(w2_shape)
        return cls(w1_shape, w2_shape, w1_rank, w2_rank, rank, float(rank), dropouts)

    @property
    def weight_shape(self) -> tuple[int, int]:
        (out_small, in_small), (out_large, in_large) = self.w1.shape, self.w2.shape
        return out_small * out_large, in_small * in_large

    @property
    def is_whole(self) -> bool:
        """Whether neither factor is low-rank."""
        return self.lokr_w1 is not None and self.lokr_w2 is not None

    @property
    def scale(self) -> float:
        return 1.0 if self.is_whole else self.alpha / self.rank

    @property
    def w1(self) -> Tensor:
        """[out_small, in_small], float32."""
        return self.lokr_w1 if self.lokr_w1 is not None else self.lokr_w1_a @ self.lokr_w1_b

    @property
    def w2(self) -> Tensor:
        """[out_large, in_large], float32."""
        return self.lokr_w2 if self.lokr_w2 is not None else self.lokr_w2_a @ self.lokr_w2_b

    def scaled_factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """w1, with the scale, and w2 in a dtype."""
        return (self.w1 if self.scale == 1 else self.w1 * self.scale).to(dtype), self.w2.to(dtype)

    def add_delta(self, x: Tensor, base_output: Tensor) -> Tensor:
        dtype = base_output.dtype
        w1, w2 = self.scaled_factors(dtype)
        if self.training and (self.dropouts.rank or self.dropouts.neuron):
            delta = KroneckerLinear.apply(x.to(dtype), torch.zeros_like(base_output), w1, w2)
            return base_output + drop_rows(delta, self.dropouts)
        return KroneckerLinear.apply(x.to(dtype), base_output, w1, w2)

    def delta_weight(self) -> Tensor:
        return self.scale * torch.kron(self.w1, self.w2)

    def delta_norm(self) -> Tensor:
        return self.scale * self.w1.norm() * self.w2.norm()

    def shrink(self, ratio: Tensor) -> None:
        (self.lokr_w2 if self.lokr_w2 is not None else self.lokr_w2_b).mul_(ratio)

    def tensors(self) -> dict[str, Tensor]:
        """alpha of whole factors is written so that readers which divide it by rows(w2) // rows(w1) find strength 1."""
        alpha = self.lokr_w2.shape[0] // self.lokr_w1.shape[0] if self.is_whole else self.alpha
        factors = {name: parameter.detach() for name, parameter in self._factors().items()}
        return {**factors, "alpha": torch.tensor(float(alpha)), **self._dora_tensors()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._copy(tensors, self._factors())

    def _factors(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if name.startswith("lokr_")}


def _factor_sizes(tensors: dict[str, Tensor], name: str) -> tuple[tuple[int, int], int | None]:
    """A factor's shape, and its rank if it is low-rank."""
    if name in tensors:
        rows, columns = tensors[name].shape
        return (rows, columns), None
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    return (a.shape[0], b.shape[1]), b.shape[0]


class KroneckerLinear(torch.autograd.Function):
    """base_output + x (w1 ⊗ w2)ᵀ for x [..., i1·i2], w1 [o1, i1], w2 [o2, i2], base_output [..., o1·o2].

    Keeps only x and the factors for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base_output: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        ctx.save_for_backward(x, w1, w2)
        return add_kronecker_(base_output.clone(memory_format=torch.contiguous_format), x, w1, w2)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        grad_x, grad_w1, grad_w2 = kronecker_gradients(grad_output, *ctx.saved_tensors, ctx.needs_input_grad[0])
        return grad_x, grad_output, grad_w1, grad_w2


def add_kronecker_(base_output: Tensor, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Adds x (w1 ⊗ w2)ᵀ to base_output, in place; see `KroneckerLinear`. All of one dtype, and in order of memory.

    The factor that leaves the smaller product goes first. Products with w1 take several rows side by side, see
    `_grouped`. bmm is called by name: matmul of a matrix with a batch copies the batch when that requires a gradient.
    """
    g1, x_NII = _side_by_side(x, w1, w2)
    g1_NOI = g1.expand(len(x_NII), -1, -1)
    if _w1_goes_first(w1, w2):
        inner_NOI = torch.bmm(g1_NOI, x_NII)
        base_output.view(-1, w2.shape[0]).addmm_(inner_NOI.flatten(0, 1), w2.t())
    else:
        base_output.view(-1, g1.shape[0], w2.shape[0]).baddbmm_(g1_NOI, F.linear(x_NII, w2))
    return base_output


def kronecker_gradients(
    grad_output: Tensor, x: Tensor, w1: Tensor, w2: Tensor, wants_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of `add_kronecker_`'s x, w1 and w2."""
    g1, x_NII = _side_by_side(x, w1, w2)
    grad_NOO = grad_output.reshape(-1, g1.shape[0], w2.shape[0])
    g1_NOI = g1.expand(len(x_NII), -1, -1)
    grad_x = None
    if _w1_goes_first(w1, w2):
        grad_inner_NOI = F.linear(grad_NOO, w2.t())
        if w2.shape[0] <= w2.shape[1]:
            # Not from the forward pass' inner product: a compiler would keep that, 16 MiB for each of 280 Linears.
            inner_NIO = torch.bmm(g1_NOI.transpose(1, 2), grad_NOO)
            grad_w2 = inner_NIO.flatten(0, 1).t() @ x_NII.flatten(0, 1)
        else:
            grad_w2 = grad_NOO.flatten(0, 1).t() @ torch.bmm(g1_NOI, x_NII).flatten(0, 1)
        pair = grad_inner_NOI, x_NII
        if wants_x:
            grad_x = torch.bmm(g1_NOI.transpose(1, 2), grad_inner_NOI).view_as(x)
    else:
        grad_inner_NIO = torch.bmm(g1_NOI.transpose(1, 2), grad_NOO)
        grad_w2 = grad_inner_NIO.flatten(0, 1).t() @ x_NII.flatten(0, 1)
        pair = grad_NOO, F.linear(x_NII, w2)
        if wants_x:
            grad_x = F.linear(grad_inner_NIO, w2.t()).view_as(x)
    grad_g1 = torch.bmm(pair[0], pair[1].transpose(1, 2)).sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
    return grad_x, _ungrouped(grad_g1, w1), grad_w2


def _side_by_side(x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """w1 for several rows side by side, and x as matrices of as many rows."""
    g1 = _grouped(w1, x.numel() // (w1.shape[1] * w2.shape[1]))
    return g1, x.reshape(-1, g1.shape[1], w2.shape[1])


def _w1_goes_first(w1: Tensor, w2: Tensor) -> bool:
    """Whether w1 x leaves less than x w2ᵀ."""
    return w1.shape[0] * w2.shape[1] <= w1.shape[1] * w2.shape[0]


def _grouped(w1: Tensor, rows: int) -> Tensor:
    """1 ⊗ w1 [g·o1, g·i1], which acts on g rows side by side as w1 does on each; g divides the number of rows.

    A product with an 8 × 8 matrix leaves a GPU's matrix units idle: on an H200 the one for 4096 rows of 2048 takes
    38 µs, and 10 µs in groups of 16 rows.
    """
    size = math.gcd(rows, max(1, _GROUPED_SIDE // max(w1.shape)))
    grouped = w1.new_zeros(size, w1.shape[0], size, w1.shape[1])
    grouped.diagonal(dim1=0, dim2=2).copy_(w1[..., None])
    return grouped.flatten(2).flatten(0, 1)


def _ungrouped(grad_g1: Tensor, w1: Tensor) -> Tensor:
    """The gradient of w1 from that of 1 ⊗ w1: the sum of its diagonal blocks."""
    size = grad_g1.shape[0] // w1.shape[0]
    return grad_g1.view(size, w1.shape[0], size, w1.shape[1]).diagonal(dim1=0, dim2=2).sum(-1)
