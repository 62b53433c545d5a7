"""Learning-rate schedules by name."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import option

SCHEDULES = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "cosine_with_min_lr",
)  # fmt: skip


@dataclass(frozen=True)
class ScheduleSettings:
    """How the learning rate changes over the run."""

    lr_scheduler: str = option("constant", "Shape of the learning rate over the run.", choices=SCHEDULES)
    lr_warmup_steps: int | float = option(0, "Steps of rising rate at the start; below 1, a fraction of the run.")
    lr_scheduler_num_cycles: float = option(
        1.0, "Cosine waves: restarts for cosine_with_restarts; for cosine with a minimum, 0.5 is one fall."
    )
    lr_scheduler_power: float = option(1.0, "Exponent of the polynomial schedule.")
    lr_scheduler_min_lr_ratio: float | None = option(None, "Lowest rate as a share of learning_rate.")
