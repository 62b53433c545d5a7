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
from library.anima_runtime.block_ops import add_zero_keys

# A kernel's backward pass is shared out by heads and so many keys. With less than enough such shares for an H200 the
# queries come in parts, as samples of their own: 74 µs instead of 181 for 4096 queries of 128 keys in 8 parts, 120 for
# 512 keys in 2. More parts than that, or parts where there are shares enough, take longer.
_KEYS_OF_A_SHARE, _ENOUGH_SHARES, _MOST_PARTS = 64, 256, 8

Gradients = tuple[Tensor, Tensor, Tensor]


class Attended(NamedTuple):
    """What attention's backward pass needs. parts: how many samples were made of each.

    inputs: q, k and v as the pass took them, (B * parts, L, heads, D). output: (B, L, E).
    pass_back: from the gradient of the output, in its shape, to those of the inputs.
    """

    inputs: Gradients
    output: Tensor
    parts: int
    pass_back: Callable[[Tensor], Gradients]


def attend_forward(function: AttentionFunction, q: Tensor, k: Tensor, v: Tensor, zeros: int = 0) -> Attended:
    """Attention by the model's own function, or the kernel that it would choose: (B, L | S, heads, D) each.

    zeros: how many further keys and values are zero.
    """
    samples, length = q.shape[:2]
    parts = _parts(q, k)
    if parts > 1:
        q = q.reshape(samples * parts, length // parts, *q.shape[2:])
        k, v = (torch.stack([x] * parts, dim=1).flatten(0, 1) for x in (k, v))
    inputs = tuple(x.detach() for x in (q, k, v))
    kernel = _kernel(*inputs) if function is attend else None
    output, pass_back = _by_autograd(function, inputs, zeros) if kernel is None else kernel(inputs, zeros)
    return Attended(inputs, output.reshape(samples, length, -1), parts, pass_back)


def attend_masked_forward(q: Tensor, k: Tensor, v: Tensor, mask_BS: Tensor) -> Attended:
    """Attention to some of the keys, see `attend`: (B, L | S, heads, D) each."""
    inputs = tuple(x.detach() for x in (q, k, v))
    output, pass_back = _by_autograd(partial(attend, mask_BS=mask_BS), inputs, 0)
    return Attended(inputs, output, 1, pass_back)


def attend_backward(attended: Attended, dout_NE: Tensor) -> Gradients:
    """Gradients of q, k and v, (B, L | S, heads, D) each, from that of the output, (B * L, E)."""
    q = attended.inputs[0]
    dq, dk, dv = attended.pass_back(dout_NE.view(*q.shape[:2], -1))
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


def _by_autograd(function: AttentionFunction, inputs: Gradients, zeros: int) -> tuple[Tensor, Callable]:
    """By any function, with a graph of its own, and zeros where they are to be."""
    leaves = tuple(x.requires_grad_() for x in inputs)
    with torch.enable_grad():
        q, k, v = leaves
        output = function(q, *(F.pad(x, (0, 0, 0, 0, 0, zeros)) for x in (k, v)) if zeros else (k, v))
    return output.detach(), lambda dout: torch.autograd.grad(output, leaves, dout)


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> Callable[[Gradients, int], tuple[Tensor, Callable]] | None:
    """The kernel that torch would choose, if it is one that can be given its softmax's denominator."""
    choice = SDPBackend(torch._fused_sdp_choice(*(x.transpose(1, 2) for x in (q, k, v))))
    if choice == SDPBackend.CUDNN_ATTENTION:
        return _by_cudnn
    if choice != SDPBackend.FLASH_ATTENTION:
        return None
    return _by_flash if q.is_cuda else _by_cpu_flash


def _by_cudnn(inputs: Gradients, zeros: int) -> tuple[Tensor, Callable]:
    q, k, v = (x.transpose(1, 2) for x in inputs)
    out, lse, *lengths, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    output, lse = _finished(out, lse, zeros)

    def pass_back(dout_BLE: Tensor) -> Gradients:
        dout = _as_heads(dout_BLE, out)
        return _as_rows(
            torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                dout, q, k, v, out, lse, seed, offset, None, *lengths, 0.0, False
            )
        )

    return output, pass_back


def _by_flash(inputs: Gradients, zeros: int) -> tuple[Tensor, Callable]:
    q, k, v = (x.transpose(1, 2) for x in inputs)
    out, lse, *rest, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    *lengths, seed, offset = rest
    output, lse = _finished(out, lse, zeros)

    def pass_back(dout_BLE: Tensor) -> Gradients:
        dout = _as_heads(dout_BLE, out)
        return _as_rows(
            torch.ops.aten._scaled_dot_product_flash_attention_backward(
                dout, q, k, v, out, lse, *lengths, 0.0, False, seed, offset
            )
        )

    return output, pass_back


def _by_cpu_flash(inputs: Gradients, zeros: int) -> tuple[Tensor, Callable]:
    q, k, v = (x.transpose(1, 2) for x in inputs)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    output, lse = _finished(out, lse, zeros)

    def pass_back(dout_BLE: Tensor) -> Gradients:
        dout = _as_heads(dout_BLE, out)
        return _as_rows(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, False)
        )

    return output, pass_back


def _finished(out_BHLD: Tensor, lse: Tensor, zeros: int) -> tuple[Tensor, Tensor]:
    """The result (B, L, E), changed in place, and the logarithm, in its shape, with further keys."""
    out_BLHD = out_BHLD.transpose(1, 2)
    if zeros:
        lse = add_zero_keys(out_BLHD, lse.view(out_BHLD.shape[:3]), zeros).view_as(lse)
    return out_BLHD.flatten(2), lse


def _as_heads(dout_BLE: Tensor, out_BHLD: Tensor) -> Tensor:
    return dout_BLE.unflatten(2, (out_BHLD.shape[1], -1)).transpose(1, 2)


def _as_rows(gradients: Any) -> Gradients:
    """(B, L, heads, D) each."""
    return tuple(gradient.transpose(1, 2) for gradient in gradients)
