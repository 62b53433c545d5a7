"""Which state a run goes on from, and where it begins."""

from __future__ import annotations

import logging
from pathlib import Path

from library.errors import SettingError
from library.training.run import LATEST, RunSettings, RunState, starting_state
from library.training.saving.checked_files import damage_of
from library.training.saving.rotation import saved_files
from library.training.saving.settings import SavingSettings
from library.training.saving.states import Resumable, load_state, read_run_state
from library.training.saving.upload import HubSettings, download_state

logger = logging.getLogger(__name__)


def find_state(run: RunSettings, saving: SavingSettings, hub: HubSettings) -> Path | None:
    """The state folder that `resume` names, fetched where it is on Hugging Face; None for a run that begins.

    Raises SettingError where it cannot be fetched.
    """
    if run.resume is not None and hub.resume_from_huggingface:
        return download_state(run.resume, hub)
    if run.resume != LATEST:
        return run.resume
    state = latest_state(saving)
    if state is not None and (run.initial_step or run.initial_epoch > 1):
        logger.warning("initial_step and initial_epoch do nothing: resume goes on from %s", state)
    return state


def latest_state(saving: SavingSettings) -> Path | None:
    """The complete state of this output_name that was saved last; damaged ones are passed over with a warning."""
    states = [path for path in saved_files(saving) if path.name.endswith("-state")]
    dated = []
    for folder in states:
        try:
            state = RunState.load(folder / "run_state.json")
            dated.append((state.saved_at, state.step, folder))
        except (OSError, ValueError, TypeError) as error:
            logger.warning("resume: %s is no complete state: %s", folder, error)
    for _, _, folder in sorted(dated, reverse=True):
        damage = damage_of(folder)
        if damage is None:
            return folder
        logger.warning("resume: %s is damaged (%s): looking for an earlier one", folder, damage)
    logger.info("resume: no state of %s in %s yet, so this is a new run", saving.output_name, saving.output_dir)
    return None


def steps_at_start(run: RunSettings, resume: Path | None, steps_per_epoch: int, total_steps: int) -> int:
    """Steps that are done where the run begins or goes on. SettingError where none are left to train."""
    if resume is None:
        return starting_state(run, steps_per_epoch).step
    step = read_run_state(resume).step
    if step >= total_steps:
        raise SettingError(
            f"resume: {resume} is at step {step}, and this run ends at step {total_steps}: "
            "raise max_train_steps or max_train_epochs"
        )
    return step


def first_state(
    run: RunSettings, resume: Path | None, parts: Resumable, steps_per_epoch: int, total_steps: int
) -> RunState:
    """Where the run begins, or goes on: then weights, optimizer and schedule are those of the state `resume`.

    Raises what `load_state` raises.
    """
    if resume is None:
        state = starting_state(run, steps_per_epoch)
        if state.step > 0:
            logger.info(
                "beginning at step %d of %d, in epoch %d; the learning rate schedule begins at its own start",
                state.step, total_steps, state.epoch + 1,
            )  # fmt: skip
        return state
    state = load_state(resume, parts, run.resume_ignore_optimizer_mismatch)
    logger.info("resumed from %s at step %d of %d", resume, state.step, total_steps)
    skip_finished_epoch(state, steps_per_epoch)
    return state


def skip_finished_epoch(state: RunState, steps_per_epoch: int) -> None:
    """Goes to the next epoch where the running one has no steps left, because it has become shorter."""
    if state.step_in_epoch < steps_per_epoch:
        return
    logger.warning(
        "the state was saved after %d steps of an epoch, which now has %d (other pictures, batches or processes): "
        "going on with the next epoch", state.step_in_epoch, steps_per_epoch,
    )  # fmt: skip
    state.epoch += 1
    state.step_in_epoch = 0
