"""What a run will take, from one real step of each bucket: time, memory, and what to change where it does not fit."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import psutil
import torch

from library.console import readable_time
from library.data.dataset import Batch, TrainingBatches
from library.data.epochs import LargestBatch
from library.data.latents import LatentCache
from library.errors import SettingError, UserError, first_ten
from library.training.machine import readable_size
from library.training.run import RunSettings

logger = logging.getLogger(__name__)

# Beyond this share of a card's memory, sample pictures or another program may be what is too much.
MOST_MEMORY = 0.95


@dataclass(frozen=True)
class Cost:
    """What an optimizer step takes. seconds: of one like it, once everything is compiled and recorded.

    peak, lasting, reserved: bytes of GPU memory, at most in use, in use between steps, and held by PyTorch. On a CPU
    peak is the memory of the whole process after the step, and the others are 0.
    """

    seconds: float
    peak: int
    lasting: int
    reserved: int


@dataclass(frozen=True)
class Trial:
    """A bucket, (width, height) in pixels, at its largest batch.

    steps: how many steps of such batches an epoch's pictures of the bucket make. cost: None where memory ran out.
    """

    bucket: tuple[int, int]
    batch_size: int
    steps: float
    cost: Cost | None

    @property
    def pixels(self) -> int:
        """Of a whole batch."""
        return self.batch_size * self.bucket[0] * self.bucket[1]


class DoesNotFitError(UserError):
    """The run needs more GPU memory than there is."""


def check_preflight(run: RunSettings, processes: int) -> None:
    """SettingError where preflight cannot do what it is asked."""
    if run.preflight and run.dry_run:
        raise SettingError("preflight: dry_run loads no model, and preflight needs one; keep one of them")
    if run.preflight and processes > 1:
        raise SettingError(
            f"preflight: it measures one GPU, and {processes} processes were started; start it by "
            "`python anima_train_network.py`, and look at your smallest card (CUDA_VISIBLE_DEVICES)"
        )


def cost_of(step: Callable[[], object], device: torch.device) -> Cost | None:
    """What a second call of `step` takes; None where GPU memory runs out.

    Memory is that of both calls: in the first, kernels are compiled and graphs recorded, which a run does as well.
    """
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        step()
        _wait_for(device)
        started = time.perf_counter()
        step()
        _wait_for(device)
        seconds = time.perf_counter() - started
    except torch.OutOfMemoryError:
        return None
    if not is_cuda:
        return Cost(seconds, peak=psutil.Process().memory_info().rss, lasting=0, reserved=0)
    return Cost(
        seconds,
        peak=torch.cuda.max_memory_allocated(device),
        lasting=torch.cuda.memory_allocated(device),
        reserved=torch.cuda.max_memory_reserved(device),
    )


def try_batches(
    largest: Sequence[LargestBatch],
    load: Callable[[LargestBatch], Batch],
    step: Callable[[list[Batch], int], object],
    clean_up: Callable[[], None],
    accumulation: int,
    device: torch.device,
) -> list[Trial]:
    """What optimizer steps of each bucket's largest batch take.

    step: trains a window of batches with so many samples. clean_up: called after one that ran out of memory.
    accumulation: batches of a step.
    """
    trials = []
    for bucket in largest:
        batch, samples = load(bucket), bucket.size * accumulation
        cost = cost_of(partial(step, [batch] * accumulation, samples), device)
        if cost is None:
            clean_up()
            free_unused_memory()
        trials.append(Trial(bucket.bucket, bucket.size, bucket.uses / samples, cost))
    return trials


def load_largest(
    largest: LargestBatch,
    sizes: Sequence[int],
    seed: int,
    latents: LatentCache | None,
    announce: Callable[[list[str]], None] | None,
    filled: Collection[int] = (),
) -> Batch:
    """The bucket's largest batch. sizes: of batches, one per dataset. The others are as for `TrainingBatches`."""
    steps = TrainingBatches(largest.pictures, sizes, seed, latents=latents, announce=announce, filled=filled)
    return next(step.batches[0] for step in steps.epoch(0) if step.sample_count == largest.size)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def free_unused_memory() -> None:
    """Gives back what a failed step left behind."""
    gc.collect()
    torch.cuda.empty_cache()


