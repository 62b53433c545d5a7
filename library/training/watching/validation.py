"""Validation: the loss on pictures that are not trained, measured in the same way each time.

Every picture meets the same noise at the same timesteps, which lie in the middle of equal parts of what training draws;
so the mean estimates the loss that training would have on these pictures, and differs between two points of a run only
by what was learned in between. As many trained pictures are measured beside them: what those gain alone is memorised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Generic, TypeVar

import torch
from torch import Tensor

from library.options import option

T = TypeVar("T")


@dataclass(frozen=True)
class ValidationSettings:
    """Measuring the loss on pictures that are not trained, which validation_split keeps for it."""

    validate_every_n_steps: int | None = option(
        None, "Measure the validation loss every so many optimizer steps.", zero_is_unset=True
    )
    validate_every_n_epochs: int | None = option(
        None,
        "Measure the validation loss every so many epochs. Unset, like validate_every_n_steps: after each epoch. It is "
        "always measured at the start and at the end.",
        zero_is_unset=True,
    )
    max_validation_steps: int | None = option(
        None, "Most batches of validation pictures to measure, always the same ones. Unset: all.", zero_is_unset=True
    )
    validation_timesteps: int = option(
        4, "At how many timesteps each validation picture is measured, spread as training draws them. More is slower."
    )
    save_best: bool = option(
        False,
        "Keep the adapter with the least validation loss as '<output_name>-best'. Needs validation_split. The last one "
        "is not always the best: from some point on a run only memorises its pictures.",
    )


def measured_shares(timesteps: int) -> list[float]:
    """The shares of all draws that lie below the measured timesteps: the middles of equal parts."""
    return [(number + 0.5) / timesteps for number in range(timesteps)]


def validates(settings: ValidationSettings, step: int, epoch: int, epoch_ended: bool) -> bool:
    """Whether the loss is measured after so many steps and epochs."""
    steps, epochs = settings.validate_every_n_steps, settings.validate_every_n_epochs
    if steps is None and epochs is None:
        epochs = 1
    return (steps is not None and step % steps == 0) or (epochs is not None and epoch_ended and epoch % epochs == 0)


class Validation(Generic[T]):
    """Measures batches of pictures that are not trained, and of as many that are.

    unseen, trained: this process's part of the batches. losses_at: gives the loss of each sample of a batch, [B], at
    the timestep that a share of all draws lies below. gather: gives each process the lists of all, one after the other.
    """

    def __init__(
        self,
        settings: ValidationSettings,
        unseen: Iterable[T],
        trained: Iterable[T],
        losses_at: Callable[[T, float], Tensor],
        gather: Callable[[list[list[float]]], list[list[float]]],
    ) -> None:
        self._shares = measured_shares(settings.validation_timesteps)
        self._unseen = unseen
        self._trained = trained
        self._losses_at = losses_at
        self._gather = gather

    def curves(self) -> dict[str, float]:
        """Mean losses of both kinds of pictures, and of the unseen ones at each timestep."""
        unseen, trained = self._mean_losses(self._unseen), self._mean_losses(self._trained)
        return {
            "loss/validation/average": fmean(unseen),
            "loss/validation/trained_pictures": fmean(trained),
            "loss/validation/gap": fmean(unseen) - fmean(trained),
            **{f"loss/validation/timestep_{number}": loss for number, loss in enumerate(unseen, 1)},
        }

    @torch.no_grad()
    def _mean_losses(self, batches: Iterable[T]) -> list[float]:
        """The mean at each timestep over the samples of all processes; waits for the device once, at the end.

        Exact sums make it the same however the batches are shared out.
        """
        measured = [torch.stack([self._losses_at(batch, share) for share in self._shares]) for batch in batches]
        samples = self._gather([sample for losses in measured for sample in losses.T.tolist()])
        return [math.fsum(losses) / len(samples) for losses in zip(*samples, strict=True)]
