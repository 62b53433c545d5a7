"""Compiles the kernels as a training step of the real model launches them, and prints what each needs of a card.

python tests/anima_runtime/ops/kernel_resources.py 86 90: a line of JSON for each kernel and compute capability, in
tenths.
No card is needed: launches are recorded instead of made, and Triton brings its compilers along.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from library.anima_runtime.ops import (
    block_kernels,
    few_keys_kernels,
    head_kernels,
    low_rank_kernels,
    mixing_kernels,
    norm_kernels,
    residual_norm_kernels,
    writing_kernels,
)
from library.anima_runtime.ops.block_ops import Gated, Modulation, ModulationSums, Normed, Sum
from library.anima_runtime.ops.residual_norm import RootNormed

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
_TABLES = torch.int64, torch.int32  # of copies
_OPTIONS = ("num_warps", "num_stages")
ROWS, WIDTH, HEADS, SIZE, KEYS = 4096, 2048, 16, 128, 128


class Launch(NamedTuple):
    """A kernel, and what it would have been called with."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


def recorded(work: Callable[[], Any]) -> list[Launch]:
    """The launches that the work would make."""
    launches = []

    def record(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        launches.append(Launch(self, {**dict(zip(self.arg_names, arguments, strict=False)), **named}, options))

    run, JITFunction.run = JITFunction.run, record
    try:
        work()
    finally:
        JITFunction.run = run
    return launches


def compiled_bytes(launch: Launch, capability: int) -> int:
    """Bytes of shared memory that a program of the kernel takes on such a card."""
    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name], even = _POINTERS[value.dtype], True
        else:
            is_whole = isinstance(value, int)
            signature[parameter.name], even = "i32" if is_whole else "fp32", is_whole and value % 16 == 0
        if even:
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options).metadata.shared


