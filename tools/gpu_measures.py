"""What a GPU can do, and what of it is taken."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

# A bf16 product of two matrices of this side keeps the whole card busy for a millisecond or more.
_SIDE = 8192
# Larger than any cache, and small beside a card of 4 GiB.
_COPIED = 2**28


def ceilings(device: torch.device) -> dict[str, float]:
    """TFLOP/s of a large bf16 product, and GB/s of a large copy, read and written; medians of 20 runs."""
    a, b = (torch.randn(_SIDE, _SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = median_ms(lambda: a @ b)
    source = torch.zeros(_COPIED, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source))
    return {
        "ceiling_tflops": round(2 * _SIDE**3 / product / 1e9, 1),
        "ceiling_gb_s": round(2 * _COPIED / copy / 1e6, 1),
    }


def median_ms(function: Callable[[], object]) -> float:
    """Of 20 runs on the current GPU, after 5."""
    events = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events[5:])


def used_memory(device: torch.device) -> dict[str, float | None]:
    """GiB: peak_gib of tensors, reserved_gib by PyTorch for them, device_gib of the whole card now.

    The last counts what other programs use, and the CUDA context, which is about half a GiB.
    """
    if device.type != "cuda":
        return {"peak_gib": None}
    free, total = torch.cuda.mem_get_info()
    found = {
        "peak_gib": torch.cuda.max_memory_allocated(),
        "reserved_gib": torch.cuda.max_memory_reserved(),
        "device_gib": total - free,
    }
    return {name: round(value / 2**30, 2) for name, value in found.items()}


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_mark(device: torch.device) -> torch.cuda.Event | float:
    """When the device has done what it was asked so far, for `milliseconds_between`, without waiting for it."""
    if device.type != "cuda":
        return time.perf_counter()
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()
    return mark


def milliseconds_between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """Of two marks that have been reached: see `synchronize`."""
    return 1000 * (end - start) if isinstance(start, float) else start.elapsed_time(end)
