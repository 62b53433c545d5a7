"""What the fused parts of the model are made of: joint products and norms with their adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from library.anima_runtime.attention import RMSNorm, RotaryTables
from library.anima_runtime.memory.weight_swap import SwappedBlock
from library.anima_runtime.ops.block_ops import ManyCopies, empty_head_sums, head_norms, head_norms_backward, summed
from networks.adapter import Adapter
from networks.fused.joint_linear import JointLinear
from networks.fused.joint_lokr import JointLoKr
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
    """Makes the parts of a module with adapters, which go by the path of what they change in it.

    swapped: the block that the module is, if its weights are.
    """

    def __init__(self, module: nn.Module, adapters: Mapping[str, Adapter], swapped: SwappedBlock | None = None) -> None:
        self._module, self._adapters, self._swapped = module, adapters, swapped

    def joint(self, *paths: str) -> Joint:
        """Linears of one input."""
        linears = [self._module.get_submodule(path) for path in paths]
        own = [self._adapters.get(path) for path in paths]
        if any(isinstance(adapter, LoKr) for adapter in own):
            return JointLoKr(linears, own, self._swapped)
        return JointLinear(linears, own, self._swapped)

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


def normed_heads(
    inputs: Sequence[Tensor], norms: Sequence[FusedNorm], rotary: RotaryTables | None, samples: int
) -> list[Tensor]:
    """Heads, normed and rotated, of q and k or one of them, rows [N, E] of so many samples: (B, L, heads, D) each."""
    weights = [norm.weight for norm in norms]
    normed = head_norms(inputs, weights, rotary, len(inputs[0]) // samples)
    return [heads(x_NE, samples, len(weights[0])) for x_NE in normed]


class HeadNormsBackward:
    """The backward pass of `normed_heads` for all norms of a block's heads, and their own gradients."""

    def __init__(self, norms: Sequence[FusedNorm], like_NE: Tensor, samples: int) -> None:
        """like: rows as those of the largest input, or about as many."""
        self._norms, self._samples = norms, samples
        trains = any(norm.adapter is not None for norm in norms)
        self._sums_MPD = empty_head_sums(like_NE, len(norms), len(norms[0].weight)) if trains else None

    def run(
        self,
        first: int,
        gradients: Sequence[Tensor],
        inputs: Sequence[Tensor],
        rotary: RotaryTables | None,
        into: Sequence[Tensor],
    ) -> None:
        """The norms from number `first`, and v beside them, if given, from the gradients (B, L, heads, D) of each."""
        norms = slice(first, first + len(inputs))
        weights = [norm.weight for norm in self._norms[norms]]
        sums = None if self._sums_MPD is None else self._sums_MPD[norms]
        length = len(inputs[0]) // self._samples
        head_norms_backward([rows(x).flatten(1) for x in gradients], inputs, weights, rotary, length, into, sums)

    def found(self) -> dict[FusedNorm, list[Tensor]]:
        """The gradients of the norms' parameters, when all of them have run."""
        dweights = [None] * len(self._norms) if self._sums_MPD is None else summed(self._sums_MPD)
        pairs = zip(self._norms, dweights, strict=True)
        return {norm: [] if norm.adapter is None else [dweight] for norm, dweight in pairs}
