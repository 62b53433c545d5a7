"""What is known of a run before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from library.data.cache_size import described_caches
from library.data.pictures import Picture
from library.data.settings import DataSettings
from library.training.machine import describe_device, free_bytes, readable_size
from library.training.saving.settings import PlannedFiles
from library.training.saving.snapshot import Sections, digest_of


@dataclass(frozen=True)
class RunPlan:
    """What is known of a run before a model is loaded.

    network: on the meta device; None where another package makes it. rates: the learning rate of each part.
    validation: pictures that are not trained but measured, as they are measured.
    files: what the run will save, as far as the network is known.
    resume: the state to go on from. made_of: what a resumed run is compared by, see `library.training.saving.snapshot`.
    """

    network_module: ModuleType
    network_arguments: Mapping[str, str]
    network: nn.Module | None
    rates: Mapping[str, float]
    pictures: tuple[Picture, ...]
    validation: tuple[Picture, ...]
    epoch_steps: int
    total_steps: int
    files: PlannedFiles
    resume: Path | None
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


def describe_plan(
    plan: RunPlan, output_dir: Path, data: DataSettings, device: torch.device, dtype: torch.dtype, processes: int
) -> str:
    """What the run would be, in some lines."""
    lines = [
        f"device: {describe_device(device)}, {processes} process(es), model in {str(dtype).removeprefix('torch.')}",
        f"length: {plan.total_steps} steps of {plan.epoch_steps} an epoch, from {len(plan.pictures)} pictures",
    ]
    if plan.network is not None:
        files, free = plan.files, free_bytes(output_dir)
        lines.append(
            f"files: {files.adapters} adapters of {readable_size(files.adapter_bytes)}, {files.states} states of "
            f"up to {readable_size(files.state_bytes)}; {readable_size(free)} are free"
        )
    caches = described_caches(data, plan.all_pictures)
    if caches:
        lines.append(f"caches: {caches}")
    return "\n".join(lines)
