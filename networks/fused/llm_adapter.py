"""The LLM adapter with its adapters, written out forward and backward: few passes over memory, no compiler.

Computes what `LLMAdapter.run_rows` and the hooks of LoRA, LoKr and NormDelta compute, from the same weights; see
`llm_block` for one of its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from library.anima_runtime.llm_adapter import LLMAdapter
from library.anima_runtime.ops.block_ops import summed
from library.anima_runtime.ops.residual_norm import (
    RootNormed,
    empty_weight_sums,
    residual_norm,
    residual_norm_backward,
)
from networks.fused.joint_linear import Passed, parameter_gradients
from networks.fused.llm_block import Activations, Found, FusedLLMBlock, GradientRooms, Rooms, Surroundings
from networks.fused.parts import Joint, Parts, TrainedWeights, rooms_of, rows
from networks.module_names import LLM_ADAPTER
from networks.network import AdapterNetwork


class _Saved(NamedTuple):
    """What the forward pass leaves for the backward pass. x: the stream behind the last block."""

    around: Surroundings
    source_NC: Tensor
    blocks: list[Activations]
    x_ND: Tensor
    hidden_NR: Tensor | None
    projected_NC: Tensor
    normed: RootNormed


class _RunRows(torch.autograd.Function):
    """All behind the embedding as one step of autograd. Its parameters are inputs so that they get gradients."""

    @staticmethod
    def forward(
        ctx: Any, x_BLD: Tensor, source_BSD: Tensor, mask_BL: Tensor, source_mask_BS: Tensor,
        fused: FusedLLMAdapter, *_: nn.Parameter,
    ) -> Tensor:  # fmt: skip
        out, ctx.saved = fused.forward(x_BLD, mask_BL, source_BSD, source_mask_BS)
        ctx.fused = fused
        return out

    @staticmethod
    def backward(ctx: Any, dout_BLC: Tensor) -> tuple[Tensor | None, ...]:
        saved, ctx.saved = ctx.saved, None
        dx, dsource, found = ctx.fused.backward(dout_BLC.contiguous(), saved, *ctx.needs_input_grad[:2])
        return dx, dsource, None, None, None, *found


class FusedLLMAdapter:
    """The LLM adapter with a network's adapters; takes the place of `LLMAdapter.run_rows`."""

    def __init__(self, adapter: LLMAdapter, network: AdapterNetwork) -> None:
        self._network, self._adapter = network, adapter
        self._plainly = adapter.run_rows
        adapters = {
            path.removeprefix(LLM_ADAPTER): each
            for path, each in network.adapters.items()
            if path.startswith(LLM_ADAPTER)
        }
        parts = Parts(adapter, adapters)
        self._blocks = []
        for number, block in enumerate(adapter.blocks):
            prefix = f"blocks.{number}."
            own = {path.removeprefix(prefix): each for path, each in adapters.items() if path.startswith(prefix)}
            self._blocks.append(FusedLLMBlock(block, own))
        # All blocks look at the same source: one product.
        numbers = range(len(self._blocks))
        self._kv = parts.joint(*(f"blocks.{number}.cross_attn.{name}_proj" for number in numbers for name in "kv"))
        self._output = parts.joint("out_proj")
        self._norm = parts.norm("norm")
        self._norms = [norm for block in self._blocks for norm in block.norms]
        joints = [self._kv, self._output, *(joint for block in self._blocks for joint in block.joints)]
        norms = [self._norm, *self._norms, *(norm for block in self._blocks for norm in block.head_norms)]
        self._parts = [*joints, *norms]
        # What is alike in all blocks.
        self._alike, self._fed, self._late = (
            list(zip(*(getattr(block, name) for block in self._blocks), strict=True))
            for name in ("joints", "fed", "late")
        )
        self._weights = TrainedWeights(list(adapters.values()), joints, norms)

    def __call__(self, x_BLD: Tensor, mask_BL: Tensor, source_BSD: Tensor, source_mask_BS: Tensor) -> Tensor:
        """See `RowsFunction`."""
        if self._network.multiplier != 1:
            return self._plainly(x_BLD, mask_BL, source_BSD, source_mask_BS)
        self._weights.take()
        return _RunRows.apply(x_BLD, source_BSD, mask_BL, source_mask_BS, self, *self.parameters())

    def parameters(self) -> list[nn.Parameter]:
        """All adapters', in the order of `backward`'s gradients."""
        return [parameter for part in self._parts for parameter in part.parameters()]

    def forward(
        self, x_BLD: Tensor, mask_BL: Tensor, source_BSD: Tensor, source_mask_BS: Tensor
    ) -> tuple[Tensor, _Saved]:
        """The context rows (B, L, C), and what `backward` needs."""
        around = self._surroundings(mask_BL, source_mask_BS, source_BSD.dtype)
        source_NC = self._kv.empty_input(source_mask_BS.numel()).copy_(rows(source_BSD))
        kv = self._kv.forward(source_NC)
        x_ND, branch, blocks = rows(x_BLD), None, []
        rooms = Rooms(
            rooms_of(self._fed, lambda joint, count: [joint.empty_input(count)], len(x_ND)),
            rooms_of(self._late, lambda joint, count: [joint.empty_output(count)], len(x_ND)),
        )
        for block, k_NE, v_NE in zip(self._blocks, kv[::2], kv[1::2], strict=True):
            x_ND, branch, activations = block.forward(x_ND, branch, k_NE, v_NE, around, rooms)
            blocks.append(activations)
        x_ND, _ = residual_norm(x_ND, branch, None)
        (projected_NC,), hidden_NR = self._output.forward_any(x_ND)
        into = projected_NC.new_empty(projected_NC.shape)
        _, normed = residual_norm(projected_NC, None, self._norm.weight, into)
        saved = _Saved(around, source_NC, blocks, x_ND, hidden_NR, projected_NC, normed)
        return normed.normed_ND.unflatten(0, mask_BL.shape), saved

    def backward(
        self, dout_BLC: Tensor, saved: _Saved, wants_x: bool, wants_source: bool
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        """Gradients of x, the source, and the parameters; None for those not wanted."""
        rooms = rooms_of(self._alike, lambda joint, count: joint.empty_gradients(count), len(saved.x_ND))
        found = self._pass_output(dout_BLC, saved, rooms[self._blocks[-1].narrow][0])
        dx_ND, dkv, found_there = self._pass_blocks(saved, rooms, wants_x)
        found |= found_there
        dsource_NC, found[self._kv] = self._kv.backward(dkv, saved.source_NC, None, wants_source)
        gradients = [gradient for part in self._parts for gradient in found[part][: len(part.parameters())]]
        dx_BLD = dx_ND.unflatten(0, (saved.around.samples, -1)) if wants_x else None
        dsource_BSC = dsource_NC.unflatten(0, (saved.around.samples, -1)) if wants_source else None
        return dx_BLD, dsource_BSC, gradients

    def _pass_output(self, dout_BLC: Tensor, saved: _Saved, dx_out_ND: Tensor) -> Found:
        """From the gradient of the context to that of the stream behind the last block, which goes to dx_out."""
        dout_NC = rows(dout_BLC)
        sums_PSC = empty_weight_sums(*dout_NC.shape, 1, dout_NC)
        gradients = self._output.empty_gradients(len(dout_NC))
        residual_norm_backward(
            None, dout_NC, saved.projected_NC, saved.normed, self._norm.weight, gradients[0], sums_PSC[:, 0]
        )
        dx_ND, found = self._output.backward(gradients, saved.x_ND, saved.hidden_NR, True)
        dx_out_ND.copy_(dx_ND)
        return {self._output: found, self._norm: [summed(sums_PSC[None])[0]]}

    def _pass_blocks(
        self, saved: _Saved, rooms: GradientRooms, wants_x: bool
    ) -> tuple[Tensor | None, Sequence[Tensor], Found]:
        """Gradients of x, of the products of the source, and of the blocks' parameters."""
        found: Found = {}
        passed: dict[Joint, Passed] = {}
        sums_PSD = empty_weight_sums(*saved.x_ND.shape, len(self._norms), saved.x_ND)
        dkv = self._kv.empty_gradients(len(saved.source_NC))
        first = self._blocks[0].norms[0]
        dx_ND = torch.empty_like(saved.x_ND) if wants_x or first.adapter is not None else None
        for number in reversed(range(len(self._blocks))):
            dx_out_ND = rooms[self._blocks[number - 1].narrow][0] if number else dx_ND
            found_here, passed_here = self._blocks[number].backward(
                saved.blocks[number], saved.around, *dkv[2 * number : 2 * number + 2], dx_out_ND,
                sums_PSD[:, 3 * number : 3 * number + 3], rooms,
            )  # fmt: skip
            found |= found_here
            passed |= passed_here
        for joints in self._alike:
            own = [joint for joint in joints if joint in passed]
            found |= zip(own, parameter_gradients(own, [passed[joint] for joint in own]), strict=True)
        dweights_SD = summed(sums_PSD[None]).unflatten(1, (len(self._norms), -1))[0]
        found |= {norm: [dweight] for norm, dweight in zip(self._norms, dweights_SD, strict=True)}
        return dx_ND, dkv, found

    def _surroundings(self, mask_BL: Tensor, source_mask_BS: Tensor, dtype: torch.dtype) -> Surroundings:
        masks = mask_BL, source_mask_BS
        longest = self._adapter.rotary(max(mask.shape[1] for mask in masks), mask_BL.device)
        tables = (tuple(table_LK[: mask.shape[1]] for table_LK in longest) for mask in masks)
        biases = (mask.to(dtype).log() for mask in masks)  # 0 and -inf
        (rotary, source_rotary), (bias_BL, source_bias_BS) = tables, biases
        return Surroundings(len(mask_BL), rotary, bias_BL, source_rotary, source_bias_BS)
