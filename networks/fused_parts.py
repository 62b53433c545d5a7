"""What the fused parts of the model are made of: joint products and norms with their adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from library.anima_runtime.attention import RMSNorm
from library.anima_runtime.block_ops import ManyCopies, summed
from networks.adapter import Adapter
from networks.joint_linear import JointLinear
from networks.joint_lokr import JointLoKr
from networks.lokr import LoKr
from networks.norm import NormDelta

Joint = JointLinear | JointLoKr


class FusedNorm:
    """An RMSNorm with what an adapter adds to its weight.

    weight [D]: as it was when `TrainedWeights` last took it, in float32 at least.
    """

    def __init__(self, norm: RMSNorm, adapter: NormDelta | None) -> None:
        self.base = norm.weight.detach().to(torch.promote_types(norm.weight.dtype, torch.float32))
        self.weight = self.base
        self.adapter = adapter

    def parameters(self) -> list[nn.Parameter]:
        return [] if self.adapter is None else [self.adapter.w_norm]


class Parts:
    """Makes the parts of a module with adapters, which go by the path of what they change in it."""

    def __init__(self, module: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        self._module, self._adapters = module, adapters

    def joint(self, *paths: str) -> Joint:
        """Linears of one input."""
        linears = [self._module.get_submodule(path) for path in paths]
        own = [self._adapters.get(path) for path in paths]
        if any(isinstance(adapter, LoKr) for adapter in own):
            return JointLoKr(linears, own)
        return JointLinear(linears, own)

    def norm(self, path: str) -> FusedNorm:
        return FusedNorm(self._module.get_submodule(path), self._adapters.get(path))


class TrainedWeights:
    """Brings what adapters now hold, as steps move it, to where products and norms read it."""

    def __init__(self, adapters: Sequence[Adapter], joints: Sequence[Joint], norms: Sequence[FusedNorm]) -> None:
        self._adapters = adapters
        self._joints = joints
        self._norms = [norm for norm in norms if norm.adapter is not None]
        self._alphas: list[float] = []
        self._copies = ManyCopies(())

    @torch.no_grad()
    def take(self) -> None:
        alphas = [adapter.alpha for adapter in self._adapters]
        if alphas != self._alphas:  # at first, and when a state or a file that was loaded brought its own
            self._alphas = alphas
            self._copies = ManyCopies([copy for joint in self._joints for copy in joint.copies()])
        self._copies.run()
        if self._norms:
            pairs = [(norm.base, norm.adapter.w_norm) for norm in self._norms]
            for norm, weight in zip(self._norms, torch._foreach_add(*map(list, zip(*pairs, strict=True))), strict=True):
                norm.weight = weight


def rooms_of(
    alike: Iterable[Sequence[Joint]], empty: Callable[[Joint, int], Sequence[Tensor]], count: int
) -> dict[Joint, Sequence[Tensor]]:
    """What `empty` gives for each joint and so many rows.

    alike: joints of which `parameter_gradients` can be made by one product, for which their rooms lie evenly apart in
    one memory; LoKrs', and those of other ranks, which their network_reg_dims may be, lie anywhere.
    """
    found: dict[Joint, Sequence[Tensor]] = {}
    for joints in alike:
        if any(isinstance(joint, JointLoKr) for joint in joints) or len({joint.sizes for joint in joints}) > 1:
            found |= {joint: empty(joint, count) for joint in joints}
        else:
            chunks = (whole.chunk(len(joints)) for whole in empty(joints[0], count * len(joints)))
            found |= zip(joints, zip(*chunks, strict=True), strict=True)
    return found


def rows(x_BLD: Tensor) -> Tensor:
    """The tokens of all samples, one after another."""
    return x_BLD.flatten(0, 1)


def heads(x_NE: Tensor, samples: int, head_size: int) -> Tensor:
    """Rows [N, E] of so many samples as (B, L, heads, D)."""
    return x_NE.unflatten(0, (samples, -1)).unflatten(2, (-1, head_size))


def norm_gradients(norms: Sequence[FusedNorm], sums_MPD: Tensor | None) -> dict[FusedNorm, list[Tensor]]:
    """The gradients of those norms' parameters from partial sums, which must be there if any of them trains."""
    dweights = [None] * len(norms) if sums_MPD is None else summed(sums_MPD)
    return {norm: [] if norm.adapter is None else [dweight] for norm, dweight in zip(norms, dweights, strict=True)}
