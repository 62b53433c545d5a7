"""Flow matching: how noise, timestep and target make up the training objective."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import option


@dataclass(frozen=True)
class ObjectiveSettings:
    """Which timesteps the model is trained at."""

    anima_timestep_sampling: str = option(
        "logit_normal", "How t is drawn before the shift.", choices=("logit_normal", "uniform")
    )
    anima_sigmoid_scale: float = option(1.0, "logit_normal draws t = sigmoid(scale x N(0, 1)).")
    anima_flow_shift: float = option(3.0, "Shifts t towards noise: s t / (1 + (s - 1) t); 1 leaves it alone.")
