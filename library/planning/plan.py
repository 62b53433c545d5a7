"""What is known of a run before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from library.data.cache_size import described_caches
from library.data.pictures import Picture
from library.settings import Settings
from library.training.machine import describe_device, free_bytes, readable_size
from library.training.optimization.optimizers import check_optimizer, finds_own_rate, sets_own_rate
from library.training.optimization.schedules import warmup_steps
from library.training.saving.settings import PlannedFiles
from library.training.saving.snapshot import Sections, digest_of
from networks.settings import NetworkSettings
from networks.setup import Network, described_adapters


@dataclass(frozen=True)
class RunPlan:
    """What is known of a run before a model is loaded.

    network: on the meta device; None where another package makes it. rates: the learning rate of each part.
    validation: pictures that are not trained but measured, as they are measured.
    files: what the run will save, as far as the network is known.
    resume: the state to go on from. steps_done: at the start, of that state or by initial_step.
    made_of: what a resumed run is compared by, see `library.training.saving.snapshot`.
    """

    network_module: ModuleType
    network_arguments: Mapping[str, str]
    network: Network | None
    rates: Mapping[str, float]
    pictures: tuple[Picture, ...]
    validation: tuple[Picture, ...]
    epoch_steps: int
    total_steps: int
    files: PlannedFiles
    resume: Path | None
    steps_done: int
    made_of: Sections

    @property
    def all_pictures(self) -> tuple[Picture, ...]:
        """Those that are trained and those that are measured."""
        return self.pictures + self.validation

    @property
    def common(self) -> dict[str, Any]:
        """What all processes of the run must have the same, by its names."""
        return {
            "the state to resume": None if self.resume is None else self.resume.name,
            "the steps of an epoch": self.epoch_steps,
            "the pictures kept for validation": digest_of(picture.key for picture in self.validation),
            **{name: value for section in self.made_of.values() for name, value in section.items()},
        }

    @property
    def buckets(self) -> int:
        """How many shapes the trained pictures have."""
        return len({picture.bucket for picture in self.pictures})


def compared_by(settings: Sections, model: Sections, pictures: Sequence[Picture], total_steps: int) -> Sections:
    """What a run that resumes this one is compared by.

    settings, model: what is known of them, by section and name; both may have a section. They have "data" and
    "schedule".
    """
    sections: dict[str, dict[str, Any]] = {name: dict(section) for name, section in settings.items()}
    for name, facts in model.items():
        sections.setdefault(name, {}).update(facts)
    shown = (f"{picture.key} {picture.bucket} {picture.repeats} {picture.caption}" for picture in pictures)
    others = (f"{picture.key} {picture.nl} {_mask_text(picture)}" for picture in pictures if picture.nl or picture.mask)
    sections["data"].update(
        {
            "number of pictures": len(pictures),
            "pictures and captions": digest_of(shown),
            # Apart from the captions, of which earlier states tell a digest as well.
            "natural language and masks": digest_of(others),
        }
    )
    sections["schedule"]["number of steps"] = total_steps
    return sections


def _mask_text(picture: Picture) -> str:
    return "" if picture.mask is None else f"{picture.mask.name} {picture.mask.stat().st_size}"


def describe_plan(plan: RunPlan, settings: Settings, device: torch.device, dtype: torch.dtype, processes: int) -> str:
    """What the run would be, in some lines."""
    data, saving = settings.data, settings.saving
    lines = [
        f"device: {describe_device(device)}, {processes} process(es), model in {str(dtype).removeprefix('torch.')}",
        f"length: {plan.total_steps} steps of {plan.epoch_steps} an epoch, from {len(plan.pictures)} pictures",
    ]
    if plan.steps_done or plan.resume is not None:
        origin = "initial_step or initial_epoch" if plan.resume is None else str(plan.resume)
        left = plan.total_steps - plan.steps_done
        lines.append(f"start: at step {plan.steps_done}, from {origin}; {left} steps are left")
    lines += [
        f"network: {_described_network(plan.network, settings.network)}",
        f"training: {_described_training(plan, settings)}",
        f"output: {saving.output_dir / saving.output_name}.safetensors as "
        f"{', '.join(settings.network.adapter_format)}, in {saving.save_precision}",
    ]
    if plan.network is not None:
        files, free = plan.files, free_bytes(saving.output_dir)
        lines.append(
            f"files: {files.adapters} adapters of {readable_size(files.adapter_bytes)}, {files.states} states of "
            f"up to {readable_size(files.state_bytes)}; {readable_size(free)} are free"
        )
    caches = described_caches(data, plan.all_pictures)
    if caches:
        lines.append(f"caches: {caches}")
    return "\n".join(lines)


def _described_network(network: Network | None, settings: NetworkSettings) -> str:
    """ "networks.lora_anima, alpha 8, start.safetensors: 280 lora rank 16, 113 norm" """
    parts = [settings.network_module]
    if network is None:
        parts.append(f"dim {settings.network_dim}")
    if not settings.dim_from_weights:
        parts.append(f"alpha {settings.network_alpha:g}" if settings.network_alpha else "alpha as the rank")
    if settings.network_weights is not None:
        parts.append(f"from {settings.network_weights.name}")
    text = ", ".join([*parts, *settings.network_args])
    return text if network is None else f"{text}: {described_adapters(network)}"


def _described_training(plan: RunPlan, settings: Settings) -> str:
    """ "AdamW, weight_decay=0.1, learning rate 0.0001, cosine, 50 steps of warmup" """
    chosen, schedule, rates = settings.optimizer, settings.schedule, plan.rates
    optimizer = check_optimizer(chosen, rates)
    parts = [chosen.optimizer_type, *chosen.optimizer_args]
    if sets_own_rate(optimizer):
        return ", ".join([*parts, "which sets its learning rate itself"])
    if len(set(rates.values())) == 1:
        rate = f"learning rate {next(iter(rates.values())):g}"
    else:
        rate = "learning rates " + ", ".join(f"{name} {value:g}" for name, value in rates.items())
    if "learning_rate" not in settings.given and chosen.learning_rate in rates.values():
        rate += " (learning_rate is not set: its default)"
    parts.append(f"{rate} times what it finds" if finds_own_rate(optimizer) else rate)
    parts.append(schedule.lr_scheduler_type or schedule.lr_scheduler)
    warmup = warmup_steps(schedule, plan.total_steps)
    if warmup and schedule.lr_scheduler_type is None:
        parts.append(f"{warmup} steps of warmup")
    return ", ".join(parts)
