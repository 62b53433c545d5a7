"""Where the GPU's time goes: every kernel of a few steps by kind, and every matrix product by its shape.

A recorded step is profiled as it is replayed, kernel by kernel. Shapes are known where an operator launches
its kernels, which a replay does not, so the same steps are profiled once more without recording.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

# The base model's products at real sizes have no shorter side; adapters (rank 16, LoKr's factors) and modulation do.
THIN_SIDE = 256
_MOST_NAMES = 40
_THIN, _LARGE = "thin products (adapters, modulation)", "large products"
_PRODUCTS = ("mm", "addmm", "bmm", "_scaled_mm")
# Operators whose tensors are (B, L, H, D); of others they are (B, H, L, D).
_HEADS_LAST = ("_flash_attention", "_efficient_attention")

# First match wins. On a CPU operators stand for kernels, so their names are here as well.
_KINDS = (
    # What the compiler writes is named after all operators that it came from: attention's too, next to which it runs.
    (_LARGE, r"^triton_tem_"),
    ("elementwise and norms", r"^triton_"),
    ("attention", r"flash|fmha|sdpa|scaled_dot_product|attention|attend_"),
    (_LARGE, r"gemm|nvjet|cutlass|xmma|gemv|splitk|cublas|aten::(mm|addmm|bmm|_scaled_mm)$"),
    ("exchange between GPUs", r"nccl"),
    ("optimizer, gradient sums and norms", r"multi_tensor_apply|_foreach|fused_adam|lpnorm|optimizer"),
    ("copies and casts", r"memcpy|memset|copy_|catarray|aten::(cat|clone|fill_|zero_)$"),
    ("elementwise and norms", r"elementwise|norm|reduce|softmax|gelu|silu|activate|index|aten::"),
    (_THIN, r"^_factor_gradients"),
    ("elementwise and norms", r"^_(sum_programs|add_zero_keys|mix|merge|write_out)"),
    ("other", r""),
)
# A compiled kernel that only moves or casts has no other words than these in its name.
_MOVES = re.compile(
    r"^triton_[a-z]+_fused((__to_copy|__unsafe_view|_t|_view|_clone|_cat|_transpose|_permute|_expand|_slice"
    r"|_split|_unsqueeze|_squeeze|_copy_?|_select|_stack|_unbind|_empty|_zeros|_constant_pad_nd))*_\d+$"
)


class Kernel(NamedTuple):
    """One run of a kernel."""

    name: str
    microseconds: float


class Product(NamedTuple):
    """What an operator computes: kind "product" (M, N, K) or "attention" (heads of all samples, L, S, D)."""

    kind: str
    shape: tuple[int, ...]
    flops: float
    bytes: float


class Call(NamedTuple):
    """A product that an operator computed, and the kernels that it launched for it."""

    product: Product
    kernels: tuple[Kernel, ...]


def profile_step(step: Callable[[], Any], plain_step: Callable[[], Any] | None, count: int = 3) -> dict[str, Any]:
    """A report of `count` calls of `step`, as JSON can hold it; times are of one call.

    plain_step: the same work without recording, to see shapes with; None where `step` is that already.
    """
    kernels, calls = _profiled(step, count)
    if plain_step is not None:
        _, calls = _profiled(plain_step, count)
    return {
        "busy_ms": round(sum(kernel.microseconds for kernel in kernels) / 1000 / count, 3),
        "kernels": round(len(kernels) / count),
        "kinds": _by_kind(kernels, thin_shares(calls), count),
        "products": _by_shape(calls, count),
        "names": _by_name(kernels, count),
    }


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name alone; products count as large."""
    if _MOVES.match(name):
        return "copies and casts"
    return next(kind for kind, pattern in _KINDS if re.search(pattern, name, re.IGNORECASE))


def product_of(operator: str, shapes: Sequence[Sequence[int]]) -> Product | None:
    """What a matrix product or attention computes, from its inputs' shapes; None for other operators.

    Bytes are those of bfloat16 operands and results, each moved once.
    """
    name, tensors = operator.removeprefix("aten::"), [shape for shape in shapes if len(shape) > 1]
    if name in _PRODUCTS and len(tensors) > 1:
        left, right = tensors[1:3] if name.endswith("addmm") and len(tensors) > 2 else tensors[:2]
        batch, (m, k), n = math.prod(left[:-2]), left[-2:], right[-1]
        return Product("product", (batch * m, n, k), 2.0 * batch * m * n * k, 2.0 * batch * (m * k + k * n + m * n))
    # The public operator only chooses one of the others.
    if "attention" in name and name.startswith("_") and len(tensors) > 2 and len(tensors[0]) == 4:
        backward = "backward" in name
        q, k = tensors[1:3] if backward else tensors[:2]  # the gradient comes first
        rows, heads = (1, 2) if name.startswith(_HEADS_LAST) else (2, 1)
        shape = (q[0] * q[heads], q[rows], k[rows], q[3])
        area, sides = math.prod(shape), shape[0] * (shape[1] + shape[2]) * shape[3]
        if backward:  # five products for the forward's two; q, k, v, output, their gradients
            return Product("attention backward", shape, 10.0 * area, 8.0 * sides)
        return Product("attention", shape, 4.0 * area, 4.0 * sides)
    return None


