"""Which files of earlier runs and of earlier saves lie in output_dir, and which may go."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from library.errors import SettingError, counted, first_ten
from library.files import clear_leftovers, remove_folder
from library.training.saving.settings import SavingSettings, kept_saves, saved_name
from library.training.watching.samples import SAMPLE_FOLDER, sample_name

logger = logging.getLogger(__name__)


def saved_files(settings: SavingSettings) -> list[Path]:
    """The adapter files and states of this output_name, of whatever run."""
    pattern, folder = saved_name(settings.output_name), settings.output_dir
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name)) if folder.is_dir() else []


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a state's folder; 0 where it has just been removed."""
    try:
        return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    except FileNotFoundError:
        return 0


def clear_killed_saves(settings: SavingSettings) -> None:
    """Removes the unfinished files of a run with this output_name that was killed."""
    removed = []
    for folder, pattern in (
        (settings.output_dir, saved_name(settings.output_name)),
        (settings.output_dir / SAMPLE_FOLDER, sample_name(settings.output_name)),
    ):
        removed += clear_leftovers(folder, lambda name, pattern=pattern: pattern.fullmatch(name) is not None)
    if removed:
        logger.info("removed unfinished files of a run that was killed: %s", first_ten(removed))


def check_nothing_overwritten(settings: SavingSettings) -> None:
    """SettingError for a new run whose output_name an earlier one has used, unless overwrite_output is set.

    Then it warns of the earlier run's files, of which only those are replaced that the new run has too.
    """
    found = [path.name for path in saved_files(settings)]
    if not found:
        return
    if settings.overwrite_output:
        logger.warning("%s", _what_stays(settings, found))
        return
    latest = "go on with it by --resume latest, " if _has_state(found) else ""
    raise SettingError(
        f"output_name: {settings.output_dir} holds files of an earlier run named {settings.output_name} "
        f"({first_ten(found)}): {latest}give another output_name, or let them be replaced by --overwrite_output"
    )


def _what_stays(settings: SavingSettings, found: list[str]) -> str:
    number = counted(len(found), "file or state", "files and states")
    text = (
        f"overwrite_output: an earlier run named {settings.output_name} has left {number} in {settings.output_dir} "
        f"({first_ten(found)}): what this run writes replaces those of the same names, and the others stay"
    )
    if (final := f"{settings.output_name}.safetensors") in found:
        text += f"; {final} is the earlier run's until this one has ended"
    if _has_state(found):
        text += "; --resume latest means a state of that run until this one has saved its own"
    return text


def _has_state(names: list[str]) -> bool:
    return any(name.endswith("-state") for name in names)


def remove_outdated(settings: SavingSettings, saved: str) -> None:
    """Removes what save_last_n_… no longer keeps, now that the save of that name is complete."""
    pattern = saved_name(settings.output_name)
    parts = pattern.fullmatch(f"{saved}.safetensors")
    for unit in ("epoch", "step"):
        if parts is None or parts[unit] is None:
            continue
        for path in _outdated(settings, unit, int(parts[unit])):
            logger.info("removed %s, which save_last_n_%ss no longer keeps", path.name, unit)
            if path.is_dir():
                remove_folder(path)
            else:
                path.unlink(missing_ok=True)


def _outdated(settings: SavingSettings, unit: str, latest: int) -> Iterator[Path]:
    pattern = saved_name(settings.output_name)
    for ending, count in zip((".safetensors", "-state"), kept_saves(settings, unit), strict=True):
        if count is None:
            continue
        numbered = [
            (int(parts[unit]), path)
            for path in saved_files(settings)
            if (parts := pattern.fullmatch(path.name))[unit] is not None and parts["ending"] == ending
        ]
        numbers = sorted({number for number, _ in numbered if number <= latest})
        first_kept = latest - count if unit == "step" else numbers[-count:][0] if numbers else latest
        yield from (path for number, path in numbered if number < first_kept)
