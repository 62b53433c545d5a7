"""Attention's forward and backward pass as two calls, for passes that are written out.

Keys and values of zeros, which are part of Anima's text context, can be left out: a zero key's logit is 0, and its
value adds nothing, so n of them only add n to the softmax's denominator, exp(lse), where lse is the logarithm of the
sum of exp(logit):

    out' = exp(lse - lse') out,  lse' = log(exp(lse) + n)

Flash attention's backward pass takes probabilities to be exp(logit - lse) and needs nothing else of the softmax but
the row sums of dout * out (Dao et al., FlashAttention, arXiv 2205.14135, appendix B.2): given out' and lse' it computes
the gradients of the q, k and v that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from library.anima_runtime.attention import attend
from library.anima_runtime.attention_backends import AttentionFunction
from library.anima_runtime.ops.block_ops import add_zero_keys
from library.anima_runtime.ops.kernels import kernels_of

# A kernel's backward pass is shared out by heads and so many keys. With less than enough such shares for an H200 the
# queries come in parts, as samples of their own: 74 µs instead of 181 for 4096 queries of 128 keys in 8 parts, 120 for
# 512 keys in 2. More parts than that, or parts where there are shares enough, take longer.
_KEYS_OF_A_SHARE, _ENOUGH_SHARES, _MOST_PARTS = 64, 256, 8

Gradients = tuple[Tensor, Tensor, Tensor]


class Attended(NamedTuple):
    """What attention's backward pass needs. parts: how many samples were made of each.

    inputs: q, k and v as the pass took them, (B * parts, L, heads, D). output: (B, L, E).
    made: the kernel's result, of which the output is a view, and what else it leaves; empty where `pass_back` has that.
    pass_back: from the gradient of the output, in its shape, inputs and made to the gradients of the inputs.
    """

    inputs: Gradients
    output: Tensor
    parts: int
    made: tuple[Tensor, ...]
    pass_back: Callable[[Tensor, Gradients, tuple[Tensor, ...]], Gradients]


# What a kernel made of q, k and v, and its `pass_back`.
_Made = tuple[tuple[Tensor, ...], Callable[[Tensor, Gradients, tuple[Tensor, ...]], Gradients]]


def norms_heads(function: AttentionFunction, q: Tensor, k: Tensor) -> bool:
    """Whether `attend_normed_forward` can take such q and k, (B, L | S, heads, D) each."""
    return function is attend and q.is_cuda and kernels_of("few_keys").attends(q, k)


def attend_normed_forward(q: Tensor, k: Tensor, v: Tensor, weights: tuple[Tensor, Tensor], zeros: int) -> Attended:
    """Attention by kernels of this project, which norm q's and k's heads: (B, L | S, heads, D) each.

    weights: of these norms, [D] each. zeros: how many further keys and values are zero. The gradients that it passes
    back are those of normed q and k.
    """
    output, lse = kernels_of("few_keys").attend_few_keys(q, k, v, weights, zeros)

    def pass_back(dout_BLE: Tensor, inputs: Gradients, _made: tuple[Tensor, ...]) -> Gradients:
        return kernels_of("few_keys").attend_few_keys_backward(*inputs, weights, lse, dout_BLE)

    return Attended((q, k, v), output, 1, (), pass_back)


def attend_forward(function: AttentionFunction, q: Tensor, k: Tensor, v: Tensor, zeros: int = 0) -> Attended:
    """Attention by the model's own function, or the kernel that it would choose: (B, L | S, heads, D) each.

    zeros: how many further keys and values are zero.
    """
    parts = _parts(q, k)
    inputs = _in_parts(q, k, v, parts)
    kernel = _kernel(*inputs) if function is attend else None
    if kernel is None:
        output, pass_back = _by_autograd(function, inputs, zeros)
        return Attended(inputs, output.reshape(*q.shape[:2], -1), parts, (), pass_back)
    made, pass_back = kernel(inputs, zeros)
    return with_made(Attended(inputs, made[0], parts, (), pass_back), made, len(q))


def with_inputs(attended: Attended, q: Tensor, k: Tensor, v: Tensor) -> Attended:
    """The same with q, k and v, which it was without."""
    return attended._replace(inputs=_in_parts(q, k, v, attended.parts))


def with_made(attended: Attended, made: tuple[Tensor, ...], samples: int) -> Attended:
    """The same with what the kernel made, and the output for so many samples, which it was without."""
    out_BLHD = made[0].transpose(1, 2)
    return attended._replace(output=out_BLHD.reshape(samples, -1, out_BLHD.shape[2] * out_BLHD.shape[3]), made=made)


def attend_masked_forward(q: Tensor, k: Tensor, v: Tensor, mask_BS: Tensor) -> Attended:
    """Attention to some of the keys, see `attend`: (B, L | S, heads, D) each."""
    inputs = tuple(x.detach() for x in (q, k, v))
    output, pass_back = _by_autograd(partial(attend, mask_BS=mask_BS), inputs, 0)
    return Attended(inputs, output, 1, (), pass_back)


def attend_backward(attended: Attended, dout_NE: Tensor) -> Gradients:
    """Gradients of q, k and v, (B, L | S, heads, D) each, from that of the output, (B * L, E)."""
    q = attended.inputs[0]
    dq, dk, dv = attended.pass_back(dout_NE.view(*q.shape[:2], -1), attended.inputs, attended.made)
    if attended.parts > 1:
        dq = dq.unflatten(0, (-1, attended.parts)).flatten(1, 2)
        dk, dv = (x.unflatten(0, (-1, attended.parts)).sum(1) for x in (dk, dv))
    return dq, dk, dv


def _parts(q: Tensor, k: Tensor) -> int:
    samples, length, heads, _ = q.shape
    shares = samples * heads * -(-k.shape[1] // _KEYS_OF_A_SHARE)
    parts = 1
    while parts * shares < _ENOUGH_SHARES and parts < _MOST_PARTS and length % (2 * parts) == 0:
        parts *= 2
    return parts


def _in_parts(q: Tensor, k: Tensor, v: Tensor, parts: int) -> Gradients:
    if parts > 1:
        q = q.reshape(len(q) * parts, q.shape[1] // parts, *q.shape[2:])
        k, v = (torch.stack([x] * parts, dim=1).flatten(0, 1) for x in (k, v))
    return q.detach(), k.detach(), v.detach()


def _by_autograd(function: AttentionFunction, inputs: Gradients, zeros: int) -> tuple[Tensor, Callable]:
    """By any function, with a graph of its own, and zeros where they are to be."""
    leaves = tuple(x.requires_grad_() for x in inputs)
    with torch.enable_grad():
        q, k, v = leaves
        output = function(q, *(F.pad(x, (0, 0, 0, 0, 0, zeros)) for x in (k, v)) if zeros else (k, v))
    return output.detach(), lambda dout, _inputs, _made: torch.autograd.grad(output, leaves, dout)


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> Callable[[Gradients, int], _Made] | None:
    """The kernel that torch would choose, if it is one that can be given its softmax's denominator."""
    choice = SDPBackend(torch._fused_sdp_choice(*_as_heads(q, k, v)))
    if choice == SDPBackend.CUDNN_ATTENTION:
        return _by_cudnn
    if choice != SDPBackend.FLASH_ATTENTION:
        return None
    return _by_flash if q.is_cuda else _by_cpu_flash