def thin_shares(calls: Sequence[Call]) -> dict[str, float]:
    """By name of kernel, the share of its time that thin products take: large ones may run the same kernel."""
    thin, total = defaultdict(float), defaultdict(float)
    for product, kernels in calls:
        if product.kind == "product":
            for name, microseconds in kernels:
                total[name] += microseconds
                thin[name] += microseconds if min(product.shape) <= THIN_SIDE else 0.0
    return {name: thin[name] / time for name, time in total.items() if time > 0}


def _profiled(step: Callable[[], Any], count: int) -> tuple[list[Kernel], list[Call]]:
    """All kernels of `count` calls, and the products whose operator is known; on a CPU operators are the kernels."""
    is_cuda = torch.cuda.is_available()
    step()  # what happens once
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda else [])
    with profile(activities=activities, record_shapes=True) as recorder:
        for _ in range(count):
            step()
        if is_cuda:
            torch.cuda.synchronize()
    events = recorder.events()
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    if is_cuda:
        # A marked region of the program appears among the kernels too, by the name it has on the host.
        regions = {event.name for event in on_host}
        kernels = [
            Kernel(event.name, event.time_range.elapsed_us())
            for event in events
            if event.device_type != DeviceType.CPU and event.name not in regions
        ]
    else:
        kernels = [Kernel(event.name, event.self_cpu_time_total) for event in on_host if _is_operator(event)]
    calls = []
    for event in on_host:
        product = product_of(event.name, [shape for shape in event.input_shapes or () if isinstance(shape, list)])
        own = [Kernel(kernel.name, kernel.duration) for kernel in event.kernels]
        if not is_cuda and _is_operator(event):
            own = [Kernel(event.name, event.self_cpu_time_total)]
        if product is not None and own:
            calls.append(Call(product, tuple(own)))
    return kernels, calls


def _is_operator(event: FunctionEvent) -> bool:
    return event.name.startswith("aten::") and event.self_cpu_time_total > 0


def _by_kind(kernels: Sequence[Kernel], thin: dict[str, float], count: int) -> list[dict[str, Any]]:
    """Time and launches of each kind, the longest first."""
    times, launches = defaultdict(float), defaultdict(float)
    for kernel in kernels:
        kind, share = kind_of(kernel.name), thin.get(kernel.name, 0.0)
        for own, part in ((_THIN, share), (_LARGE, 1 - share)) if kind == _LARGE else ((kind, 1.0),):
            times[own] += part * kernel.microseconds
            launches[own] += part
    total = sum(times.values())
    return [
        {"kind": kind, "ms": round(time / 1000 / count, 3), "share": round(time / total, 3),
         "kernels": round(launches[kind] / count)}
        for kind, time in sorted(times.items(), key=lambda entry: -entry[1])
        if time > 0
    ]  # fmt: skip


def _by_shape(calls: Sequence[Call], count: int) -> list[dict[str, Any]]:
    """Each product and attention by its shape: time, calls, work and least traffic, the longest first."""
    times, numbers = defaultdict(float), defaultdict(int)
    for product, kernels in calls:
        times[product] += sum(kernel.microseconds for kernel in kernels)
        numbers[product] += 1
    return [
        {"kind": product.kind, "shape": list(product.shape), "ms": round(time / 1000 / count, 4),
         "calls": round(numbers[product] / count), "teraflop": product.flops * numbers[product] / count / 1e12,
         "gigabyte": product.bytes * numbers[product] / count / 1e9}
        for product, time in sorted(times.items(), key=lambda entry: -entry[1])
    ]  # fmt: skip


def _by_name(kernels: Sequence[Kernel], count: int) -> list[dict[str, Any]]:
    """The names that take most, with their kind."""
    times, launches = defaultdict(float), defaultdict(int)
    for kernel in kernels:
        times[kernel.name] += kernel.microseconds
        launches[kernel.name] += 1
    longest = sorted(times.items(), key=lambda entry: -entry[1])[:_MOST_NAMES]
    return [
        {"name": name[:160], "kind": kind_of(name), "ms": round(time / 1000 / count, 3),
         "kernels": round(launches[name] / count)}
        for name, time in longest
    ]  # fmt: skip
