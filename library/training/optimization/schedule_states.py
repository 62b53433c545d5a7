"""Where a learning-rate schedule is, and how a new one gets there."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

logger = logging.getLogger(__name__)


def schedule_content(schedule: LRScheduler) -> dict[str, Any]:
    """For schedule.json: the steps it has made, and the rates it has come to by parameter group."""
    return {"steps": schedule.last_epoch, "rates": _rates(schedule)}


def load_schedule(saved: Mapping[str, Any], schedule: LRScheduler) -> None:
    """Moves a new schedule to the saved step, one step after the other, as a run with it would have done.

    So the rates are bit for bit those of a run without a break. Where the learning rate, the schedule or the planned
    length has changed they are those that the new settings give at this step; that is logged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice to let the optimizer step first
        for _ in range(saved["steps"]):
            schedule.step()
    before, now = saved["rates"], _rates(schedule)
    for name, rate in now.items():
        if name not in before or not math.isclose(rate, before[name], rel_tol=1e-9):
            then = f"{before[name]:.4g}" if name in before else "absent"
            logger.info(
                "resume: the learning rate's settings have changed: lr/%s goes on from %.4g; in the state it was %s",
                name, rate, then,
            )  # fmt: skip


def _rates(schedule: LRScheduler) -> dict[str, float]:
    groups = schedule.optimizer.param_groups
    return {group.get("name", str(number)): float(group["lr"]) for number, group in enumerate(groups)}
