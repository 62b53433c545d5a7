"""Where a run's curves, pictures and events go."""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from library.errors import SettingError
from library.options import Secret, option
from library.training.watching.display import RunDisplay
from library.training.watching.history import RunHistory
from library.training.watching.progress import Pace, ProgressFile
from library.training.watching.sinks import Sink, TensorBoardCurves, WandbCurves, check_arguments
from library.training.watching.tensorboard_server import TensorBoardServer

if TYPE_CHECKING:
    from library.training.step_records import StepRecord

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoggingSettings:
    """Curves of loss, learning rate and speed."""

    log_with: str = option(
        "tensorboard",
        "Where curves and sample pictures go: tensorboard keeps them on this machine, wandb sends them to wandb.ai "
        "(pip install wandb), all does both.",
        choices=("tensorboard", "wandb", "all", "none"),
    )
    logging_dir: Path = option(Path("logs"), "Folder that gets one folder of curves per run.")
    log_prefix: str | None = option(None, "Start of the run folder's name. Unset: '<output_name>_'.")
    log_every_n_steps: int = option(10, "Steps between two points of a curve.")
    log_config: bool = option(False, "Show the run's settings beside its curves, in TensorBoard under Text.")
    log_tracker_name: str | None = option(None, "Project on wandb that the run belongs to. Unset: anima.")
    log_tracker_config: Path | None = option(
        None,
        "TOML file with more for experts: under [wandb] arguments of wandb.init, such as tags or entity, and under "
        "[tensorboard] those of SummaryWriter, such as flush_secs.",
    )
    wandb_run_name: str | None = option(None, "Name of the run on wandb. Unset: that of the run's folder.")
    wandb_api_key: Secret | None = option(
        None, "Key of your wandb account. Unset: the one that `wandb login` kept. It is written to no file."
    )
    auto_start_tensorboard: bool = option(
        True, "Start TensorBoard with the run and tell its address; it ends with the run."
    )
    tensorboard_host: str = option(
        "127.0.0.1", "Where TensorBoard can be reached: 127.0.0.1 from this machine alone, 0.0.0.0 from others too."
    )
    tensorboard_port: int = option(6006, "Port of TensorBoard; the next free one where it is taken.")
    tensorboard_logdir: Path | None = option(
        None, "Folder that TensorBoard shows. Unset: logging_dir, so that runs can be compared."
    )

    html_report: bool = option(
        True,
        "At the end write <output_name>_report.html into output_dir: curves, samples, the pictures that were learnt "
        "worst, the adapter's health, alerts and settings on one page.",
    )

    @property
    def uses_tensorboard(self) -> bool:
        """Whether curves go to TensorBoard."""
        return self.log_with in ("tensorboard", "all")

    @property
    def shows_tensorboard(self) -> bool:
        """Whether TensorBoard is started."""
        return self.uses_tensorboard and self.auto_start_tensorboard

    @property
    def uses_wandb(self) -> bool:
        """Whether curves go to wandb."""
        return self.log_with in ("wandb", "all")


def check_trackers(settings: LoggingSettings) -> None:
    """What curves need is there. Raises SettingError for a missing package, and for a file that cannot be used."""
    if settings.uses_wandb and importlib.util.find_spec("wandb") is None:
        raise SettingError(
            f"log_with = {settings.log_with} needs the package wandb: pip install wandb, or set log_with = tensorboard"
        )
    tracker_arguments(settings)


def tracker_arguments(settings: LoggingSettings) -> dict[str, dict[str, Any]]:
    """The tables of log_tracker_config that are for what log_with chooses, by their names."""
    path = settings.log_tracker_config
    if path is None:
        return {}
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingError(f"log_tracker_config: {path} cannot be read: {error}") from error
    used = {"tensorboard": settings.uses_tensorboard, "wandb": settings.uses_wandb}
    for name, table in tables.items():
        if name not in used or not isinstance(table, dict):
            raise SettingError(f"log_tracker_config: {path}: {name} is no table [tensorboard] or [wandb]")
        if used[name]:
            try:
                check_arguments(name, table)
            except SettingError as error:
                raise SettingError(f"log_tracker_config: {path}: {error}") from error
    return {name: table for name, table in tables.items() if used[name]}


