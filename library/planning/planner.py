"""Checks all that can be checked before a model is loaded, and plans the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.data.cache_size import latent_bytes
from library.data.epochs import bucket_table, filled_datasets, steps_per_epoch
from library.data.pictures import Picture
from library.data.planning import plan_pictures
from library.data.validation import as_measured
from library.errors import Problems
from library.planning.plan import RunPlan, compared_by
from library.settings import Settings
from library.settings.file_rules import picture_folders
from library.settings.origins import placed
from library.settings.sections import settings_sections
from library.training.machine import check_device, check_disk, warn_of_cache_space
from library.training.optimization.ema import check_ema
from library.training.optimization.optimizers import check_optimizer
from library.training.optimization.schedule_checks import check_length
from library.training.preflight import check_preflight
from library.training.run import planned_steps
from library.training.saving.resuming import find_state, steps_at_start
from library.training.saving.rotation import check_nothing_overwritten, saved_files, size_of
from library.training.saving.settings import NO_FILES, PlannedFiles, planned_files
from library.training.saving.snapshot import Sections, check_snapshot
from library.training.saving.states import check_shapes
from library.training.watching.trackers import check_trackers
from networks.arguments import described
from networks.network import AdapterNetwork
from networks.planning import parameter_groups, plan_network
from networks.setup import Network

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planner:
    """Plans the run that `settings` describe.

    known_problems: what is known to be wrong with the settings; it is told with what else is found. processes: of the
    whole run; is_main: whether this one writes and tells. plan_models, model_identity: see `ModelHooks`.
    """

    settings: Settings
    known_problems: Sequence[str]
    device: torch.device
    processes: int
    is_main: bool
    plan_models: Callable[[Problems], tuple[nn.Module, nn.Module] | None]
    model_identity: Callable[[], Sections]

    def plan(self) -> RunPlan:
        """Raises UserError naming everything that was found wrong, the settings' own problems first."""
        settings, run, saving = self.settings, self.settings.run, self.settings.saving
        problems = Problems(self.known_problems)
        resume = self._state_to_resume(problems)
        planned = plan_network(settings.network, settings.given, self.plan_models, settings.data.caches_text, problems)
        network = planned.network
        rates = self._rates(network, problems)
        datasets = () if any(picture_folders(settings)) else settings.datasets  # which is among the known problems
        pictures, validation = plan_pictures(settings.data, datasets, run.seed, self.is_main, problems)
        epoch_steps, files = 0, NO_FILES
        if pictures:
            epoch_steps = self._epoch_steps(pictures, problems)
            if settings.data.cache_latents_to_disk:
                folder = settings.data.cache_dir or pictures[0].path.parent
                warn_of_cache_space(folder, latent_bytes(pictures + validation))
        total_steps = planned_steps(run, epoch_steps)
        steps_done = problems.attempt(steps_at_start, run, resume, epoch_steps, total_steps) if pictures else None
        if network is not None and pictures:
            files = self._files(network, total_steps, epoch_steps)
            there = 0 if resume is None else sum(map(size_of, saved_files(saving)))
            problems.attempt(check_disk, saving.output_dir, files.total_bytes - there)
        if resume is None and not settings.only_draws and (problems.found or not run.dry_run):
            problems.attempt(check_nothing_overwritten, saving)  # else a dry run tells of it behind its report
        problems.found = [placed(settings, problem) for problem in problems.found]
        problems.raise_found()
        # An argument that was not given has a value too, which a resumed run must have as well.
        own = isinstance(network, AdapterNetwork)
        sections = settings_sections(settings, described(network.arguments) if own else planned.arguments)
        made_of = compared_by(sections, self.model_identity(), pictures, total_steps)
        if resume is not None:
            check_snapshot(resume, made_of, run.anima_resume_snapshot_strict)
            if network is not None:
                check_shapes(resume, network)
        logger.info("%s", bucket_table(pictures, self.settings.batch_sizes, filled_datasets(settings.datasets)))
        measured = tuple(map(as_measured, validation))
        return RunPlan(
            planned.module, planned.arguments, network, rates, pictures, measured, epoch_steps, total_steps, files,
            resume, steps_done, made_of,
        )  # fmt: skip

    def _state_to_resume(self, problems: Problems) -> Path | None:
        """The state to go on from. What is wrong with it or with the machine goes to `problems`."""
        settings = self.settings
        problems.attempt(check_device, settings.run, self.device)
        problems.attempt(check_preflight, settings.run, self.processes)
        resume = problems.attempt(find_state, settings.run, settings.saving, settings.hub)
        problems.attempt(check_trackers, settings.logging)
        return resume

    def _rates(self, network: Network | None, problems: Problems) -> dict[str, float]:
        """The learning rate of each part. Whether the optimizer can train them goes to `problems`."""
        settings = self.settings
        if network is None:
            return {"all": settings.optimizer.learning_rate}
        groups = parameter_groups(settings.network, settings.optimizer.learning_rate, network)
        rates = {group["name"]: group["lr"] for group in groups}
        if not self.known_problems:  # else an optimizer that cannot be made at all may be among them
            optimizer = problems.attempt(check_optimizer, settings.optimizer, rates)
            if optimizer is not None:
                problems.attempt(check_ema, settings.ema, optimizer)
        return rates

    def _epoch_steps(self, pictures: Sequence[Picture], problems: Problems) -> int:
        """Steps of an epoch. What is wrong with the run's length goes to `problems`."""
        run = self.settings.run
        steps = steps_per_epoch(pictures, self.settings.batch_sizes, run.gradient_accumulation_steps, self.processes)
        problems.attempt(check_length, self.settings.schedule, planned_steps(run, steps))
        return steps

    def _files(self, network: Network, total_steps: int, epoch_steps: int) -> PlannedFiles:
        """What the run will save."""
        count = sum(parameter.numel() for parameter in network.parameters())
        formats = len(self.settings.network.adapter_format) * (1 if self.settings.ema.ema_decay is None else 2)
        saves_best = self.settings.validation.save_best
        return planned_files(self.settings.saving, formats, count, total_steps, epoch_steps, saves_best)