def memory_limit(device: torch.device) -> int | None:
    """Bytes that this run may take of a card, so that no more than MOST_MEMORY of it is in use; None without one."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    used_by_others = total - free - torch.cuda.memory_reserved(device)
    return int(MOST_MEMORY * total) - used_by_others


def trial_table(trials: Sequence[Trial], device: torch.device) -> str:
    """A line for each trial: bucket, batch, its steps in an epoch, seconds a step and memory."""
    memory = f"{'peak memory':>11}  {'reserved':>10}" if device.type == "cuda" else f"{'main memory':>11}"
    lines = [f"{'bucket':>11}  {'batch':>5}  {'steps an epoch':>14}  {'seconds a step':>14}  {memory}"]
    for trial in trials:
        width, height = trial.bucket
        line = f"{f'{width}x{height}':>11}  {trial.batch_size:>5}  {trial.steps:>14.1f}  "
        if trial.cost is None:
            line += "out of memory"
        else:
            line += f"{trial.cost.seconds:>14.3f}  {readable_size(trial.cost.peak):>11}"
            line += f"  {readable_size(trial.cost.reserved):>10}" if device.type == "cuda" else ""
        lines.append(line)
    return "\n".join(lines)


def tell_trials(trials: Sequence[Trial], plan: str, steps: int, steps_an_epoch: int, device: torch.device) -> None:
    """Logs what the trials gave. plan: what else is known of the run. steps: those to do."""
    table, time_needed = trial_table(trials, device), expected_time(trials, steps, steps_an_epoch)
    logger.info("preflight:\n%s\n%s\n%s", table, plan, time_needed)


def epoch_seconds(trials: Sequence[Trial]) -> float | None:
    """How long an epoch takes; None where a bucket does not fit."""
    if any(trial.cost is None for trial in trials):
        return None
    return sum(trial.steps * trial.cost.seconds for trial in trials)


def expected_time(trials: Sequence[Trial], steps: int, steps_an_epoch: int) -> str:
    """How long so many steps take, for people."""
    seconds, epochs = epoch_seconds(trials), steps / steps_an_epoch
    if seconds is None:
        return "time: unknown, as it does not fit"
    return (
        f"time: about {readable_time(epochs * seconds)} for {steps} steps, which are {epochs:.1f} epochs of "
        f"{readable_time(seconds)}; caching, validation, samples and saves come on top"
    )


def check_fit(trials: Sequence[Trial], limit: int | None, accumulation: int, savers: Sequence[str]) -> str | None:
    """A warning where a trial took more than `limit` bytes; DoesNotFitError where one ran out of memory.

    savers: settings that would save memory and are not in force. Both say what would make the run fit.
    """
    failed = [trial for trial in trials if trial.cost is None]
    near = [trial for trial in trials if trial.cost is not None and limit is not None and trial.cost.peak > limit]
    if not failed and not near:
        return None
    tight = failed or near
    shapes = first_ten(f"{trial.batch_size} x {trial.bucket[0]}x{trial.bucket[1]}" for trial in tight)
    means = [*savers, *_smaller_batch(trials, tight, limit, accumulation), "a smaller resolution"]
    advice = f"What needs less memory: {'; '.join(means)}"
    if failed:
        raise DoesNotFitError(f"preflight: out of GPU memory in a batch of {shapes} pixels. {advice}")
    return (
        f"preflight: with a batch of {shapes} pixels, more than {MOST_MEMORY:.0%} of the GPU's memory is in use; "
        f"sample pictures or another program may be too much. {advice}"
    )


def _smaller_batch(trials: Sequence[Trial], tight: Sequence[Trial], limit: int | None, accumulation: int) -> list[str]:
    """The batch size that would fit, by memory per pixel of the trials that ran; none where it is 1 or too small."""
    largest = max(trial.batch_size for trial in tight)
    if largest == 1:
        return []
    fitting = largest // 2
    ran = [trial for trial in trials if trial.cost is not None]
    if ran and limit is not None:
        per_pixel = max((trial.cost.peak - trial.cost.lasting) / trial.pixels for trial in ran)
        room = limit - max(trial.cost.lasting for trial in ran)
        one = max(trial.pixels / trial.batch_size for trial in tight)
        fitting = min(int(room / (per_pixel * one)), largest - 1)
    if fitting < 1:
        return []
    return [f"batch_size = {fitting} with gradient_accumulation_steps = {-(-largest * accumulation // fitting)}"]
