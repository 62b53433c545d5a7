"""What a run's numbers and pictures can go to; `library/training/watching/trackers.py` sends them."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from library.errors import SettingError, did_you_mean
from library.options import Secret

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from library.training.step_records import StepRecord


class Sink:
    """Takes what a run tells, and by itself does nothing with it: each kind of sink uses what is of use to it."""

    def advance(self, step: int) -> None:
        """`step` steps are done; told after each."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One point on each named curve."""

    def log_image(self, name: str, picture: Image.Image, step: int, text: str = "") -> None:
        """A picture, in the row of its name. text: what it was made of, its prompt first."""

    def event(self, kind: str, step: int, text: str) -> None:
        """Something that happened after `step` steps: a save, a sample, an alert."""

    def look(self, records: Sequence[StepRecord]) -> None:
        """Steps with the losses of their samples."""

    def close(self) -> None:
        """The run has ended."""


class TensorBoardCurves(Sink):
    """Event files that TensorBoard reads. config: the run's settings as JSON can hold them; None leaves them out."""

    def __init__(self, folder: Path, config: Mapping[str, Any] | None, arguments: Mapping[str, Any]) -> None:
        self._writer: SummaryWriter = _summary_writer()(str(folder), **arguments)
        if config is not None:
            self._writer.add_text("settings", f"```json\n{json.dumps(config, indent=2)}\n```")

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_image(self, name: str, picture: Image.Image, step: int, text: str = "") -> None:
        import numpy as np

        self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandbCurves(Sink):
    """A run on wandb.ai, or a local one where WANDB_MODE is offline.

    api_key: None for the one that `wandb login` kept. config: as in TensorBoardCurves. arguments: of wandb.init, which
    win over the others.
    """

    def __init__(
        self,
        folder: Path,
        project: str,
        name: str,
        api_key: Secret | None,
        config: Mapping[str, Any] | None,
        arguments: Mapping[str, Any],
    ) -> None:
        self._wandb = importlib.import_module("wandb")
        # A question for a key would keep an unattended run waiting; the console's lines are the trainer's own.
        own = {"login_timeout": 60, "console": "off", "quiet": True}
        if api_key is not None:
            own["api_key"] = api_key.reveal()
        told = {"project": project, "name": name, "dir": str(folder), "config": config, **arguments}
        self._run = self._wandb.init(**told, settings=self._wandb.Settings(**own))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def log_image(self, name: str, picture: Image.Image, step: int, text: str = "") -> None:
        self._run.log({name: self._wandb.Image(picture, caption=text or None)}, step=step)

    def close(self) -> None:
        self._run.finish()


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Arguments for one of the two packages exist there. Raises SettingError for unknown ones."""
    function = _summary_writer().__init__ if name == "tensorboard" else importlib.import_module("wandb").init
    set_here = {"self", "log_dir", "settings"}
    known = [parameter for parameter in inspect.signature(function).parameters if parameter not in set_here]
    for argument in arguments:
        if argument not in known:
            raise SettingError(f"[{name}] has no argument {argument}{did_you_mean(argument, known)}")


def _summary_writer() -> type[SummaryWriter]:
    """Imported late: it takes a second, which runs without curves need not spend."""
    return importlib.import_module("torch.utils.tensorboard").SummaryWriter
