"""What keeps a run safe, on a CUDA card: guard, EMA, background saving and resume beside recorded and fused steps.

These tests skip themselves without one.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file

from library.anima_runtime.config import AnimaConfig
from library.training.host_copy import HostCopy, reserve_host_memory
from library.training.optimization.ema import EmaSettings, decay_after
from library.training.saving.states import copy_state, load_state, write_state
from library.training.speed import SpeedSettings
from library.training.watching.guard import RATE_FACTOR, GuardSettings
from tests.training_runs import TrainingRun, read_records, tensor_bytes
from tools.anima_shapes import REAL, transformer_shapes
from tools.benchmark_cases import EAGER, BenchmarkTrainer, Case, case_settings, endless_batches, made_trainer
from tools.benchmark_running import main as benchmark_running
from train_network import NetworkTrainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

RECORDED = SpeedSettings(torch_compile=False, cuda_graphs=True)
SIDES = ((512, 512), (256, 256))


@pytest.fixture(scope="module")
def real_width_config():
    """The real widths, few blocks."""
    return AnimaConfig.from_shapes(transformer_shapes(replace(REAL, depth=2, adapter_depth=1), 32128))


def made(config, speed=RECORDED, **groups) -> tuple[BenchmarkTrainer, list]:
    """A trainer on the card with these groups of settings, and batches of both sides in turn."""
    case = Case(sides=SIDES, speed=speed)
    settings = replace(case_settings(case, torch.device("cuda")), **groups)
    trainer = made_trainer(BenchmarkTrainer, settings, config, len(SIDES))
    batches = endless_batches(case, config)
    return trainer, [next(batches) for _ in range(8)]


def train(trainer, *batches) -> list[torch.Tensor]:
    """Steps as the loop takes them; their losses."""
    losses = []
    for batch in batches:
        losses.append(trainer.step([batch], 1))
        trainer.state.step += 1
    return losses


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.network.named_parameters()}


def optimizer_state(trainer) -> list[dict[str, torch.Tensor]]:
    states = trainer.parts.optimizer.state.values()
    return [{name: value.clone() for name, value in state.items()} for state in states]


def same(before, after) -> bool:
    return all(torch.equal(value, after[name]) for name, value in before.items())


def harmed(batch, value=float("nan")):
    return replace(batch, latents_BCTHW=torch.full_like(batch.latents_BCTHW, value))


@pytest.mark.parametrize("speed", [RECORDED, EAGER], ids=["recorded", "plain"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_moves_nothing_and_does_not_wait(real_width_config, speed, value):
    trainer, batches = made(real_width_config, speed, ema=EmaSettings(ema_decay=0.9))
    assert trainer.parts.optimizer.defaults["fused"] is True
    train(trainer, *batches[:4])
    moved, state = weights(trainer), optimizer_state(trainer)
    average = {name: tensor.clone() for name, tensor in trainer.ema.state_dict()["average"].items()}
    bad = harmed(batches[4], value)
    torch.cuda.synchronize()
    if speed is RECORDED:
        torch.cuda.set_sync_debug_mode("error")
    try:
        (loss,) = train(trainer, bad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not loss.isfinite()
    assert same(moved, weights(trainer))
    assert all(same(*pair) for pair in zip(state, optimizer_state(trainer), strict=True))
    assert same(average, trainer.ema.state_dict()["average"])
    records = read_records(trainer, trainer.state.step)
    assert [record.is_finite for record in records] == [True] * 4 + [False]
    trainer.guard.check(records, trainer.state)
    assert (trainer.state.skipped_steps, trainer.state.skipped_in_a_row) == (1, 1)
    losses = train(trainer, *batches[5:7])
    assert all(loss.isfinite() for loss in losses)
    assert not same(moved, weights(trainer))


@pytest.fixture
def deterministic_kernels():
    """Sums always come in the same order, where a kernel can do so."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_run_with_a_step_left_out_goes_on_as_one_without_it(real_width_config, deterministic_kernels):
    """The steps' own draws follow from the pictures. A step that had counted for Adam would be off by some 5 %."""
    ends = []
    for harms in (True, False):
        trainer, batches = made(real_width_config)
        start = weights(trainer)
        train(trainer, *batches[:4])
        if harms:
            train(trainer, harmed(batches[6]))
        train(trainer, *batches[4:6])
        ends.append(torch.cat([(tensor - start[name]).flatten() for name, tensor in weights(trainer).items()]))
    assert (ends[0] - ends[1]).norm() / ends[1].norm() < 0.01


def test_rollback_puts_back_weights_that_recorded_steps_go_on_with(real_width_config):
    trainer, batches = made(real_width_config, guard=GuardSettings(on_nonfinite="rollback"))
    good = weights(trainer)
    train(trainer, *batches[:3], harmed(batches[3]))
    assert not same(good, weights(trainer))
    trainer.guard.check(read_records(trainer, 4), trainer.state)
    assert same(good, weights(trainer))
    assert (trainer.state.rollbacks, trainer.state.rate_factor) == (1, RATE_FACTOR)
    losses = train(trainer, *batches[2:4])
    assert all(loss.isfinite() for loss in losses)
    assert not same(good, weights(trainer))


