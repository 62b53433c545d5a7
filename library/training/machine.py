"""Whether the machine can do what a run asks of it: the device's number formats, and room on the disk."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch

from library.errors import UserError
from library.training.run import DTYPES, RunSettings

logger = logging.getLogger(__name__)

# NVIDIA cards compute in bf16 from compute capability 8.0 (Ampere) on; older ones imitate it, slowly.
_BF16_CAPABILITY = (8, 0)


def check_device(run: RunSettings, device: torch.device) -> None:
    """Warns of a run without a GPU; UserError for a GPU that cannot compute in the run's precision, or not at all."""
    if device.type == "cpu":
        reason = "this PyTorch was built without CUDA" if torch.version.cuda is None else "no usable GPU was found"
        logger.warning("training on the CPU, which takes days for a real model: %s (see pytorch.org)", reason)
    if device.type != "cuda":
        return
    card = torch.cuda.get_device_name(device)
    too_old = torch.version.hip is None and torch.cuda.get_device_capability(device) < _BF16_CAPABILITY
    if run.precision == "bf16" and too_old:
        name = "full_bf16" if run.full_bf16 else "mixed_precision"
        raise UserError(f'{name}: {card} cannot compute in bf16; set mixed_precision = "fp16"')
    try:
        numbers = torch.ones(8, 8, device=device, dtype=DTYPES[run.precision])
        (numbers @ numbers).sum().item()
    except RuntimeError as error:  # the wrong build of PyTorch, a broken driver, or no free memory
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{card} cannot be used by PyTorch {torch.__version__}, built for {', '.join(torch.cuda.get_arch_list())}: "
            f"{reason}. Free the card, or install a PyTorch for it from pytorch.org"
        ) from error


def check_disk(folder: Path, needed: int) -> int:
    """The free bytes of the disk that `folder` will lie on. UserError where they are fewer than `needed`."""
    free = free_bytes(folder)
    if needed > free:
        raise UserError(
            f"output_dir: {folder} needs about {readable_size(needed)} for what this run saves, and its disk has "
            f"{readable_size(free)} free. Save elsewhere, less often (save_every_n_steps, save_every_n_epochs), "
            "or without states (save_state)"
        )
    return free


def warn_of_cache_space(folder: Path, needed: int) -> None:
    """A warning only, as earlier runs may have cached the latents already."""
    free = free_bytes(folder)
    if needed > free:
        logger.warning(
            "cache_latents_to_disk: all latents take about %s, and the disk of %s has %s free; set cache_dir to a "
            "folder on another, or cache_latents to keep them in memory",
            readable_size(needed), folder, readable_size(free),
        )  # fmt: skip


def free_bytes(folder: Path) -> int:
    """Free on the disk that `folder` lies on, or will."""
    folder = folder.resolve()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def describe_device(device: torch.device) -> str:
    """The device, for people: a card's name and memory."""
    if device.type != "cuda":
        return device.type.upper()
    return (
        f"{torch.cuda.get_device_name(device)} ({readable_size(torch.cuda.get_device_properties(device).total_memory)})"
    )


def readable_size(size: int) -> str:
    """Bytes as a text in GiB, or in MiB below one GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
