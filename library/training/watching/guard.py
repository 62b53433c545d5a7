"""What happens when a loss or a gradient is not a number: the optimizer does not step, and it is said why.

Fused AdamW and Adam are told by a number on the GPU that they must not step, so that nothing waits for it; other
optimizers need it read at each step. That a step was left out is found, and acted on, at the next log point.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.errors import UserError, first_ten
from library.options import option
from library.training.host_copy import HostCopy
from library.training.optimization.ema import AdapterEma
from library.training.run import RunState
from library.training.step_records import SampleLoss, StepRecord

logger = logging.getLogger(__name__)

# fp16 finds its loss scale by halving 65536, which may leave out 16 steps of a healthy run.
MOST_SKIPPED = 20
RATE_FACTOR = 0.5
# Rollbacks to one and the same copy, with a rate of 1/32 in the end.
MOST_ROLLBACKS = 5
# A copy of adapter and optimizer takes about 10 ms for 300 MB.
_STEPS_BETWEEN_COPIES = 50


@dataclass(frozen=True)
class GuardSettings:
    """What happens when a loss or a gradient is infinite or not a number (NaN)."""

    on_nonfinite: str = option(
        "skip",
        "skip leaves that optimizer step out and names its pictures. raise also saves a state and ends the run at the "
        f"next log point. rollback also goes back to the last good weights and multiplies the rates by {RATE_FACTOR}. "
        f"warn takes the step, which mostly ruins the adapter. After {MOST_SKIPPED} left out in a row the run ends.",
        choices=("skip", "warn", "raise", "rollback"),
    )


class NonFiniteError(UserError):
    """Losses or gradients are not finite, and the run should not go on."""


class Guard:
    """Lets the optimizer step or not, and tells at log points what was left out.

    policy: as `GuardSettings.on_nonfinite`. dependent: a setting that acts on steps that were taken alone, if any; then
    the verdict is read at each step even where the optimizer could be told on the GPU. average: goes back with the
    weights. leaves_out: whether steps are left out at all.
    """

    def __init__(
        self,
        policy: str,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        dependent: str | None = None,
        average: AdapterEma | None = None,
    ) -> None:
        self._policy = policy
        self._average = average
        self._network, self._optimizer, self._scaler = network, optimizer, scaler
        self._tells_optimizer = can_be_told(optimizer) and dependent is None
        self.leaves_out = policy != "warn" or scaler.is_enabled()  # fp16 leaves steps out to find its loss scale
        self._good: tuple[int, HostCopy] | None = None  # the step of the copy to go back to, and the copy
        self._rollbacks_to_it = 0
        device = next(network.parameters()).device
        if device.type == "cuda" and self.leaves_out and not self._tells_optimizer:
            reason = f"{type(optimizer).__name__} cannot be told there to leave a step out"
            if can_be_told(optimizer):
                reason = f"{dependent} acts on steps that were taken alone"
            logger.info("on_nonfinite: each step waits for the GPU, as %s", reason)

    def step(self, loss: Tensor, gradient_norm: Tensor, state: RunState) -> Tensor:
        """Steps the optimizer at the state's rate, unless a number is not finite.

        loss, gradient_norm: scalars on the device, the same on all processes; the gradients are unscaled.
        Returns whether it stepped: a bool scalar on the device.
        """
        if self._policy == "rollback" and self._good is None:
            self._keep_copy(state.step)
        with lowered_rates(self._optimizer, state.rate_factor):
            if not self.leaves_out:
                self._optimizer.step()
                return torch.ones_like(loss, dtype=torch.bool)
            is_finite = torch.isfinite(loss) & torch.isfinite(gradient_norm)
            if self._tells_optimizer:
                self._optimizer.found_inf = (~is_finite).float()
                self._optimizer.step()
                del self._optimizer.found_inf
            elif is_finite.item():
                self._optimizer.step()
        return is_finite

    def check(self, records: Sequence[StepRecord], state: RunState) -> None:
        """At a log point: tells of the steps that were left out, counts them in `state`, and acts as the policy says.

        Raises NonFiniteError where the run should end.
        """
        problem = None
        for record in records:
            state.count(record.is_finite, self.leaves_out)
            if record.is_finite:
                continue
            if self._scaler.is_enabled() and math.isfinite(record.loss):
                logger.info("step %d was left out: fp16's loss scale was too high for it, and is halved", record.step)
            else:
                problem = described(record)
                logger.warning("%s: %s", problem, "left out" if self.leaves_out else "taken nonetheless")
            if state.skipped_in_a_row >= MOST_SKIPPED:
                raise NonFiniteError(f"{MOST_SKIPPED} steps in a row are not finite. {described(record)}. {_ADVICE}")
        if problem is None:
            if self._policy == "rollback" and records and state.skipped_in_a_row == 0:
                self._keep_copy_now_and_then(state.step)
        elif self._policy == "raise":
            raise NonFiniteError(f"{problem}. That step was left out. {_ADVICE}")
        elif self._policy == "rollback":
            self._roll_back(problem, state)

    def _keep_copy_now_and_then(self, step: int) -> None:
        if self._good is None or step - self._good[0] >= _STEPS_BETWEEN_COPIES:
            self._keep_copy(step)

    def _keep_copy(self, step: int) -> None:
        parts = {"network": self._network.state_dict(), "optimizer": self._optimizer.state_dict()}
        if self._average is not None:
            parts["average"] = self._average.state_dict()
        self._good = step, HostCopy(parts)
        self._rollbacks_to_it = 0

    def _roll_back(self, problem: str, state: RunState) -> None:
        """Puts weights and optimizer back; steps, data order and schedule go on, so that no draw comes again."""
        step, copied = self._good
        if self._rollbacks_to_it >= MOST_ROLLBACKS:
            raise NonFiniteError(f"{problem}. {MOST_ROLLBACKS} times going back to step {step} did not help. {_ADVICE}")
        self._rollbacks_to_it += 1
        parts = copied.wait()
        self._network.load_state_dict(parts["network"])
        rates = [{name: group[name] for name in _RATES if name in group} for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(copy.deepcopy(parts["optimizer"]))
        for group, own in zip(self._optimizer.param_groups, rates, strict=True):
            group.update(own)
        if self._average is not None:
            self._average.load_state_dict(parts["average"])
        state.rollbacks += 1
        state.rate_factor *= RATE_FACTOR
        logger.warning(
            "rollback: weights and optimizer are those after step %d again; learning rates are now %g times as "
            "scheduled", step, state.rate_factor,
        )  # fmt: skip


_RATES = ("lr", "initial_lr")
_ADVICE = (
    "Look at these pictures and captions; if they are sound, lower learning_rate, set max_grad_norm = 1, or use "
    "mixed_precision = bf16 instead of fp16"
)


def can_be_told(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer leaves a step out when a tensor, its `found_inf`, says so.

    torch's fused optimizers do so for torch.amp.GradScaler. SGD does not count: its first step leaves its momentum
    uninitialised then.
    """
    is_adam = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
    return is_adam and getattr(optimizer, "_step_supports_amp_scaling", False)


@contextmanager
def lowered_rates(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """Inside, learning rates are `factor` times those of the schedule, which does not notice."""
    if factor == 1.0:
        yield
        return
    scheduled = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, scheduled, strict=True):
            group["lr"] = rate


def described(record: StepRecord) -> str:
    """What is wrong with a step, and its pictures: those whose own loss is not finite, or else all of them."""
    wrong = "gradients are" if math.isfinite(record.loss) else "loss is"
    guilty = [sample for sample in record.samples if not math.isfinite(sample.loss)] or record.samples
    return f"step {record.step}: the {wrong} not finite (NaN or infinite); pictures: {_names(guilty)}"


def _names(samples: Sequence[SampleLoss]) -> str:
    return first_ten(dict.fromkeys(str(sample.path) for sample in samples))