@pytest.mark.parametrize("device", ["same", "cpu"])
def test_the_average_is_that_of_the_weights_after_each_step(real_width_config, device):
    settings = EmaSettings(ema_decay=0.6, ema_device=device)
    trainer, batches = made(real_width_config, ema=settings)
    expected = None
    for number, batch in enumerate(batches[:5], 1):
        train(trainer, batch)
        now = {name: tensor.double().cpu() for name, tensor in weights(trainer).items()}
        share = 1 - decay_after(number, settings)
        expected = now if expected is None else {n: e + share * (now[n] - e) for n, e in expected.items()}
    trained = weights(trainer)
    with trainer.ema.applied():
        average = weights(trainer)
    assert same(trained, weights(trainer))
    for name, tensor in average.items():
        torch.testing.assert_close(tensor.double().cpu(), expected[name], rtol=1e-5, atol=1e-8)


def test_a_save_holds_the_weights_of_its_step_while_recorded_steps_go_on(real_width_config, tmp_path):
    """The steps after the copy come at once, one of them of a shape that is recorded while the thread writes."""
    trainer, batches = made(real_width_config, ema=EmaSettings(ema_decay=0.9))
    large, small = batches[::2], batches[1::2]
    train(trainer, *large[:3])
    expected, moments = weights(trainer), optimizer_state(trainer)
    copied = copy_state(trainer.parts, lambda: trainer.state)
    thread = Thread(target=write_state, args=(tmp_path / "a-state", copied))
    thread.start()
    losses = train(trainer, small[0], large[3], small[1])
    thread.join()
    assert all(loss.isfinite() for loss in losses)
    written = load_file(tmp_path / "a-state" / "network.safetensors")
    assert all(torch.equal(written[name], tensor.cpu()) for name, tensor in expected.items())
    optimizer = torch.load(tmp_path / "a-state" / "optimizer.pt", weights_only=True)["state_dict"]
    for own, saved in zip(moments, optimizer["state"].values(), strict=True):
        assert all(torch.equal(saved[name].cpu(), value.cpu()) for name, value in own.items())

    # And the state brings a trainer that has recorded its steps back to where it was.
    state = load_state(tmp_path / "a-state", trainer.parts)
    assert state.step == 3
    assert same(expected, weights(trainer))
    assert all(same(*pair) for pair in zip(moments, optimizer_state(trainer), strict=True))
    again = train(trainer, small[0], large[3], small[1])
    assert torch.stack(again).tolist() == pytest.approx(torch.stack(losses).tolist(), rel=1e-3)


def test_the_first_copy_finds_its_pinned_memory_reserved():
    tensors = [torch.full((1000,), float(number), device="cuda") for number in range(500)]
    thread = reserve_host_memory(tensors, copies=2)
    thread.join()
    before = torch.cuda.host_memory_stats()["num_host_alloc"]
    copies = HostCopy([tensors, tensors]).wait()
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == before
    assert all(
        copy.is_pinned() and torch.equal(copy, tensor.cpu()) for copy, tensor in zip(copies[1], tensors, strict=True)
    )


def deterministic() -> None:
    """Kernels that always add in the same order; each step's loss is told."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    step = NetworkTrainer.step

    def telling(self, *arguments):
        loss = step(self, *arguments)
        sys.stderr.write(f"\nloss {loss.item()!r}\n")
        return loss

    NetworkTrainer.step = telling


def losses_of(run: TrainingRun) -> list[str]:
    return [line for line in run.output.splitlines() if line.startswith("loss ")]


EXACT = {
    "bf16, recorded, dropouts, EMA": {
        "mixed_precision": "bf16", "network_dropout": 0.1, "network_args": ["rank_dropout=0.1"], "ema_decay": 0.9,
    },
    "bf16, LoKr, accumulation, caches": {
        "mixed_precision": "bf16", "network_module": "networks.lokr_anima", "gradient_accumulation_steps": 2,
        "train_batch_size": 1, "cache_text_encoder_outputs": True,
    },
    "fp32, plain": {"cuda_graphs": False},
    "fp16, loss scale": {"mixed_precision": "fp16"},
    "bf16, checkpointing, schedule-free": {
        "mixed_precision": "bf16", "gradient_checkpointing": True, "optimizer_type": "AdamWScheduleFree",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_a_resume_on_one_gpu_is_exact_in_deterministic_mode(config, tmp_path, name):
    """6 steps, and the last two of them again from the state after the fourth: the same losses and the same bytes."""
    if "optimizer_type" in EXACT[name]:
        pytest.importorskip("schedulefree")
    common = {"max_train_steps": 6, "save_every_n_steps": 4, "save_state": True, "log_with": "none", **EXACT[name]}
    straight = TrainingRun(config(**common), tmp_path / "straight.log", deterministic)
    assert straight.end() == 0, straight.output
    expected = tensor_bytes(tmp_path / "output" / "tiny.safetensors")
    state = tmp_path / "output" / "tiny-step00000004-state"
    resumed = TrainingRun([*config(**common), "--resume", str(state)], tmp_path / "resumed.log", deterministic)
    assert resumed.end() == 0, resumed.output
    assert "resumed from" in resumed.output
    assert len(losses_of(straight)) == 6
    assert losses_of(resumed) == losses_of(straight)[4:]
    assert tensor_bytes(tmp_path / "output" / "tiny.safetensors") == expected


@pytest.mark.slow
def test_watching_and_saving_cost_little_at_the_real_size(tmp_path, capsys):
    """Under 1 % of a step, and under one step; about two minutes."""
    torch._dynamo.reset()
    assert benchmark_running(["--folder", str(tmp_path)]) == 0
    watching, saving = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert watching["cost_percent"] < 1, watching
    assert saving["cost_steps"] < 1, saving
