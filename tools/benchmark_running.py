"""Times what a run does beside its steps, on random weights:  python tools/benchmark_running.py [--rounds 3]

The trainer's whole loop runs in turn with all watching off, with monitoring and logging as by default, and with a save
of adapter and state on top. One model serves all, so that compiling is paid once. Prints two JSON lines:

    watching   ms a step without and with, and what the difference is in percent
    saving     what one save costs the loop, in ms and in steps; call_ms is the part in which the loop stands still.
               The rest of the cost is the copying and the thread that writes.

All times are of the clock over --steps steps, from an idle GPU to an idle GPU. --tiny runs on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from library.anima_runtime.config import AnimaConfig
from library.console import show
from library.data.dataset import Batch, StepBatches
from library.data.pictures import Picture
from library.data.settings import DatasetSettings, SubsetSettings
from library.planning.plan import RunPlan
from library.settings import Settings, shareable_settings
from library.training.saving.saver import Saver
from library.training.saving.settings import NO_FILES
from library.training.step_records import StepRecord, StepRecords
from library.training.watching.monitor import Monitor
from networks.setup import import_network_module
from tools.anima_shapes import REAL, TINY, transformer_shapes
from tools.benchmark_cases import CASES, EAGER, BenchmarkTrainer, Case, case_settings, endless_batches, made_trainer
from tools.gpu_measures import synchronize

# The run begins shortly before the only step that is saved, so that the whole of its writing falls into the time taken.
_SAVED_STEP, _FIRST_STEP = 100, 90
_WARM_UP = 5
_PICTURES = 200


class NoRecords:
    """In place of `StepRecords`: keeps nothing."""

    def add(self, paths: Sequence[Path], rows_B: Tensor, timesteps_B: Tensor, losses_B: Tensor) -> None:
        """Does nothing."""

    def close_step(self, loss: Tensor, gradient_norm: Tensor) -> None:
        """Does nothing."""

    def start(self, step: int, extra: Tensor) -> None:
        """Does nothing."""

    def finish(self) -> tuple[list[StepRecord], float]:
        """Nothing was kept."""
        return [], 0.0

    def unread(self) -> Callable[[], list[list[float]]]:
        """Nothing is known."""
        return list


class LoopTrainer(BenchmarkTrainer):
    """Runs the loop again and again with other settings, on a model that is there already.

    steps: those that are timed, after `_WARM_UP` others.
    """

    case: Case
    steps: int

    def milliseconds(self, settings: Settings, keeps_records: bool) -> tuple[float, list[float]]:
        """Of a step on average, and of each save's call."""
        self.settings, self.flat_settings = settings, shareable_settings(settings)
        self.saver = Saver(settings.saving)
        self.records = StepRecords(lambda own: own) if keeps_records else NoRecords()
        self.times, self.saves = [], []
        self.train()
        first, last = self.times
        return 1000 * (last - first) / self.steps, self.saves

    @property
    def timed(self) -> tuple[int, int]:
        """The step before which the clock starts, and the one before which it stops."""
        first = _FIRST_STEP + _WARM_UP
        return first, first + self.steps

    def plan_run(self) -> RunPlan:
        settings = self.settings
        subset = settings.datasets[0].subsets[0]
        caption = ", ".join(f"tag {number}" for number in range(40))
        pictures = tuple(
            Picture(f"0/0/{name}.png", Path(f"{name}.png"), caption, side, side, 0, subset)
            for name, side in zip(range(_PICTURES), self.case.sides * _PICTURES, strict=False)
        )
        return RunPlan(
            network_module=import_network_module(settings.network.network_module), network_arguments={}, network=None,
            rates={}, pictures=pictures, validation=(), epoch_steps=1000, total_steps=self.timed[1] + 1,
            files=NO_FILES, resume=None, steps_done=0, made_of={},
        )  # fmt: skip

    def load_and_attach(self, plan: RunPlan) -> None:
        """`made_trainer` has done it."""

    def cached_latents(self, pictures: Sequence[Picture]) -> None:
        """`endless_batches` brings latents."""

    def training_batches(self, plan: RunPlan, latents: None) -> SimpleNamespace:
        batches = endless_batches(self.case, self.config)

        def epoch(number: int, first_step: int = 0) -> Iterator[StepBatches]:
            for batch in batches:
                yield StepBatches([batch], self.case.batch_size)

        return SimpleNamespace(epoch=epoch)

    def make_parts(self, total_steps: int, buckets: int) -> None:
        """Makes them once; afterwards only what the settings say of watching is new."""
        if not hasattr(self, "parts"):
            super().make_parts(total_steps, buckets)
        self.monitor = Monitor(self.settings.monitor, self.network, self.device)
        self.parts = replace(self.parts, others={"monitor": self.monitor})

    def step(self, batches: list[Batch], sample_count: int) -> Tensor:
        if self.state.step in self.timed:
            synchronize(self.device)
            self.times.append(time.perf_counter())
        return super().step(batches, sample_count)

    def save(self, name: str, with_state: bool) -> None:
        started = time.perf_counter()
        super().save(name, with_state)
        if with_state:
            self.saves.append(1000 * (time.perf_counter() - started))

    def model_files(self) -> Mapping[str, Path]:
        return {}


