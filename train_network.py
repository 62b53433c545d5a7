"""The training loop, whatever the model: read `NetworkTrainer.train` from top to bottom.

A subclass tells it what the model is by filling in `ModelHooks`; `anima_train_network.py` does so for Anima.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from library.data.caching import latents_of
from library.data.dataset import Batch, MeasuredBatches, TrainingBatches
from library.data.epochs import filled_datasets, largest_batches
from library.data.latents import LatentCache
from library.data.picture_index import cache_folder
from library.data.pictures import Picture
from library.data.summary import describe_data
from library.data.team import Team
from library.data.validation import as_measured, counterparts, measured_batches
from library.errors import Problems
from library.garbage import kept_as_is
from library.model_hashes import start_hashing
from library.planning.plan import RunPlan, describe_plan
from library.planning.planner import Planner
from library.randomness import derive_seed
from library.settings import Settings, shareable_settings
from library.settings.origins import placed
from library.training.captured import CapturedBackward
from library.training.choices import Choice, choose_compiling, choose_fusing, choose_graphs, recorded, told
from library.training.host_copy import reserve_host_memory
from library.training.interrupts import Interrupted, stop_requests
from library.training.lack_of_memory import explaining_lack_of_memory, tried_twice
from library.training.model_hooks import ModelHooks
from library.training.optimization.ema import AdapterEma
from library.training.optimization.flat_adamw import FlatAdamW
from library.training.optimization.optimizers import (
    averaged_weights,
    check_optimizer,
    make_optimizer,
    rates_before_step,
    rates_of_step,
)
from library.training.optimization.schedules import ScheduleSettings, draw_schedule, make_schedule
from library.training.preflight import (
    check_fit,
    load_largest,
    memory_limit,
    tell_trials,
    try_batches,
)
from library.training.processes import (
    any_wishes,
    check_same,
    gather_lists,
    prepare_exchange,
    sum_gradients,
    wait_for_all,
)
from library.training.requests import SAVE, SAVE_AND_STOP, SaveRequests
from library.training.run import DTYPES, RunState
from library.training.saving.metadata import RunFacts, adapter_metadata
from library.training.saving.resuming import first_state
from library.training.saving.rotation import check_nothing_overwritten, clear_killed_saves
from library.training.saving.saver import Saver
from library.training.saving.saves import SAVED_COPIES, Save, copy_adapters, write_save
from library.training.saving.settings import epoch_name, is_due, save_epochs, step_name
from library.training.saving.snapshot import make_snapshot, recorded_choices
from library.training.saving.states import Resumable, copy_state
from library.training.saving.upload import Uploader
from library.training.speed import uncompiled
from library.training.step_records import StepRecords
from library.training.watching.guard import Guard
from library.training.watching.log_points import LogPoints, judges_at_once
from library.training.watching.meter import LossAverages, Meter
from library.training.watching.monitor import Monitor
from library.training.watching.progress import closing_line
from library.training.watching.report import try_report
from library.training.watching.samples import SampleFiles, telling_failures
from library.training.watching.trackers import Tracker
from library.training.watching.validation import Validation, measured_shares, validates
from networks.adapter_report import health_of
from networks.planning import parameter_groups
from networks.saving import tensors_to_save
from networks.setup import (
    Network,
    attach_network,
    check_network,
    create_network,
    facts_from_weights,
    merge_base_weights,
    prove_loadable,
    summary_table,
)

logger = logging.getLogger("train_network")


class NetworkTrainer(ModelHooks):
    """Trains an adapter network on captioned pictures.

    `train` is the whole run. What depends on the model is in `ModelHooks`, which a subclass implements.
    known_problems: what is known to be wrong with the settings; it is told with what else is found at the start.
    """

    def __init__(self, settings: Settings, accelerator: Accelerator, known_problems: Sequence[str] = ()) -> None:
        self.settings = settings
        self.flat_settings = shareable_settings(settings)
        self.known_problems = known_problems
        self.accelerator = accelerator
        self.device = accelerator.device
        self.dtype = DTYPES[settings.run.precision]
        self.captured: CapturedBackward | None = None
        self.before: Mapping[str, Any] = {}  # what a resumed run chose
        self.choices: list[Choice] = []
        self.saver = Saver(settings.saving, Uploader(settings.hub) if settings.hub.huggingface_repo_id else None)
        self.state = RunState()
        self.records = StepRecords(gather_lists)
        self.rates_before: Mapping[str, float | Tensor] = {}  # of the last step, from before it
        self.validation: Validation | None = None

    # --- the run ---

    def train(self) -> None:
        """Everything from the checks to the saved adapter.

        Raises UserError for what the user can put right. When a run is interrupted (Ctrl+C, SIGTERM) or fails, out of
        GPU memory for one, the adapter as it then is is saved first.
        """
        settings, run, saving = self.settings, self.settings.run, self.settings.saving
        is_main = self.accelerator.is_main_process
        started_at, started = time.time(), time.perf_counter()

        if settings.trains:
            if is_main:
                clear_killed_saves(saving)
            wait_for_all()  # a state may have been put back, which all should find
        plan = self.plan_run()
        epoch_steps, total_steps = plan.epoch_steps, plan.total_steps
        if run.dry_run:
            self.tell_dry_run(plan)
            return
        if self.shows_only(plan):
            return

        # Models, adapter, latents, optimizer.
        set_seed(run.seed)
        self.load_and_attach(plan)
        prepare_exchange(self.device)
        if run.preflight:
            self.preflight(plan)
            return
        latents = self.cached_latents(plan.all_pictures)
        batches = self.training_batches(plan, latents)
        self.plan_validation(plan, latents)
        self.make_parts(total_steps, plan.buckets)
        self.snapshot = make_snapshot(plan.made_of, self.flat_settings, recorded(self.choices, self.device))
        self.state = first_state(run, plan.resume, self.parts, epoch_steps, total_steps)
        self.facts = RunFacts(
            model={**self.model_facts(), **facts_from_weights(settings.network, self.network)},
            model_files=self.model_files(),
            file_hashes=start_hashing(self.model_files()) if is_main else {},
            data={
                **describe_data(settings.datasets, plan.pictures),
                "num_validation_images": len(plan.validation),
                "cache_latents": settings.data.caches_latents,
            },
            network_args=plan.network_arguments,
            num_batches_per_epoch=epoch_steps * run.gradient_accumulation_steps,
            num_epochs=-(-total_steps // epoch_steps),
            max_train_steps=total_steps,
            num_processes=self.accelerator.num_processes,
            started_at=started_at,
        )
        self.tracker = tracker = Tracker(settings.logging, saving.output_name, total_steps, self.flat_settings, is_main)
        self.samples = SampleFiles(saving.output_dir, saving.output_name, resumed=plan.resume is not None)
        meter = Meter()
        meter.averages = LossAverages(**self.state.averages)
        self.log_points = log_points = LogPoints(self.records, meter, self.monitor, self.guard, tracker, gather_lists)
        with stop_requests() as stop, closing(tracker), kept_as_is(), self.saving_before_errors():
            if settings.sampling.sample_at_first and plan.resume is None:
                self.sample("e000000")
            if plan.resume is None:
                self.validate()

            steps_left = total_steps - self.state.step
            logger.info("ready after %.1f s; training %d steps", time.perf_counter() - started, steps_left)
            at_once = judges_at_once(settings.monitor, settings.guard)
            self.network.train()
            if is_main:
                reserve_host_memory(self.network.state_dict().values(), copies=SAVED_COPIES)
            stopping = False
            requests = SaveRequests(saving.output_dir) if is_main else None
            epochs_between_saves = save_epochs(saving, total_steps, epoch_steps)
            # Each window of batches makes one optimizer step; saves and states lie between steps.
            while self.state.step < total_steps and not stopping:
                for window in batches.epoch(self.state.epoch, first_step=self.state.step_in_epoch):
                    with explaining_lack_of_memory(window.batches):
                        self.step(window.batches, window.sample_count)
                    epoch_ended = self.state.advance(epoch_steps)
                    log_points.look(self.state)  # the last one, while the GPU works on this step
                    step, epoch, finished = self.state.step, self.state.epoch, self.state.step >= total_steps
                    tracker.advance(step)
                    measures = finished or validates(settings.validation, step, epoch, epoch_ended)
                    renders = is_due(settings.sampling.sample_every_n_steps, step)
                    saves = not finished and is_due(saving.save_every_n_steps, step)
                    pauses = epoch_ended or measures or renders or finished or (saves and at_once)
                    if is_due(settings.logging.log_every_n_steps, step) or step == 1 or pauses:
                        log_points.reach(step, self.rates())
                    if pauses or at_once:
                        log_points.look(self.state)
                    if epoch_ended:
                        tracker.log({"loss/epoch_average": meter.close_epoch()}, step)
                    if measures:
                        self.validate()
                    if saves:
                        self.save(step_name(saving.output_name, step), with_state=saving.save_state)
                    if not finished and epoch_ended and is_due(epochs_between_saves, epoch):
                        self.save(epoch_name(saving.output_name, epoch), with_state=saving.save_state)
                    if renders:
                        self.sample(f"{step:06d}")
                    if epoch_ended and is_due(settings.sampling.sample_every_n_epochs, epoch):
                        self.sample(f"e{epoch:06d}")
                    request = requests.take() if requests is not None else None
                    if request == SAVE or (request == SAVE_AND_STOP and finished):  # one that stops saves anyway
                        self.save(step_name(saving.output_name, step), with_state=True)
                    stopping = any_wishes(stop.requested or request == SAVE_AND_STOP)
                    if finished or stopping:
                        break
            if self.state.step < total_steps:  # stopped, and there may be steps behind the last log point
                log_points.reach(self.state.step, self.rates())
            log_points.look(self.state)
            logger.info("%s", closing_line(self.state.step, tracker.pace.seconds_per_step, self.device))
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
        """Checks all that can be checked before a model is loaded. UserError naming everything that was found wrong."""
        accelerator = self.accelerator
        plan = Planner(
            self.settings, self.known_problems, self.device, accelerator.num_processes, accelerator.is_main_process,
            self.plan_models, self.model_identity,
        ).plan()  # fmt: skip
        check_same(plan.common)
        self.before = {} if plan.resume is None else recorded_choices(plan.resume)
        return plan

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

    def described(self, plan: RunPlan) -> str:
        """What the run would be."""
        settings, processes = self.settings, self.accelerator.num_processes
        return describe_plan(plan, settings, self.device, self.dtype, processes)

    def tell_dry_run(self, plan: RunPlan) -> None:
        """Tells what the run would be. UserError where the files of an earlier run would not let it begin."""
        obstacles = Problems()
        if plan.resume is None:
            obstacles.attempt(check_nothing_overwritten, self.settings.saving)
        verdict = "a run would stop at what is told below; nothing else" if obstacles.found else "nothing"
        logger.info("dry run: %s is wrong\n%s", verdict, self.described(plan))
        obstacles.found = [placed(self.settings, problem) for problem in obstacles.found]
        obstacles.raise_found()

    def load_and_attach(self, plan: RunPlan) -> None:
        """Loads the models and attaches a new network to them, proven to load where it will be used."""
        settings, models = self.settings, self.load_models()
        merge_base_weights(settings.network, *models)
        self.network = create_network(settings.network, plan.network_module, plan.network_arguments, *models)
        attach_network(settings.network, self.network, *models, self.device)
        check_network(settings.network, self.network, settings.data.caches_text)
        prove_loadable(self.network, settings.network.adapter_format, *models)
        self.place_models()
        self.prepare_text(cache_folder(plan.pictures[0].path.parent, settings.data.cache_dir) / "text")

    def cached_latents(self, pictures: Sequence[Picture]) -> LatentCache | None:
        """Every picture's latents, where they are to be cached."""
        data, shows = self.settings.data, self.accelerator.is_main_process
        if not data.caches_latents:
            return None
        latents = latents_of(pictures, data, self.encode_pixels, self.latent_identity, self.team, shows)
        self.latents_are_cached()
        return latents

    def training_batches(self, plan: RunPlan, latents: LatentCache | None) -> TrainingBatches:
        """This process's part of the planned pictures, in epochs."""
        settings = self.settings
        return TrainingBatches(
            plan.pictures, self.settings.batch_sizes, settings.run.seed,
            accumulation=settings.run.gradient_accumulation_steps, rank=self.team.rank, world_size=self.team.size,
            latents=latents, workers=settings.data.max_data_loader_n_workers,
            persistent_workers=settings.data.persistent_data_loader_workers, total_steps=plan.total_steps,
            announce=self.encode_ahead if settings.data.caches_text else None,
            filled=filled_datasets(settings.datasets),
        )  # fmt: skip

    def parameter_groups(self, network: Network) -> list[dict[str, Any]]:
        """What trains, grouped by part and learning rate."""
        return parameter_groups(self.settings.network, self.settings.optimizer.learning_rate, network)

    def make_parts(self, total_steps: int, buckets: int) -> None:
        """Optimizer, schedule and loss scale for the attached network, what watches them, how steps are computed."""
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
            dependent=None if settings.network.scale_weight_norms is None else "scale_weight_norms", average=self.ema,
        )  # fmt: skip
        self.choose_steps(total_steps, buckets)

    def choose_steps(self, total_steps: int, buckets: int) -> None:
        """Chooses how steps are computed, and prepares that: by own kernels, compiled, recorded."""
        speed, before, device, optimizer = self.settings.speed, self.before, self.device, self.parts.optimizer
        fuses = choose_fusing(speed, before, device, self.dtype, self.fuse_obstacle)
        memory = self.choose_memory(bool(fuses.value), self.network)
        if fuses.value:
            self.fuse_blocks(buckets)
        else:
            self.keep_modules()
        compiles = choose_compiling(speed, before, device, total_steps, bool(fuses.value), self.compile_obstacle())
        if compiles.value:
            self.compile_blocks(buckets)
        captures = choose_graphs(speed, before, device, self.capture_obstacle())
        self.trained = list(self.network.parameters())  # once: finding a real adapter's 836 takes 1.5 ms
        if captures.value:
            if isinstance(optimizer, FlatAdamW):
                self.trained = optimizer.flatten(self.trained)
                torch.cuda.empty_cache()  # where the weights were, as much again would stay reserved
            self.captured = CapturedBackward(self.losses, self.network.parameters())
        self.choices += [fuses, *memory, compiles, captures]
        logger.info("%s", told(self.choices))

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
        sum_gradients(self.trained, [mean_loss])
        parts.scaler.unscale_(parts.optimizer)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in self.trained if parameter.grad is not None])
        if self.settings.optimizer.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.trained, self.settings.optimizer.max_grad_norm, norm)
        self.rates_before = rates_before_step(parts.optimizer, self.state.rate_factor)
        moved = self.guard.step(mean_loss, norm, self.state)
        parts.scaler.update()
        most_norm = self.settings.network.scale_weight_norms
        if most_norm is not None and (not self.guard.leaves_out or moved.item()):
            self.network.apply_max_norm(most_norm)
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
        """The learning rates of the last step, by curve."""
        return rates_of_step(self.parts.optimizer, self.rates_before)

    # --- validation ---

    def plan_validation(self, plan: RunPlan, latents: LatentCache | None) -> None:
        """Prepares what is measured, if anything: the pictures kept for it, and as many of those that are trained."""
        if not plan.validation:
            return
        settings, measured = self.settings.validation, []
        for pictures in (plan.validation, tuple(map(as_measured, counterparts(plan.pictures, plan.validation)))):
            batches = measured_batches(pictures, self.settings.batch_sizes, settings.max_validation_steps)
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

    def with_room(self, work: Callable[[], Any]) -> Any:
        """What `work` returns; where GPU memory is short, recorded steps give theirs back and it is tried once more."""
        return tried_twice(work, lambda: self.captured)

    def preflight(self, plan: RunPlan) -> None:
        """Tries a step of each bucket and tells what the run will take. DoesNotFitError where memory runs out."""
        run, sizes, filled = self.settings.run, self.settings.batch_sizes, filled_datasets(self.settings.datasets)
        largest = largest_batches(plan.pictures, sizes, filled)
        latents = self.cached_latents([picture for batch in largest for picture in batch.pictures])
        self.make_parts(plan.total_steps, plan.buckets)
        self.state = first_state(run, plan.resume, self.parts, plan.epoch_steps, plan.total_steps)
        # The run's own schedule may refuse to be stepped beyond its end.
        schedule = make_schedule(ScheduleSettings(), self.parts.optimizer, plan.total_steps)
        self.parts = replace(self.parts, schedule=schedule)
        self.network.train()
        announce = self.encode_ahead if self.settings.data.caches_text else None
        load = partial(load_largest, sizes=sizes, seed=run.seed, latents=latents, announce=announce, filled=filled)
        accumulation, steps = run.gradient_accumulation_steps, plan.total_steps - self.state.step
        trials = try_batches(largest, load, self.step, self.after_lost_step, accumulation, self.device)
        tell_trials(trials, self.described(plan), steps, plan.epoch_steps, self.device)
        warning = check_fit(trials, memory_limit(self.device), accumulation, self.memory_savers())
        if warning is not None:
            logger.warning("%s", warning)

    def after_lost_step(self) -> None:
        """Frees what a step that ran out of memory has left behind."""
        if self.captured is not None:
            self.captured.release()
        self.parts.optimizer.zero_grad(set_to_none=self.captured is None)

    # --- files ---

    def save(self, name: str, with_state: bool) -> None:
        """Has <name>.safetensors written, each further format beside it, and, where asked, the folder <name>-state.

        With an average of the adapter, <name>-ema.safetensors too, in each format.

        The main process has what there is now copied, which nothing waits for, and a thread writes the copies while
        training goes on.
        """
        if not self.accelerator.is_main_process:
            return
        settings, state = self.settings, None
        adapters = copy_adapters(name, self.network, self.parts.optimizer, self.ema)
        if with_state:
            state = copy_state(self.parts, self.log_points.state_by_now(self.state), self.snapshot)
        save, step = Save(name, adapters, self.metadata(), state), self.state.step

        def write() -> list[Path]:
            written = write_save(save, settings.saving, settings.network.adapter_format, tensors_to_save)
            self.tracker.event("save", step, name)
            return written

        self.saver.start(name, write)

    def metadata(self) -> dict[str, str] | None:
        """What the adapter, as it now is, says about its making; None where it shall say nothing."""
        if self.settings.saving.no_metadata:
            return None
        epoch = self.state.epoch + (self.state.step_in_epoch > 0)
        return adapter_metadata(self.flat_settings, self.facts, self.state.step, epoch, time.time())

    def save_interrupted(self) -> None:
        """Saves what an ending run has reached, with a state to resume from. UserError where that fails."""
        self.save(step_name(self.settings.saving.output_name, self.state.step), with_state=True)
        self.saver.finish()

    @contextmanager
    def saving_before_errors(self) -> Iterator[None]:
        """Inside, what has been trained is saved before an error ends the run, and its records tell of the end."""
        begun_at = self.state.step
        try:
            yield
        except Exception as error:
            try:
                if self.state.step > begun_at:  # else there is nothing that a new start would not have
                    self.with_room(self.save_interrupted)
                self.saver.wait()
            except Exception as failure:  # what ended the run is what has to be told, not what came of it
                logger.error("the run ends unsaved: %s", failure)
            self.tell_end(f"ended by {type(error).__name__}: {error}")
            raise

    def tell_end(self, outcome: str) -> None:
        """Records how the run ended, and writes its report, if one is asked for."""
        self.tracker.event("end", self.state.step, outcome)
        history, saving = self.tracker.history, self.settings.saving
        if history is not None:
            inspect = health_of if outcome == "finished" else None
            chosen = self.settings.given
            try_report(saving.output_dir, saving.output_name, outcome, history, self.flat_settings, chosen, inspect)

    def sample(self, tag: str) -> None:
        """Renders the sample prompts, if there are any, without dropout; by the main process.

        The first time, they are rendered without the adapter as well, and uncompiled: compiling is for what comes
        again, and before the first step it would change what the steps are compiled for. tag: e000002 or 000100, for
        the names of the files. A failure is told, and the run goes on.
        """
        if self.settings.sampling.sample_prompts is None or not self.accelerator.is_main_process:
            return
        self.network.eval()
        is_first, base = self.samples.needs_base, None
        with telling_failures(), averaged_weights(self.parts.optimizer), uncompiled() if is_first else nullcontext():
            if is_first:
                with self.network.disabled():
                    base = self.with_room(self.render_samples)
            samples = self.with_room(self.render_samples)
            for name, picture, text in self.samples.write(tag, self.state.step, samples, base):
                self.tracker.log_image(name, picture, self.state.step, text)
            self.tracker.event("sample", self.state.step, tag)
        self.network.train()
