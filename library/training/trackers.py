"""Where curves go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from library.options import option


@dataclass(frozen=True)
class LoggingSettings:
    """Curves of loss, learning rate and speed."""

    log_with: str = option("tensorboard", "Where curves go.", choices=("tensorboard", "none"))
    logging_dir: Path = option(Path("logs"), "Folder that gets one folder of curves per run.")
    log_prefix: str | None = option(None, "Start of the run folder's name. Unset: '<output_name>_'.")
    log_every_n_steps: int = option(10, "Steps between two points of a curve.")


class Tracker:
    """Writes scalars to TensorBoard, or nowhere."""

    def __init__(self, settings: LoggingSettings, output_name: str, is_main_process: bool) -> None:
        self.folder: Path | None = None
        self._writer: SummaryWriter | None = None
        if settings.log_with == "tensorboard" and is_main_process:
            prefix = f"{output_name}_" if settings.log_prefix is None else settings.log_prefix
            self.folder = settings.logging_dir / f"{prefix}{datetime.now():%Y%m%d_%H%M%S_%f}"
            self._writer = SummaryWriter(str(self.folder))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One point on each named curve."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes out what is still waiting."""
        if self._writer is not None:
            self._writer.close()