def variants(settings: Settings, case: Case, folder: Path) -> dict[str, Settings]:
    """Settings of the three kinds of run. Both that watch do so as by default."""
    subset = SubsetSettings(image_dir=Path("pictures"))
    datasets = (DatasetSettings(batch_size=case.batch_size, resolution=case.sides[0], subsets=(subset,)),)
    saving = replace(settings.saving, output_dir=folder / "output", overwrite_output=True)
    run = replace(settings.run, initial_step=_FIRST_STEP)
    watching = replace(
        settings, datasets=datasets, run=run, saving=saving,
        logging=replace(settings.logging, logging_dir=folder / "logs"),
    )  # fmt: skip
    monitor = replace(settings.monitor, anima_monitor_memory=False, anima_monitor_loss_spike_ratio=None)
    logging = replace(settings.logging, log_with="none", html_report=False, log_every_n_steps=10**9)
    save = replace(saving, save_every_n_steps=_SAVED_STEP, save_state=True)
    return {
        "off": replace(watching, monitor=monitor, logging=logging),
        "watching": watching,
        "saving": replace(watching, saving=save),
    }


def results(trainer: LoopTrainer, settings: Mapping[str, Settings], rounds: int) -> list[dict[str, Any]]:
    """Runs the variants in turn, `rounds` times, and compares their medians."""
    step_ms: dict[str, list[float]] = {name: [] for name in settings}
    calls = []
    trainer.milliseconds(settings["off"], keeps_records=False)  # compiles and records
    for _ in range(rounds):
        for name, own in settings.items():
            milliseconds, saves = trainer.milliseconds(own, keeps_records=name != "off")
            step_ms[name].append(milliseconds)
            calls += saves[:1]  # the save at the end stands outside the time taken
    median = {name: statistics.median(found) for name, found in step_ms.items()}
    each = {name: [round(milliseconds, 3) for milliseconds in found] for name, found in step_ms.items()}
    cost = (median["saving"] - median["watching"]) * trainer.steps
    return [
        {
            "what": "watching", "off_ms": each["off"], "on_ms": each["watching"],
            "cost_percent": round(100 * (median["watching"] / median["off"] - 1), 3),
        },
        {
            "what": "saving", "step_ms": round(median["watching"], 3), "with_a_save_ms": each["saving"],
            "call_ms": [round(call, 1) for call in calls], "cost_ms": round(cost, 1),
            "cost_steps": round(cost / median["watching"], 3),
        },
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, default="lora", help="Case of tools/benchmark_training.py.")
    parser.add_argument("--steps", type=int, default=40, help="Timed steps of each run.")
    parser.add_argument("--rounds", type=int, default=3, help="Runs of each kind.")
    parser.add_argument("--folder", type=Path, help="Where saves and curves go, and stay. Unset: a temporary one.")
    parser.add_argument("--tiny", action="store_true", help="The tiny model on the CPU.")
    arguments = parser.parse_args(argv)
    device, case = torch.device("cpu" if arguments.tiny else "cuda"), CASES[arguments.case]
    if arguments.tiny:
        case = replace(case, sides=((64, 64),), speed=EAGER)
    config = AnimaConfig.from_shapes(transformer_shapes(TINY if arguments.tiny else REAL, 32128))
    trainer = made_trainer(LoopTrainer, case_settings(case, device), config, len(case.sides))
    trainer.case, trainer.steps = case, arguments.steps
    with tempfile.TemporaryDirectory() as temporary:
        settings = variants(trainer.settings, case, arguments.folder or Path(temporary))
        for result in results(trainer, settings, arguments.rounds):
            gpu = {} if arguments.tiny else {"gpu": torch.cuda.get_device_name()}
            show(json.dumps({**result, "case": arguments.case, "steps": arguments.steps, **gpu}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
