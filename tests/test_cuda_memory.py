"""What saves memory on a CUDA card, and what it changes: swapped and 8-bit blocks, checkpoints, recording, optimizers.

And what a preflight says of a card that is large enough, nearly full, or too small. These tests skip themselves without
one.
"""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from anima_train_network import main
from library.anima_runtime.config import AnimaConfig
from library.anima_runtime.memory.low_memory import MemorySettings
from library.training.optimization.optimizers import OptimizerSettings
from library.training.preflight import memory_limit
from library.training.run import RunSettings
from library.training.speed import SpeedSettings
from networks.settings import NetworkSettings
from tests.test_cuda_running import SIDES, made, train
from tools.anima_shapes import REAL, transformer_shapes
from tools.benchmark_cases import EAGER, LORA_BLOCKS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

DEPTH, SWAPPED = 5, 4
MODULES_RECORDED = SpeedSettings(torch_compile=False, cuda_graphs=True, fused_blocks=False)
FUSED = SpeedSettings(torch_compile=False, cuda_graphs=False, fused_blocks=True)
FUSED_RECORDED = SpeedSettings(torch_compile=False, cuda_graphs=True, fused_blocks=True)
# Clipping would differ in the last bit: recorded steps sum the norm over long tensors.
UNCLIPPED = OptimizerSettings(learning_rate=1e-4, max_grad_norm=0.0)


@pytest.fixture(scope="module")
def real_width_config() -> AnimaConfig:
    """The real widths, few blocks."""
    return AnimaConfig.from_shapes(transformer_shapes(replace(REAL, depth=DEPTH, adapter_depth=2), 32128))


def run_settings(checkpointing: bool, parks: bool = False) -> RunSettings:
    return RunSettings(mixed_precision="bf16", gradient_checkpointing=checkpointing, cpu_offload_checkpointing=parks)


@dataclass(frozen=True)
class Taken:
    """Of each step the loss and all gradients; bytes of the card that the trainer took between steps, and at most."""

    losses: list[float]
    gradients: list[Tensor]
    held: int
    peak: int


@pytest.fixture
def in_order(monkeypatch):
    """Every sum comes in the same order, attention's gradients as well, or is refused.

    With warn_only=True torch's attention would keep its faster backward pass, which adds as it comes.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def steps_of(config, speed=EAGER, count=6, **groups) -> Taken:
    """Steps of two shapes in turn. Adapters begin as after some training: at their own start most gradients are 0."""
    trainer, batches = made(config, speed, optimizer=UNCLIPPED, **groups)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    gradients = kept_gradients(trainer)
    torch.cuda.reset_peak_memory_stats()
    losses = torch.stack(train(trainer, *batches[:count])).tolist()
    held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    del trainer, batches, parameter
    gc.collect()  # a trainer refers to itself
    left = torch.cuda.memory_allocated()  # libraries keep their workspaces
    return Taken(losses, gradients, held - left, peak - left)


def kept_gradients(trainer) -> list[Tensor]:
    """A list that gets each step's gradients, one after the other, in main memory."""
    kept, step, parameters = [], trainer.parts.optimizer.step, list(trainer.network.parameters())

    def keep_and_step():
        kept.append(torch.cat([parameter.grad.flatten() for parameter in parameters]).cpu())
        return step()

    trainer.parts.optimizer.step = keep_and_step
    return kept


def same_bits(one: Taken, other: Taken) -> bool:
    return one.losses == other.losses and all(map(torch.equal, one.gradients, other.gradients))


def linear_bytes(config: AnimaConfig) -> tuple[int, int]:
    """A block's Linear weights in bf16, by hand, all but some hundred of its numbers: of products, of modulations."""
    width, self_attention, cross_attention = config.width, 4 * config.width, 2 * config.width + 2 * config.context_width
    products = self_attention + cross_attention + 2 * config.mlp_width
    return 2 * width * products, 2 * width * 3 * config.adaln_rank * (1 + 3)