def bf16(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def fp32(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


def run_norms() -> None:
    """What lies between a block's branches, with LoRA and modulation sums, whole and in halves."""
    x, normed_ND, dbranch = bf16(1, ROWS, WIDTH), bf16(ROWS, WIDTH + 16)[:, :WIDTH], bf16(ROWS, WIDTH + 16)[:, :WIDTH]
    room = bf16(ROWS, WIDTH + 16)
    gated = Gated(Sum(room[:, :WIDTH], room[:, WIDTH:], bf16(16, WIDTH)), bf16(1, WIDTH))
    modulation, sums = Modulation(bf16(1, WIDTH), bf16(1, WIDTH)), ModulationSums(fp32(1, 132, 9, WIDTH), 0, 2)
    normed = Normed(normed_ND, fp32(ROWS), fp32(ROWS))
    norm_kernels.gated_norm(x, gated, modulation, normed_ND)
    norm_kernels.gated_norm(x, gated, None, None)
    norm_kernels.gated_norm(x, None, modulation, normed_ND)
    for own_sums in (sums, None):
        norm_kernels.gated_norm_backward(x, x[0], x, normed, modulation, gated, dbranch, own_sums)
        norm_kernels.gated_norm_backward(x, None, x, None, None, gated, dbranch, own_sums)
        norm_kernels.gated_norm_backward(x, x[0], x, normed, modulation, None, None, own_sums)
    y, weight, root = bf16(512, 1024), fp32(1024), RootNormed(bf16(512, 1040)[:, :1024], fp32(512))
    residual_norm_kernels.residual_norm(y, Sum(y, bf16(512, 16), bf16(16, 1024)), weight, root.normed_ND)
    residual_norm_kernels.residual_norm_backward(y, y, y, root, weight, y, fp32(256, 1024))


def run_heads() -> None:
    """q, k and v of self-attention, and of cross-attention, whose gradients of few keys are float32."""
    room, tables, weight = bf16(ROWS, 3 * WIDTH + 48), (fp32(ROWS, SIZE // 2), fp32(ROWS, SIZE // 2)), fp32(SIZE)
    q, k, v = (room[:, number * WIDTH : (number + 1) * WIDTH] for number in range(3))
    sums = fp32(4, head_kernels.head_programs(ROWS, WIDTH), SIZE)
    heads = [bf16(ROWS, WIDTH) for _ in range(3)]
    head_kernels.head_norms([q, k], [weight, weight], tables, ROWS)
    head_kernels.head_norms_backward(heads, [q, k], [weight, weight], tables, ROWS, [q, k, v], sums[:2])
    few = [fp32(KEYS, WIDTH) for _ in range(2)]
    head_kernels.head_norms_backward(few, [k[:KEYS]], [weight], None, KEYS, [k[:KEYS], v[:KEYS]], sums[3:])


def run_rest() -> None:
    """GELU, sums, copies and zero keys; weights of 8 bits; a LoKr of factor 8."""
    block_kernels.gelu(bf16(ROWS, 4 * WIDTH), bf16(ROWS, 4 * WIDTH))
    block_kernels.gelu_backward(bf16(ROWS, 4 * WIDTH), bf16(ROWS, 4 * WIDTH), bf16(ROWS, 4 * WIDTH + 16))
    block_kernels.sum_programs(fp32(1, 132, 9 * WIDTH))
    block_kernels.add_zero_keys(bf16(1, ROWS, HEADS, SIZE), fp32(1, HEADS, ROWS), 300)
    wholes, numbers = ([torch.empty(400, dtype=dtype, device="meta") for _ in range(4)] for dtype in _TABLES)
    block_kernels._copy_all[(400, 8)](
        *wholes[:2], numbers[0], *wholes[2:], numbers[1], fp32(400), bf16(16, WIDTH), SIZE=2048, num_warps=4
    )
    mixing_kernels.merge(bf16(3 * WIDTH, WIDTH), bf16(3, 8, 8), bf16(3, 256, 256), bf16(3 * WIDTH, WIDTH))
    float8 = torch.empty(4 * WIDTH, WIDTH, dtype=torch.float8_e4m3fn, device="meta")
    beside = bf16(4 * WIDTH, 16), bf16(16, WIDTH)
    for weight, scale in ((float8, fp32(4 * WIDTH, 1)), (bf16(4 * WIDTH, WIDTH), None)):
        writing_kernels.write_out(weight, scale, *beside, bf16(4 * WIDTH + 16, WIDTH + 16))
    mixing_kernels.mix(bf16(3, 8, 8), bf16(3, ROWS, 8, 256), bf16(3, ROWS, 8, 256), bf16(3, ROWS, 8, 256))


def run_low_rank() -> None:
    """The gradients of LoRAs of one Linear and of three."""
    for linears in (1, 3):
        ranks, width = linears * 16, linears * WIDTH
        room, x = bf16(ROWS, width + ranks), bf16(ROWS, WIDTH + ranks)
        low_rank_kernels.factor_gradients(room[:, :width], x[:, WIDTH:], x[:, :WIDTH], room[:, width:], linears)
    low_rank_kernels.factor_gradients(bf16(ROWS, 4 * WIDTH), bf16(ROWS, 64), bf16(ROWS, WIDTH), bf16(ROWS, 64), 1)


def run_few_keys() -> None:
    """Attention to few keys, which is for cards with much shared memory."""
    q, k, dout = bf16(1, ROWS, HEADS, SIZE), bf16(1, KEYS, HEADS, SIZE), bf16(1, ROWS, WIDTH)
    weights = fp32(SIZE), fp32(SIZE)
    few_keys_kernels.attend_few_keys(q, k, k, weights, 384)
    few_keys_kernels.attend_few_keys_backward(q, k, k, weights, fp32(HEADS, ROWS), dout)


def main(words: Sequence[str]) -> None:
    """Prints the lines."""
    for run in (run_norms, run_heads, run_rest, run_low_rank, run_few_keys):
        for launch in recorded(run):
            for capability in map(int, words):
                size = compiled_bytes(launch, capability)
                line = {"of": run.__name__, "kernel": launch.kernel.__name__, "capability": capability, "bytes": size}
                sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
