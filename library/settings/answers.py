"""What the command line may ask for instead of training: --explain, --print_options, --output_config."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from library.console import show
from library.errors import SettingError
from library.files import write_atomically
from library.settings.collect import resolve_settings
from library.settings.command_line import parse_command_line
from library.settings.listing import config_text, explanation
from library.settings.reference import options_text

logger = logging.getLogger(__name__)


def answers_instead(argv: Sequence[str], is_main_process: bool = True) -> bool:
    """Does what the words ask for instead of training; False where they ask for training.

    Settings are shown and written as they are given: whether the files they name exist is not looked at, but for the
    pictures' folders. Raises SettingError for settings that cannot be read, and for a file that is there already.
    """
    asked = parse_command_line(argv).program
    if asked.print_options is None and not asked.explain and asked.output_config is None:
        return False
    if not is_main_process:
        return True
    if asked.print_options is not None:
        show(options_text(asked.print_options))
        return True
    problems: list[str] = []
    settings = resolve_settings(argv, problems)
    if asked.explain:
        show(explanation(settings))
    if problems:
        raise SettingError("\n".join(problems))
    if asked.output_config is not None:
        _write_new(asked.output_config, config_text(settings))
    return True


def _write_new(path: Path, text: str) -> None:
    """Refuses to replace a file: it may be the one the settings were read from."""
    if path.exists():
        raise SettingError(f"--output_config: {path} exists already; give another name, or remove it")
    try:
        write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
    except (OSError, UnicodeEncodeError) as error:
        raise SettingError(f"--output_config: {path} cannot be written: {error}") from error
    logger.info("wrote %s; train with --config_file %s", path, path)