class Tracker:
    """Sends what a run tells to every sink. One that fails is left out from then on, with a warning: the run goes on.

    folder: the run's own in logging_dir; None on other than the main process, and with log_with none.
    history: what a report is made of; None where none is asked for, or on other than the main process.
    pace: the run's speed.
    """

    def __init__(
        self,
        settings: LoggingSettings,
        output_name: str,
        total_steps: int,
        config: Mapping[str, Any],
        is_main_process: bool,
    ) -> None:
        """config: the run's settings, as JSON can hold them."""
        self.folder: Path | None = None
        self.history: RunHistory | None = None
        self._sinks: list[Sink] = []
        self._lock = threading.RLock()  # saves may be told by the thread that writes them
        self.pace = Pace(total_steps)
        if not is_main_process:
            return
        self.add(lambda: RunDisplay(total_steps))
        if settings.html_report:
            self.history = RunHistory(total_steps)
            self._sinks.append(self.history)
        if settings.log_with == "none":
            return
        prefix = f"{output_name}_" if settings.log_prefix is None else settings.log_prefix
        name = f"{prefix}{datetime.now():%Y%m%d_%H%M%S_%f}"
        self.folder = folder = settings.logging_dir / name
        logger.info("curves: %s", folder.resolve())
        self.add(lambda: ProgressFile(folder, total_steps))
        arguments = tracker_arguments(settings)
        config = config if settings.log_config else None
        if settings.uses_tensorboard:
            self.add(lambda: TensorBoardCurves(folder, config, arguments.get("tensorboard", {})))
        if settings.shows_tensorboard:
            shown = settings.tensorboard_logdir or settings.logging_dir
            self.add(lambda: TensorBoardServer(shown, settings.tensorboard_host, settings.tensorboard_port))
        if settings.uses_wandb:
            project, own_name = settings.log_tracker_name or "anima", settings.wandb_run_name or name
            self.add(
                lambda: WandbCurves(
                    folder, project, own_name, settings.wandb_api_key, config, arguments.get("wandb", {})
                )
            )

    def add(self, make: Callable[[], Sink]) -> None:
        """Makes a further sink; a warning where that fails."""
        try:
            self._sinks.append(make())
        except Exception as error:
            logger.warning("a part of the run's records is left out: %s: %s", type(error).__name__, error)

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        self._tell(lambda sink: sink.advance(step))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One point on each named curve, and with the training loss on those of the run's speed."""
        if "loss/current" in values:
            values = {**values, **self.pace.values(step)}
        self._tell(lambda sink: sink.log(values, step))

    def log_image(self, name: str, picture: Image.Image, step: int, text: str = "") -> None:
        """A picture, in the row of its name: "sample/00". text: what it was made of, its prompt first."""
        self._tell(lambda sink: sink.log_image(name, picture, step, text))

    def event(self, kind: str, step: int, text: str) -> None:
        """Something that happened after `step` steps: kind is save, sample, alert or end."""
        self._tell(lambda sink: sink.event(kind, step, text))

    def look(self, records: Sequence[StepRecord], alerts: Sequence[str], step: int) -> None:
        """What the steps since the last log point gave, of which `step` is the last, and what is wrong with them."""
        self._tell(lambda sink: sink.look(records))
        for record in records:
            if not record.is_finite:
                self.event("alert", record.step, "the loss or a gradient is not a number")
        for alert in alerts:
            self.event("alert", step, alert)

    def close(self) -> None:
        """Writes out what is still waiting."""
        self._tell(lambda sink: sink.close())

    def _tell(self, call: Callable[[Sink], None]) -> None:
        with self._lock:
            for sink in list(self._sinks):
                try:
                    call(sink)
                except Exception as error:
                    self._sinks.remove(sink)
                    logger.warning(
                        "%s stopped, and is left out of the rest of the run: %s: %s",
                        type(sink).__name__, type(error).__name__, error,
                    )  # fmt: skip
