"""Which state a run goes on from."""

from __future__ import annotations

import logging
from pathlib import Path

from library.training.checked_files import damage_of
from library.training.rotation import saved_files
from library.training.run import LATEST, RunSettings, RunState
from library.training.saving import SavingSettings
from library.training.upload import HubSettings, download_state

logger = logging.getLogger(__name__)


def find_state(run: RunSettings, saving: SavingSettings, hub: HubSettings) -> Path | None:
    """The state folder that `resume` names, fetched where it is on Hugging Face; None for a run that begins.

    Raises SettingError where it cannot be fetched.
    """
    if run.resume is not None and hub.resume_from_huggingface:
        return download_state(run.resume, hub)
    return latest_state(saving) if run.resume == LATEST else run.resume


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
    logger.info("resume: no state of %s in %s yet: the run begins", saving.output_name, saving.output_dir)
    return None
