"""The training loop, whatever the model: read `NetworkTrainer.train` from top to bottom.

A subclass tells it what the model is by filling in the hooks; `anima_train_network.py` does so for Anima.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from library.data.cache_size import described_caches, latent_bytes
from library.data.dataset import Batch, MeasuredBatches, TrainingBatches
from library.data.epochs import LargestBatch, bucket_table, largest_batches, steps_per_epoch
from library.data.latent_files import LatentFiles
from library.data.latents import LatentCache, cache_latents, cache_latents_to_disk
from library.data.picture_index import cache_folder, picture_index
from library.data.pictures import Picture, scan_datasets
from library.data.summary import describe_data
from library.data.team import Team
from library.data.validation import as_measured, counterparts, measured_batches, split_validation
from library.errors import Problems, SettingError, UserError
from library.randomness import derive_seed
from library.settings import Settings, settings_as_flat_dict
from library.settings.sections import settings_sections
from library.training.adapter_writing import write_adapter
from library.training.captured import CapturedBackward
from library.training.ema import AdapterEma, check_ema
from library.training.guard import Guard, lowered_rates
from library.training.host_copy import copy_to_host
from library.training.interrupts import Interrupted, stop_requests
from library.training.machine import (
    check_device,
    check_disk,
    check_writable,
    describe_device,
    readable_size,
    warn_of_cache_space,
)
from library.training.metadata import RunFacts, adapter_metadata, shareable_path
from library.training.meter import Meter
from library.training.model_hashes import start_hashing
from library.training.monitor import Monitor
from library.training.optimizers import averaged_weights, check_optimizer, learning_rates, make_optimizer
from library.training.preflight import (
    Trial,
    check_fit,
    check_preflight,
    cost_of,
    expected_time,
    free_unused_memory,
    memory_limit,
    trial_table,
)
from library.training.processes import gather_lists, on_any_process, sum_gradients
from library.training.report import AdapterHealth, write_report
from library.training.requests import SAVE_AND_STOP, SaveRequests
from library.training.resuming import find_state
from library.training.rotation import check_nothing_overwritten, clear_killed_saves
from library.training.run import DTYPES, RunState, planned_steps, starting_state
from library.training.samples import SampleFiles, SamplePicture
from library.training.saver import Saver
from library.training.saving import (
    SAVE_DTYPES,
    PlannedFiles,
    epoch_name,
    is_due,
    planned_files,
    save_epochs,
    step_name,
)
from library.training.schedule_checks import check_length
from library.training.schedules import ScheduleSettings, draw_schedule, make_schedule
from library.training.snapshot import check_snapshot, digest_of, make_snapshot
from library.training.speed import chooses_compiling, chooses_graphs, uncompiled
from library.training.states import Resumable, StateCopy, check_shapes, copy_state, load_state, write_state
from library.training.step_records import StepRecords
from library.training.trackers import Tracker, check_trackers
from library.training.upload import Uploader
from library.training.validation import Validation, measured_shares, validates
from networks.adapter_report import inspect_adapter, norms_by_block, open_adapter
from networks.adapter_types import Adapters
from networks.saving import tensors_to_save
from networks.setup import (
    Network,
    attach_network,
    check_network,
    check_planned,
    create_network,
    facts_from_weights,
    import_network_module,
    missing_adapter_files,
    network_arguments,
    prove_loadable,
    summary_table,
)

logger = logging.getLogger("train_network")

T = TypeVar("T")


@dataclass(frozen=True)
class RunPlan:
    """What is known of a run before a model is loaded.

    network: on the meta device; None where another package makes it. rates: the learning rate of each part.
    validation: pictures that are not trained but measured, as they are measured.
    resume: the state to go on from. made_of: what a resumed run is compared by, see `library.training.snapshot`.
    """

    network_module: ModuleType
    network_arguments: dict[str, str]
    network: Network | None
    rates: dict[str, float]
    pictures: tuple[Picture, ...]
    validation: tuple[Picture, ...]
    epoch_steps: int
    total_steps: int
    resume: Path | None
    made_of: Mapping[str, Mapping[str, Any]]

    @property
    def all_pictures(self) -> tuple[Picture, ...]:
        """Those that are trained and those that are measured."""
        return self.pictures + self.validation


class NetworkTrainer(ABC):
    """Trains an adapter network on captioned pictures.

    `train` is the whole run. What depends on the model is in the hooks, which a subclass implements.
    known_problems: what is known to be wrong with the settings; it is told with what else is found at the start.
    """

    def __init__(self, settings: Settings, accelerator: Accelerator, known_problems: Sequence[str] = ()) -> None:
        self.settings = settings
        self.known_problems = known_problems
        self.accelerator = accelerator
        self.device = accelerator.device
        self.dtype = DTYPES[settings.run.precision]
        self.captured: CapturedBackward | None = None
        uploads = settings.hub.huggingface_repo_id is not None
        self.saver = Saver(settings.saving, Uploader(settings.hub) if uploads else None)
        self.state = RunState()
        self.records = StepRecords(gather_lists)
        self.validation: Validation | None = None

    # --- hooks: what the model is ---

    @abstractmethod
    def plan_models(self, problems: Problems) -> tuple[nn.Module, nn.Module] | None:
        """What `load_models` will return, on the meta device, or None where the files do not tell.

        All that is wrong with the model's files by their headers goes to `problems`; that a file is missing is known.
        """

    @abstractmethod
    def load_models(self) -> tuple[nn.Module, nn.Module]:
        """Loads all models, frozen, and returns the two that adapters may change: the model and its text encoder."""

    @abstractmethod
    def encode_pixels(self, pixels_BCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1] -> latents."""

    @abstractmethod
    def latent_identity(self) -> str:
        """What latents depend on beside the picture, as text: two encoders that differ have different ones."""

    @abstractmethod
    def latents_are_cached(self) -> None:
        """Called when no picture will be encoded any more: frees what only that needed."""

    @abstractmethod
    def place_models(self) -> None:
        """Called when the network is attached: brings to the device what `load_models` left in main memory."""

    @abstractmethod
    def prepare_text(self, folder: Path) -> None:
        """Called when the network is attached: what it leaves untrained may be cached, between runs in `folder`."""

    @abstractmethod
    def encode_ahead(self, captions: Sequence[str]) -> None:
        """Called, where captions are cached, some time before the steps that use these."""

    @abstractmethod
    def prepare(self, batch: Batch) -> Sequence[Any]:
        """A batch as what `losses` takes: one or more NamedTuples of tensors on the device, random draws among them.

        Each has rows_B, its samples' places in the batch, and timesteps_B in [0, 1].
        """

    @abstractmethod
    def prepare_at(self, batch: Batch, share: float) -> Sequence[Any]:
        """Like `prepare`, at the timestep that this share of all draws lies below; the same inputs in every run."""

    @abstractmethod
    def timestep_at(self, share: float, picture: Picture) -> float:
        """That timestep: 0 is the picture, 1 is noise."""

    @abstractmethod
    def losses(self, inputs: Any) -> Tensor:
        """The loss of each sample of one of `prepare`'s results: float32 [B]. Tensor work only: it may be captured."""

    @abstractmethod
    def compile_blocks(self, buckets: int) -> None:
        """Has what a step spends its time in compiled, for pictures of that many shapes."""

    @abstractmethod
    def render_samples(self) -> Sequence[SamplePicture]:
        """Renders the sample prompts with the adapter as it is."""

    @abstractmethod
    def model_files(self) -> Mapping[str, Path]:
        """The files that an adapter's metadata names and hashes, by Kohya's names: sd_model and vae."""

    @abstractmethod
    def model_facts(self) -> Mapping[str, Any]:
        """What else an adapter's metadata says of the model and its objective, by its keys."""

    def model_identity(self) -> Mapping[str, Mapping[str, Any]]:
        """What a resumed run must find the same of the model ("topology"), and what it should ("model")."""
        return {}

    # --- the run ---

    def train(self) -> None:
        """Everything from the checks to the saved adapter.

        Raises UserError for what the user can put right. When a run is interrupted (Ctrl+C, SIGTERM) or fails, out of
        GPU memory for one, the adapter as it then is is saved first.
        """
        settings, run, saving = self.settings, self.settings.run, self.settings.saving
        is_main, processes = self.accelerator.is_main_process, self.accelerator.num_processes
        started_at, started = time.time(), time.perf_counter()

        plan = self.plan_run()
        pictures, epoch_steps, total_steps = plan.pictures, plan.epoch_steps, plan.total_steps
        self.snapshot = make_snapshot(plan.made_of, settings_as_flat_dict(settings, shareable_path))
        if run.dry_run:
            logger.info("dry run: nothing is wrong\n%s", self.described(plan))
            return
        if self.shows_only(plan):
            return

        # Models, adapter, latents, optimizer.
        set_seed(run.seed)
        self.load_and_attach(plan)
        if run.preflight:
            self.preflight(plan)
            return
        latents = self.cached_latents(plan.all_pictures)
        batches = TrainingBatches(
            pictures, self.batch_sizes, run.seed, accumulation=run.gradient_accumulation_steps,
            rank=self.accelerator.process_index, world_size=processes, latents=latents,
            workers=settings.data.max_data_loader_n_workers,
            persistent_workers=settings.data.persistent_data_loader_workers, total_steps=total_steps,
            announce=self.encode_ahead if settings.data.caches_text else None,
        )  # fmt: skip
        self.plan_validation(plan, latents)
        self.make_parts(total_steps, buckets=len({picture.bucket for picture in pictures}))
        self.begin(plan)
        self.facts = RunFacts(
            model={**self.model_facts(), **facts_from_weights(settings.network, self.network)},
            model_files=self.model_files(),
            file_hashes=start_hashing(self.model_files()) if is_main else {},
            data=describe_data(settings.datasets, pictures) | {"num_validation_images": len(plan.validation)},
            network_args=plan.network_arguments,
            num_batches_per_epoch=epoch_steps * run.gradient_accumulation_steps,
            num_epochs=-(-total_steps // epoch_steps),
            max_train_steps=total_steps,
            num_processes=processes,
            started_at=started_at,
        )
        config = settings_as_flat_dict(settings, shareable_path)
        self.tracker = tracker = Tracker(settings.logging, saving.output_name, total_steps, config, is_main)
        if tracker.folder is not None:
            logger.info("curves: %s", tracker.folder.resolve())
        self.samples = SampleFiles(saving.output_dir / "sample", saving.output_name, resumed=plan.resume is not None)
        if settings.sampling.sample_at_first and plan.resume is None:
            self.sample("e000000")
        if plan.resume is None:
            self.validate()

        # Each window of batches makes one optimizer step; saves and states lie between steps.
        logger.info("ready after %.1f s; training %d steps", time.perf_counter() - started, total_steps)
        self.meter = meter = Meter(self.state.step, self.device)
        meter.restore(self.state.averages)
        self.network.train()
        stopping = False
        requests = SaveRequests(saving.output_dir) if is_main else None
        epochs_between_saves = save_epochs(saving, total_steps, epoch_steps)
        with closing(tracker), stop_requests() as stop, self.saving_before_errors():
            while self.state.step < total_steps and not stopping:
                for window in batches.epoch(self.state.epoch, first_step=self.state.step_in_epoch):
                    try:
                        meter.add(self.step(window.batches, window.sample_count))
                    except torch.OutOfMemoryError as error:
                        raise UserError(out_of_memory_message(window.batches)) from error
                    epoch_ended = self.state.advance(epoch_steps)
                    step, epoch, finished = self.state.step, self.state.epoch, self.state.step >= total_steps
                    tracker.advance(step)
                    saves = finished or is_due(saving.save_every_n_steps, step)
                    if is_due(settings.logging.log_every_n_steps, step) or step == 1 or epoch_ended or saves:
                        records = self.records.read(step)
                        found = self.monitor.look(records)
                        tracker.log({**meter.read(step), **self.rates(), **found.values}, step)
                        tracker.look(records, found.alerts, step)
                        self.guard.check(records, self.state)
                        self.monitor.report(found)
                    if epoch_ended:
                        tracker.log({"loss/epoch_average": meter.close_epoch()}, step)
                    if finished or validates(settings.validation, step, epoch, epoch_ended):
                        self.validate()
                    if saves and not finished:
                        self.save(step_name(saving.output_name, step), with_state=saving.save_state)
                    if not finished and epoch_ended and is_due(epochs_between_saves, epoch):
                        self.save(epoch_name(saving.output_name, epoch), with_state=saving.save_state)
                    if is_due(settings.sampling.sample_every_n_steps, step):
                        self.sample(f"{step:06d}")
                    if epoch_ended and is_due(settings.sampling.sample_every_n_epochs, epoch):
                        self.sample(f"e{epoch:06d}")
                    request = requests.take() if requests is not None else None
                    if request is not None:
                        self.save(step_name(saving.output_name, step), with_state=True)
                    stopping = on_any_process(stop.requested or request == SAVE_AND_STOP, self.device)
                    if finished or stopping:
                        break
            logger.info("%s", meter.summary())
            if self.state.step < total_steps:
                self.save_interrupted()
            else:
                self.save(saving.output_name, with_state=saving.save_state or saving.save_state_on_train_end)
                self.saver.finish()
            self.tell_end("stopped" if self.state.step < total_steps else "finished")
        if self.state.step < total_steps:
            state = saving.output_dir / f"{step_name(saving.output_name, self.state.step)}-state"
            raise Interrupted(f'stopped at step {self.state.step} of {total_steps}; go on with --resume "{state}"')

    def plan_run(self) -> RunPlan:
        """Checks all that can be checked before a model is loaded, and plans the run.

        Raises UserError naming everything that was found wrong, the settings' own problems first.
        """
        settings, run, processes = self.settings, self.settings.run, self.accelerator.num_processes
        problems = Problems(self.known_problems)
        problems.attempt(check_device, run, self.device)
        problems.attempt(check_preflight, run, processes)
        problems.attempt(check_writable, settings.saving.output_dir)
        if self.accelerator.is_main_process:
            clear_killed_saves(settings.saving)
        resume = problems.attempt(find_state, run, settings.saving, settings.hub)
        draws_only = settings.schedule.show_lr_schedule is not None or settings.timesteps.show_timesteps is not None
        if resume is None and not draws_only:
            problems.attempt(check_nothing_overwritten, settings.saving)
        problems.attempt(check_trackers, settings.logging)
        module = problems.attempt(import_network_module, settings.network.network_module)
        arguments = problems.attempt(network_arguments, settings.network, settings.given)
        models = self.plan_models(problems)
        network, rates = None, {"all": settings.optimizer.learning_rate}
        if None not in (module, arguments, models) and not missing_adapter_files(settings.network):
            caches_text = settings.data.caches_text
            network = problems.attempt(check_planned, settings.network, module, arguments, *models, caches_text)
        if network is not None:
            rates = {group["name"]: group["lr"] for group in self.parameter_groups(network)}
            if not self.known_problems:  # else an optimizer that cannot be made at all may be among them
                optimizer = problems.attempt(check_optimizer, settings.optimizer, rates)
                if optimizer is not None:
                    problems.attempt(check_ema, settings.ema, optimizer)
        pictures, validation, epoch_steps = (), (), 0
        if settings.datasets:
            is_main = self.accelerator.is_main_process
            skip_broken, index = settings.data.skip_broken_images, picture_index(settings.data, is_main)
            pictures = problems.attempt(scan_datasets, settings.datasets, skip_broken, is_main, index)
            if pictures:
                split = problems.attempt(split_validation, pictures, settings.datasets, run.seed)
                pictures, validation = split or ((), ())
        if pictures:
            epoch_steps = steps_per_epoch(pictures, self.batch_sizes, run.gradient_accumulation_steps, processes)
            problems.attempt(check_length, settings.schedule, planned_steps(run, epoch_steps))
            if resume is None:
                problems.attempt(starting_state, run, epoch_steps)
            if settings.data.cache_latents_to_disk:
                folder = settings.data.cache_dir or pictures[0].path.parent
                warn_of_cache_space(folder, latent_bytes(pictures + validation))
        validation = tuple(map(as_measured, validation))
        total_steps = planned_steps(run, epoch_steps)
        made_of = {} if problems.found else self.made_of(arguments, pictures, total_steps)
        plan = RunPlan(
            module, arguments, network, rates, pictures, validation, epoch_steps, total_steps, resume, made_of
        )
        if network is not None and pictures:
            problems.attempt(check_disk, settings.saving.output_dir, self.files_of(plan).total_bytes)
        problems.raise_found()
        if resume is not None:
            check_snapshot(resume, made_of, run.anima_resume_snapshot_strict)
            if network is not None:
                check_shapes(resume, network)
        logger.info("%s", bucket_table(pictures, self.batch_sizes))
        return plan

    def made_of(
        self, arguments: Mapping[str, str], pictures: Sequence[Picture], total_steps: int
    ) -> dict[str, dict[str, Any]]:
        """What a run that resumes this one is compared by. arguments: those of the network."""
        sections = settings_sections(self.settings, arguments)
        for name, facts in self.model_identity().items():
            sections.setdefault(name, {}).update(facts)
        shown = (f"{picture.key} {picture.bucket} {picture.repeats} {picture.caption}" for picture in pictures)
        sections["data"].update({"number of pictures": len(pictures), "pictures and captions": digest_of(shown)})
        sections["schedule"]["number of steps"] = total_steps
        return sections

    def shows_only(self, plan: RunPlan) -> bool:
        """Draws what the settings ask to see of the planned run; whether they do, and so nothing is to be trained."""
        schedule = self.settings.schedule
        if schedule.show_lr_schedule is None:
            return False
        if self.accelerator.is_main_process:
            draw_schedule(schedule, self.settings.optimizer.learning_rate, plan.rates, plan.total_steps)
        return True

    @property
    def team(self) -> Team:
        """All processes of the run."""
        return Team(self.accelerator.process_index, self.accelerator.num_processes, gather_lists)

    @property
    def batch_sizes(self) -> list[int]:
        """Of each dataset."""
        return [dataset.batch_size for dataset in self.settings.datasets]

    def files_of(self, plan: RunPlan) -> PlannedFiles:
        """What the run will save, as far as the network is known."""
        count = 0 if plan.network is None else sum(parameter.numel() for parameter in plan.network.parameters())
        formats = len(self.settings.network.adapter_format) * (1 if self.settings.ema.ema_decay is None else 2)
        return planned_files(self.settings.saving, formats, count, plan.total_steps, plan.epoch_steps)

    def described(self, plan: RunPlan) -> str:
        """What the run would be."""
        files = self.files_of(plan)
        lines = [
            f"device: {describe_device(self.device)}, {self.accelerator.num_processes} process(es), "
            f"model in {str(self.dtype).removeprefix('torch.')}",
            f"length: {plan.total_steps} steps of {plan.epoch_steps} an epoch, from {len(plan.pictures)} pictures",
        ]
        if plan.network is not None:
            free = check_disk(self.settings.saving.output_dir, files.total_bytes)
            lines.append(
                f"files: {files.adapters} adapters of {readable_size(files.adapter_bytes)}, {files.states} states of "
                f"up to {readable_size(files.state_bytes)}; {readable_size(free)} are free"
            )
        caches = described_caches(self.settings.data, plan.all_pictures)
        if caches:
            lines.append(f"caches: {caches}")
        return "\n".join(lines)

    def load_and_attach(self, plan: RunPlan) -> None:
        """Loads the models and attaches a new network to them, proven to load where it will be used."""
        settings, models = self.settings, self.load_models()
        self.network = create_network(settings.network, plan.network_module, plan.network_arguments, *models)
        attach_network(settings.network, self.network, *models, self.device)
        check_network(settings.network, self.network, settings.data.caches_text)
        prove_loadable(self.network, settings.network.adapter_format, *models)
        self.place_models()
        self.prepare_text(cache_folder(plan.pictures[0].path.parent, settings.data.cache_dir) / "text")

    def cached_latents(self, pictures: Sequence[Picture]) -> LatentCache | None:
        """Every picture's latents, where they are to be cached."""
        data, accelerator = self.settings.data, self.accelerator
        if not data.caches_latents:
            return None
        common = {"team": self.team, "show_progress": accelerator.is_main_process}
        if data.cache_latents_to_disk:
            files = LatentFiles(self.latent_identity(), data.cache_dir)
            latents = cache_latents_to_disk(
                pictures, self.encode_pixels, data.vae_batch_size, files, data.skip_cache_check, **common
            )
        else:
            latents = cache_latents(pictures, self.encode_pixels, data.vae_batch_size, **common)
        self.latents_are_cached()
        return latents

    def parameter_groups(self, network: Network) -> list[dict[str, Any]]:
        """What trains, grouped by part and learning rate."""
        own = self.settings.network
        return network.prepare_optimizer_params(own.text_encoder_lr, own.unet_lr, self.settings.optimizer.learning_rate)

    def make_parts(self, total_steps: int, buckets: int) -> None:
        """Optimizer, schedule and loss scale for the attached network, and the way in which steps run."""
        settings = self.settings
        groups = self.parameter_groups(self.network)
        check_optimizer(settings.optimizer, {group["name"]: group["lr"] for group in groups})
        logger.info("%s", summary_table(self.network, groups))
        optimizer = make_optimizer(settings.optimizer, groups, self.device)
        schedule = make_schedule(settings.schedule, optimizer, total_steps)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.monitor = Monitor(settings.monitor, self.network, self.device)
        self.ema = None if settings.ema.ema_decay is None else AdapterEma(settings.ema, self.network)
        others = {"monitor": self.monitor} if self.ema is None else {"monitor": self.monitor, "ema": self.ema}
        self.parts = Resumable(self.network, optimizer, schedule, scaler, others)
        raises = settings.monitor.anima_monitor_alert_policy == "raise"
        self.guard = Guard(
            "raise" if raises else settings.guard.on_nonfinite, self.network, optimizer, scaler,
            reads_each_step=settings.network.scale_weight_norms is not None,
        )  # fmt: skip
        compiles = chooses_compiling(settings.speed, self.device, total_steps, self.compile_obstacle())
        if compiles:
            self.compile_blocks(buckets)
        if chooses_graphs(settings.speed, self.device, self.capture_obstacle()):
            self.captured = CapturedBackward(self.losses, self.network.parameters())
        graphs = "off" if self.captured is None else "on"
        logger.info("torch_compile %s, cuda_graphs %s", "on" if compiles else "off", graphs)

    def compile_obstacle(self) -> str | None:
        """Why the blocks cannot be compiled; None where nothing is known against it."""
        return None

    def capture_obstacle(self) -> str | None:
        """Why the step cannot be recorded; None where it can."""
        if self.parts.scaler.is_enabled():
            return "the model runs in fp16"
        return None

    def step(self, batches: list[Batch], sample_count: int) -> Tensor:
        """One optimizer step over a window of batches: the mean loss over all its samples, on every GPU.

        sample_count: samples of the whole window, all processes together. Returns that mean, on the device, detached.
        """
        parts = self.parts
        mean_loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            # The batch's place in the window, whose batches were dealt to the processes in turn: any number of them
            # drops the same out.
            place = number * self.accelerator.num_processes + self.accelerator.process_index
            torch.manual_seed(derive_seed(self.settings.run.seed, "dropout", self.state.step, place))
            mean_loss += self.add_gradients(batch, share=float(batch.counted) / sample_count)
        sum_gradients(self.network.parameters(), [mean_loss])
        parts.scaler.unscale_(parts.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        if self.settings.optimizer.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.network.parameters(), self.settings.optimizer.max_grad_norm, norm)
        moved = self.guard.step(mean_loss, norm, self.state)
        parts.scaler.update()
        if self.settings.network.scale_weight_norms is not None and moved.item():
            self.network.apply_max_norm(self.settings.network.scale_weight_norms)
        if self.ema is not None:
            self.ema.update(moved)
        self.records.close_step(mean_loss, norm)
        parts.schedule.step()
        parts.optimizer.zero_grad(set_to_none=self.captured is None)
        return mean_loss

    def add_gradients(self, batch: Batch, share: float) -> Tensor:
        """Adds the gradients of the sum of the batch's losses times `share`; returns that sum, detached."""
        prepared = self.prepare(batch)
        if self.captured is not None:
            losses = [self.captured(inputs, share) for inputs in prepared]
        else:
            losses = [self.losses(inputs) for inputs in prepared]
        total = torch.stack([losses_B.sum() for losses_B in losses]).sum() * share
        if self.captured is None:
            self.parts.scaler.scale(total).backward()
        if batch.counted:
            for inputs, losses_B in zip(prepared, losses, strict=True):
                self.records.add(batch.paths, inputs.rows_B, inputs.timesteps_B, losses_B.detach())
        return total.detach()

    def rates(self) -> dict[str, float]:
        """The learning rates that act, by curve."""
        with lowered_rates(self.parts.optimizer, self.state.rate_factor):
            return learning_rates(self.parts.optimizer)

    # --- validation ---

    def plan_validation(self, plan: RunPlan, latents: LatentCache | None) -> None:
        """Prepares what is measured, if anything: the pictures kept for it, and as many of those that are trained."""
        if not plan.validation:
            return
        settings, measured = self.settings.validation, []
        for pictures in (plan.validation, tuple(map(as_measured, counterparts(plan.pictures, plan.validation)))):
            batches = measured_batches(pictures, self.batch_sizes, settings.max_validation_steps)
            measured.append(MeasuredBatches(pictures, self.team.share(batches), latents))
            if self.settings.data.caches_text:
                self.encode_ahead(measured[-1].captions())
        self.validation = Validation(settings, *measured, self.losses_at, self.team.gather)
        shares = measured_shares(settings.validation_timesteps)
        timesteps = ", ".join(f"{self.timestep_at(share, plan.validation[0]):.2f}" for share in shares)
        logger.info("validation: each picture at t = %s; as many trained pictures beside them", timesteps)

    def losses_at(self, batch: Batch, share: float) -> Tensor:
        """The loss of each sample at the timestep that this share of all draws lies below."""
        return torch.cat([self.losses(inputs) for inputs in self.prepare_at(batch, share)])

    def validate(self) -> None:
        """Measures the loss on pictures that are not trained, if there are any; saves the adapter if that asks for it.

        What is measured is what would be saved: averaged weights, without dropout.
        """
        if self.validation is None:
            return
        self.network.eval()
        with averaged_weights(self.parts.optimizer), uncompiled():
            curves = self.with_room(self.validation.curves)
        self.network.train()
        self.tracker.log(curves, self.state.step)
        loss = curves["loss/validation/average"]
        is_best = self.state.is_best(loss)
        logger.info(
            "validation after %d steps: loss %.4f, of trained pictures %.4f%s",
            self.state.step, loss, curves["loss/validation/trained_pictures"], ", the best so far" if is_best else "",
        )  # fmt: skip
        if is_best and self.settings.validation.save_best:
            self.save(f"{self.settings.saving.output_name}-best", with_state=self.settings.saving.save_state)

    def with_room(self, work: Callable[[], T]) -> T:
        """What `work` returns; where GPU memory is short, recorded steps give theirs back and it is tried once more."""
        try:
            return work()
        except torch.OutOfMemoryError:
            if self.captured is None:
                raise
        self.captured.release()
        return work()

    def begin(self, plan: RunPlan) -> None:
        """Sets `state` to where the run begins, or goes on. SettingError where nothing is left to train."""
        run, total_steps = self.settings.run, plan.total_steps
        if plan.resume is None:
            self.state = starting_state(run, plan.epoch_steps)
            if self.state.step > 0:
                logger.info(
                    "beginning at step %d of %d, in epoch %d; the learning rate schedule begins at its own start",
                    self.state.step, total_steps, self.state.epoch + 1,
                )  # fmt: skip
            return
        self.state = load_state(plan.resume, self.parts, run.resume_ignore_optimizer_mismatch)
        if self.state.step >= total_steps:
            raise SettingError(
                f"resume: {plan.resume} is at step {self.state.step}, and this run ends at step {total_steps}: "
                "raise max_train_steps or max_train_epochs"
            )
        logger.info("resumed from %s at step %d of %d", plan.resume, self.state.step, total_steps)
        self.skip_finished_epoch(plan.epoch_steps)

    def skip_finished_epoch(self, epoch_steps: int) -> None:
        """Starts the next epoch where the running one has no steps left, because it has become shorter."""
        if self.state.step_in_epoch >= epoch_steps:
            logger.warning(
                "the state was saved after %d steps of an epoch, which now has %d (other pictures, batches or "
                "processes): going on with the next epoch", self.state.step_in_epoch, epoch_steps,
            )  # fmt: skip
            self.state.epoch += 1
            self.state.step_in_epoch = 0

    def preflight(self, plan: RunPlan) -> None:
        """Tries a step of each bucket and tells what the run will take. DoesNotFitError where memory runs out."""
        run, largest = self.settings.run, largest_batches(plan.pictures, self.batch_sizes)
        latents = self.cached_latents([picture for batch in largest for picture in batch.pictures])
        self.make_parts(plan.total_steps, buckets=len({picture.bucket for picture in plan.pictures}))
        self.begin(plan)
        # The run's own schedule may refuse to be stepped beyond its end.
        schedule = make_schedule(ScheduleSettings(), self.parts.optimizer, plan.total_steps)
        self.parts = replace(self.parts, schedule=schedule)
        self.network.train()
        trials = [self.tried(batch, latents) for batch in largest]
        logger.info(
            "preflight:\n%s\n%s\n%s", trial_table(trials, self.device), self.described(plan),
            expected_time(trials, plan.total_steps - self.state.step, plan.epoch_steps),
        )  # fmt: skip
        accumulation = run.gradient_accumulation_steps
        warning = check_fit(trials, memory_limit(self.device), accumulation, self.memory_savers())
        if warning is not None:
            logger.warning("%s", warning)

    def tried(self, largest: LargestBatch, latents: LatentCache | None) -> Trial:
        """What optimizer steps of a bucket's largest batch take."""
        run, announce = self.settings.run, self.encode_ahead if self.settings.data.caches_text else None
        steps = TrainingBatches(largest.pictures, self.batch_sizes, run.seed, latents=latents, announce=announce)
        batch = next(step.batches[0] for step in steps.epoch(0) if step.sample_count == largest.size)
        samples = largest.size * run.gradient_accumulation_steps
        cost = cost_of(partial(self.step, [batch] * run.gradient_accumulation_steps, samples), self.device)
        if cost is None:
            if self.captured is not None:
                self.captured.release()
            self.parts.optimizer.zero_grad(set_to_none=self.captured is None)
            free_unused_memory()
        return Trial(largest.bucket, largest.size, largest.uses / samples, cost)

    def memory_savers(self) -> list[str]:
        """Settings that are not in force and would save GPU memory, those that cost least first."""
        return []

    # --- files ---

    def save(self, name: str, with_state: bool) -> None:
        """Has <name>.safetensors written, each further format beside it, and, where asked, the folder <name>-state.

        With an average of the adapter, <name>-ema.safetensors too, in each format.

        The main process copies what there is now, and a thread writes the copies while training goes on.
        """
        if not self.accelerator.is_main_process:
            return
        metadata = None if self.settings.saving.no_metadata else self.metadata()
        with averaged_weights(self.parts.optimizer):
            adapters = {name: copy_to_host(self.network.adapter_tensors())}
        if self.ema is not None:
            with self.ema.applied():
                adapters[f"{name}-ema"] = copy_to_host(self.network.adapter_tensors())
        state = None
        if with_state:
            state = copy_state(self.parts, replace(self.state, averages=self.meter.averages()), self.snapshot)
        self.saver.start(name, partial(self.write_save, name, adapters, metadata, state, self.state.step))

    def write_save(
        self,
        name: str,
        adapters: Mapping[str, Adapters],
        metadata: dict[str, str] | None,
        state: StateCopy | None,
        step: int,
    ) -> list[Path]:
        """Writes a save's files and folders, and returns them. adapters: by file name. Runs in a thread."""
        saving, written = self.settings.saving, []
        dtype = SAVE_DTYPES[saving.save_precision]
        for stem, adapter in adapters.items():
            for number, file_format in enumerate(self.settings.network.adapter_format):
                path = saving.output_dir / (f"{stem}-{file_format}.safetensors" if number else f"{stem}.safetensors")
                write_adapter(path, tensors_to_save(adapter, file_format, dtype), metadata)
                written.append(path)
        if state is not None:
            written.append(saving.output_dir / f"{name}-state")
            write_state(written[-1], state)
        self.tracker.event("save", step, name)
        return written

    def metadata(self) -> dict[str, str]:
        """What the adapter, as it now is, says about its making."""
        settings = settings_as_flat_dict(self.settings, shareable_path)
        epoch = self.state.epoch + (self.state.step_in_epoch > 0)
        return adapter_metadata(settings, self.facts, self.state.step, epoch, time.time())

    def save_interrupted(self) -> None:
        """Saves what an ending run has reached, with a state to resume from. UserError where that fails."""
        self.save(step_name(self.settings.saving.output_name, self.state.step), with_state=True)
        self.saver.finish()

    @contextmanager
    def saving_before_errors(self) -> Iterator[None]:
        """Inside, what has been trained is saved before an error ends the run."""
        try:
            yield
        except Exception as error:
            try:
                self.save_interrupted()
            except UserError as failure:
                logger.error("%s", failure)
            self.tell_end(f"ended by {type(error).__name__}: {error}")
            raise

    def tell_end(self, outcome: str) -> None:
        """Records how the run ended, and writes its report, if one is asked for."""
        self.tracker.event("end", self.state.step, outcome)
        history, saving = self.tracker.history, self.settings.saving
        if history is None:
            return
        path = saving.output_dir / f"{saving.output_name}_report.html"
        try:
            settings = settings_as_flat_dict(self.settings, shareable_path)
            adapter = saving.output_dir / f"{saving.output_name}.safetensors"
            health = adapter_health(adapter) if outcome == "finished" else None
            write_report(path, saving.output_name, outcome, history, settings, health)
            logger.info("report: %s", path.resolve())
        except Exception as error:
            logger.warning("the report is left out: %s: %s", type(error).__name__, error)

    def sample(self, tag: str) -> None:
        """Renders the sample prompts, if there are any, without dropout; by the main process.

        The first time, they are rendered without the adapter as well. A failure is told, and the run goes on.
        tag: e000002 or 000100, for the names of the files.
        """
        if self.settings.sampling.sample_prompts is None or not self.accelerator.is_main_process:
            return
        self.network.eval()
        try:
            base = None
            with averaged_weights(self.parts.optimizer):
                if self.samples.needs_base:
                    with self.network.disabled(), uncompiled():  # rendered once, which is not worth compiling for
                        base = self.with_room(self.render_samples)
                samples = self.with_room(self.render_samples)
            for name, picture in self.samples.write(tag, self.state.step, samples, base):
                self.tracker.log_image(name, picture, self.state.step)
            self.tracker.event("sample", self.state.step, tag)
        except torch.OutOfMemoryError:
            logger.warning("sample pictures left out: out of GPU memory; give the prompts a lower --w and --h")
        except Exception as error:  # a full disk, a prompt that does not fit: nothing that training needs
            logger.warning("sample pictures left out: %s: %s", type(error).__name__, error)
        self.network.train()


def adapter_health(path: Path) -> AdapterHealth:
    """What a saved adapter holds, and whether it is sound, for the report."""
    found = inspect_adapter(open_adapter(path))
    norms = norms_by_block({name: module.norm or 0.0 for name, module in found.modules.items()})
    return AdapterHealth(found.description, found.problems, norms)


def out_of_memory_message(batches: list[Batch]) -> str:
    """What was being trained when the GPU's memory ran out, and what would help."""
    shapes = sorted({f"{len(batch.captions)} x {batch.bucket[0]}x{batch.bucket[1]}" for batch in batches})
    return (
        f"CUDA out of memory while training a batch of {' or '.join(shapes)} pixels. The adapter was saved as it was "
        "before this step. What needs less memory: gradient_checkpointing = true, a smaller batch_size "
        "(with gradient_accumulation_steps to make up for it), a smaller resolution."
    )
