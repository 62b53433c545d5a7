"""Where curves go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options import option


@dataclass(frozen=True)
class LoggingSettings:
    """Curves of loss, learning rate and speed."""

    log_with: str = option("tensorboard", "Where curves go.", choices=("tensorboard", "none"))
    logging_dir: Path = option(Path("logs"), "Folder that gets one folder of curves per run.")
    log_prefix: str | None = option(None, "Start of the run folder's name. Unset: '<output_name>_'.")
    log_every_n_steps: int = option(10, "Steps between two points of a curve.")