def test_swapped_and_8_bit_blocks_give_the_numbers_they_should_in_less_memory(real_width_config, in_order):
    """Swapping changes no bit, of a bf16 and of an 8-bit base: the same kernels run on the same numbers.

    Two of the swapped blocks have room on the card at any time. 8 bits round each weight by up to 1/16, some up and
    some down: losses of 28 blocks were 0.2 % apart (docs/performance.md), and of these at 256² on a CPU 0.7 %. Sizes
    are 5 % off at most, by rows' scales and as memory comes in pieces, and peaks 10 %.
    """
    plain, swapped, eight, both = (
        steps_of(
            real_width_config, run=run_settings(True), memory=MemorySettings(fp8_base=rounds, blocks_to_swap=count)
        )
        for rounds in (False, True)
        for count in (0, SWAPPED)
    )
    assert same_bits(plain, swapped)
    assert same_bits(eight, both)
    assert eight.losses != plain.losses
    assert eight.losses == pytest.approx(plain.losses, rel=0.02)
    products, modulations = linear_bytes(real_width_config)
    away = SWAPPED - 2
    for saved_held, saved_peak, expected in [
        (plain.held - swapped.held, plain.peak - swapped.peak, away * (products + modulations)),
        (eight.held - both.held, eight.peak - both.peak, away * (products // 2 + modulations)),
    ]:
        assert saved_held == pytest.approx(expected, rel=0.05)
        assert saved_peak == pytest.approx(expected, rel=0.1)
    assert plain.held - eight.held == pytest.approx(DEPTH * products // 2, rel=0.05)


@pytest.mark.parametrize("rounds", [False, True], ids=["", "8 bits"])
def test_own_kernels_compute_the_same_of_swapped_blocks_in_less_memory(real_width_config, in_order, rounds):
    """Recorded, of two shapes in turn. Modules round to bf16 at other places: 3 %.

    The modulations stay, and the projections of the context, which are made for several blocks at once.
    """
    there, swapped = (
        steps_of(
            real_width_config, FUSED_RECORDED, run=run_settings(True, parks=True),
            memory=MemorySettings(fp8_base=rounds, blocks_to_swap=count),
        )
        for count in (0, SWAPPED)
    )  # fmt: skip
    assert same_bits(there, swapped)
    of_context = 2 * 2 * real_width_config.context_width * real_width_config.width
    saved = (SWAPPED - 2) * (linear_bytes(real_width_config)[0] - of_context) // (2 if rounds else 1)
    assert there.held - swapped.held == pytest.approx(saved, rel=0.05)
    by_modules = steps_of(real_width_config, run=run_settings(True), memory=MemorySettings(fp8_base=rounds))
    assert there.losses == pytest.approx(by_modules.losses, rel=0.03)


def test_swapped_blocks_that_no_backward_pass_reaches_can_be_recorded(real_width_config, in_order, caplog):
    """Nothing is on its way for them when a pass ends."""
    network = NetworkSettings(**LORA_BLOCKS, network_args=("target_modules=blocks.3-4.*_proj",))
    one, other = (
        steps_of(
            real_width_config, speed, run=run_settings(True, parks=True), network=network,
            memory=MemorySettings(blocks_to_swap=SWAPPED),
        )
        for speed in (FUSED, FUSED_RECORDED)
    )  # fmt: skip
    assert same_bits(one, other)
    assert "cannot be recorded" not in caplog.text


@pytest.mark.parametrize(
    ("plainly", "recorded", "memory"),
    [
        (EAGER, MODULES_RECORDED, MemorySettings()),
        (EAGER, MODULES_RECORDED, MemorySettings(fp8_base=True)),
        (FUSED, FUSED_RECORDED, MemorySettings()),
    ],
    ids=["by modules", "by modules, 8 bits", "own kernels"],
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_recorded_steps_are_the_plain_ones_bit_for_bit(
    real_width_config, in_order, plainly, recorded, memory, checkpointing
):
    """Three steps of each of two shapes, each of which moves the weights."""
    run = run_settings(checkpointing, parks=checkpointing)
    one, other = (steps_of(real_width_config, speed, run=run, memory=memory) for speed in (plainly, recorded))
    assert len(set(one.losses)) == 6
    assert same_bits(one, other)


def test_checkpoints_change_no_loss_and_take_less_memory_parked_or_not(real_width_config, in_order):
    """Losses within 1e-3, as a sum may be rounded to bf16 at another place when it is computed again.

    What is made again selectively has the same bits. A block leaves some 25 tensors of its input's size for the
    backward pass, of which the bound asks 10; with checkpoints its input alone, selectively some 14. What is parked
    waits on the card for its copy, five blocks' as well as not parked.
    """
    kept, again, parked = (
        steps_of(real_width_config, FUSED_RECORDED, run=run_settings(checkpointing, parks))
        for checkpointing, parks in ((False, False), (True, False), (True, True))
    )
    less = steps_of(real_width_config, FUSED_RECORDED, run=replace(run_settings(False), selective_checkpointing=True))
    assert same_bits(kept, less)
    assert again.losses == pytest.approx(kept.losses, rel=1e-3)
    assert parked.losses == pytest.approx(kept.losses, rel=1e-3)
    of_input = max(width * height for width, height in SIDES) // 16**2 * real_width_config.width * 2
    assert kept.peak - again.peak > (DEPTH - 1) * 10 * of_input
    assert kept.peak - parked.peak > (DEPTH - 1) * 10 * of_input
    assert kept.peak - less.peak > (DEPTH - 1) * 8 * of_input


@pytest.mark.parametrize(("name", "rate"), [("AdamW8bit", 1e-3), ("Lion8bit", 1e-4), ("AdEMAMix8bit", 1e-3)])
def test_8_bit_optimizers_learn_with_less_memory(real_width_config, name, rate):
    """One batch, ten times. Of AdamW's 8 bytes a weight Lion keeps 1 here, AdamW 2, AdEMAMix 3; and scales.

    Tensors of fewer than 4096 numbers keep theirs in float32. On a CPU two blocks' losses fell by 40 to 48 % at 256².
    """
    pytest.importorskip("bitsandbytes")
    taken = []
    for optimizer in (OptimizerSettings(), OptimizerSettings(optimizer_type=name, learning_rate=rate)):
        trainer, batches = made(real_width_config, optimizer=optimizer)
        losses = torch.stack(train(trainer, *[batches[0]] * 10))
        states = trainer.parts.optimizer.state.values()
        tensors = {each.data_ptr(): each for state in states for each in state.values() if isinstance(each, Tensor)}
        taken.append(sum(tensor.nbytes for tensor in tensors.values() if tensor.is_cuda))
    assert losses.isfinite().all()
    assert losses[-1] < 0.9 * losses[0]
    assert {parameter.dtype for parameter in trainer.network.parameters()} == {torch.float32}
    assert 0 < taken[1] < taken[0] / 2


# bucket, batch, (steps an epoch,) seconds a step, peak memory, reserved
ROW = re.compile(r"^ +(\d+x\d+) +(\d+) +[\d.]+ +([\d.]+) +([\d.]+ [MG]iB) +([\d.]+ [MG]iB)$", re.MULTILINE)


def mebibytes(told: str) -> float:
    number, unit = told.split()
    return float(number) * {"MiB": 1, "GiB": 1024}[unit]


def test_a_preflight_tells_time_and_memory_of_each_bucket(config, tmp_path, capsys):
    assert main(config(preflight=True, mixed_precision="bf16", gradient_checkpointing=False)) == 0
    told = capsys.readouterr().err
    rows = ROW.findall(told)
    assert [row[:2] for row in rows] == [(bucket, "4") for bucket in ("96x32", "48x80", "80x48", "64x64")]
    for _, _, seconds, peak, reserved in rows:
        assert float(seconds) > 0
        assert 0 < mebibytes(peak) <= mebibytes(reserved)
    assert "cuda_graphs on" in told
    assert "What needs less memory" not in told
    assert [path for name in ("logs", "output") for path in (tmp_path / name).rglob("*")] == []


def test_a_preflight_warns_of_a_card_that_is_nearly_full(config, capsys):
    """All but a twentieth of the card is taken before it begins: nothing else may run on it meanwhile."""
    device = torch.device("cuda", torch.cuda.current_device())
    free_all()
    taken = torch.empty(memory_limit(device) - torch.cuda.memory_allocated(), dtype=torch.uint8, device=device)
    words = {"preflight": True, "enable_bucket": False, "mixed_precision": "bf16", "gradient_checkpointing": False}
    assert main(config(**words)) == 0
    del taken
    told = " ".join(capsys.readouterr().err.split())
    assert "preflight: with a batch of 4 x 64x64 pixels, more than 95% of the GPU's memory is in use" in told
    assert "What needs less memory: " in told and "gradient_checkpointing = true" in told


@pytest.mark.parametrize("records", [False, True], ids=["plain", "recorded"])
def test_who_follows_a_preflight_comes_to_a_batch_that_fits(config, capsys, records):
    """On a card with three quarters of what a batch of 16 needs; half of it may not fit where steps are recorded."""
    words = {
        "preflight": True, "enable_bucket": False, "resolution": 1024, "mixed_precision": "bf16",
        "gradient_checkpointing": False, "cuda_graphs": records,
    }  # fmt: skip
    free_all()
    torch.cuda.reset_peak_memory_stats()
    assert main(config(**words, train_batch_size=16)) == 0
    peak = torch.cuda.max_memory_allocated()
    free_all()
    before = torch.cuda.memory_allocated()  # earlier tests may have left pieces of memory that is not in use
    limit = max(torch.cuda.memory_reserved(), before + (peak - before) * 3 // 4)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties().total_memory)
    try:
        batch, sizes = 16, []
        while main(config(**words, train_batch_size=batch, gradient_accumulation_steps=16 // batch)) == 1:
            told = capsys.readouterr().err
            assert f"preflight: out of GPU memory in a batch of {batch} x 1024x1024 pixels" in told
            assert "gradient_checkpointing = true" in told
            sizes.append(batch)
            batch = int(re.search(r"batch_size = (\d+) with gradient_accumulation_steps = \d+", told)[1])
            free_all()
        assert sizes == ([16, 8] if sizes[1:] else [16])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def free_all() -> None:
    """Trainers refer to themselves."""
    gc.collect()
    torch.cuda.empty_cache()