def _by_cudnn(inputs: Gradients, zeros: int) -> _Made:
    out, lse, *lengths, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_as_heads(*inputs), None, True
    )

    def pass_back(dout_BLE: Tensor, inputs: Gradients, made: tuple[Tensor, ...]) -> Gradients:
        dout, out, lse = _split(dout_BLE, made[0]), *made
        return _as_rows(
            torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                dout, *_as_heads(*inputs), out, lse, seed, offset, None, *lengths, 0.0, False
            )
        )

    return _finished(out, lse, zeros), pass_back


def _by_flash(inputs: Gradients, zeros: int) -> _Made:
    out, lse, *rest, _ = torch.ops.aten._scaled_dot_product_flash_attention(*_as_heads(*inputs))
    *lengths, seed, offset = rest

    def pass_back(dout_BLE: Tensor, inputs: Gradients, made: tuple[Tensor, ...]) -> Gradients:
        dout, out, lse = _split(dout_BLE, made[0]), *made
        return _as_rows(
            torch.ops.aten._scaled_dot_product_flash_attention_backward(
                dout, *_as_heads(*inputs), out, lse, *lengths, 0.0, False, seed, offset
            )
        )

    return _finished(out, lse, zeros), pass_back


def _by_cpu_flash(inputs: Gradients, zeros: int) -> _Made:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_as_heads(*inputs))

    def pass_back(dout_BLE: Tensor, inputs: Gradients, made: tuple[Tensor, ...]) -> Gradients:
        dout, out, lse = _split(dout_BLE, made[0]), *made
        return _as_rows(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout, *_as_heads(*inputs), out, lse, 0.0, False
            )
        )

    return _finished(out, lse, zeros), pass_back


def _finished(out_BHLD: Tensor, lse: Tensor, zeros: int) -> tuple[Tensor, Tensor]:
    """The result, changed in place, and the logarithm, in its shape, with further keys."""
    if zeros:
        lse = add_zero_keys(out_BHLD.transpose(1, 2), lse.view(out_BHLD.shape[:3]), zeros).view_as(lse)
    return out_BHLD, lse


def _split(dout_BLE: Tensor, out_BHLD: Tensor) -> Tensor:
    return dout_BLE.unflatten(2, (out_BHLD.shape[1], -1)).transpose(1, 2)


def _as_heads(q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """(B, heads, L, D) each, from (B, L, heads, D)."""
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _as_rows(gradients: Any) -> Gradients:
    """(B, L, heads, D) each."""
    return tuple(gradient.transpose(1, 2) for gradient in gradients)
