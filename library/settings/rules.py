"""Checks across settings, before any model is loaded. Each rule yields messages that name what to change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from library.data.buckets import SIDE_UNIT
from library.data.settings import DatasetSettings
from library.settings.data_rules import data_problems
from library.settings.file_rules import (
    files_to_start_from,
    model_files,
    output_folders,
    picture_folders,
    samples,
)
from library.settings.groups import Settings, settings_as_flat_dict
from library.settings.objective_rules import objective_problems
from library.settings.optimizer_rules import optimizer_problems
from library.settings.origins import origin
from library.settings.setting_warnings import warn_of_surprises

# Option -> least and greatest allowed value. An unset option is not checked.
RANGES: dict[str, tuple[float, float | None]] = {
    "anima_seq_len": (512, None),
    "blocks_to_swap": (0, None),
    "anima_sigmoid_scale": (1e-3, None),
    "anima_flow_shift": (0.01, 100),
    "logit_mean": (-10, 10),
    "logit_std": (1e-3, None),
    "mode_scale": (-1, 1.75),
    "min_timestep": (0, 1000),
    "max_timestep": (0, 1000),
    "timestep_offset": (-999, 999),
    "anima_noise_offset": (0, 1),
    "multires_noise_iterations": (0, 16),
    "multires_noise_discount": (0, 1),
    "ip_noise_gamma": (0, 1),
    "huber_c": (1e-6, None),
    "huber_scale": (1e-6, None),
    "network_dim": (1, None),
    "network_alpha": (0, None),
    "network_dropout": (0, 1),
    "unet_lr": (0, None),
    "llm_adapter_lr": (0, None),
    "text_encoder_lr": (0, None),
    "scale_weight_norms": (1e-6, None),
    "vae_batch_size": (1, None),
    "text_cache_memory_gb": (0, None),
    "text_cache_disk_gb": (0.001, None),
    "max_data_loader_n_workers": (0, None),
    "num_repeats": (1, None),
    "prior_loss_weight": (0, None),
    "validation_split": (0, 1),
    "validation_seed": (0, 2**32 - 1),
    "keep_tokens": (0, None),
    "caption_dropout_rate": (0, 1),
    "caption_dropout_every_n_epochs": (2, None),
    "caption_tag_dropout_rate": (0, 1),
    "token_warmup_step": (0, None),
    "token_warmup_min": (0, None),
    "sentence_dropout_rate": (0, 1),
    "batch_size": (1, None),
    "min_bucket_reso": (16, None),
    "max_bucket_reso": (16, None),
    "bucket_reso_steps": (16, None),
    "learning_rate": (0, None),
    "max_grad_norm": (0, None),
    "lr_warmup_steps": (0, None),
    "lr_decay_steps": (0, None),
    "lr_scheduler_num_cycles": (0, None),
    "lr_scheduler_power": (0, None),
    "lr_scheduler_min_lr_ratio": (0, 1),
    "lr_scheduler_timescale": (1, None),
    "max_train_steps": (1, None),
    "ema_decay": (0, 0.999999),
    "ema_power": (0.01, 1),
    "anima_monitor_memory_warn_ratio": (0.01, 1),
    "anima_monitor_loss_spike_ratio": (1.1, None),
    "seed": (0, 2**32 - 1),
    "max_train_epochs": (1, None),
    "initial_step": (0, None),
    "initial_epoch": (1, None),
    "gradient_accumulation_steps": (1, None),
    "save_every_n_epochs": (1, None),
    "save_every_n_steps": (1, None),
    "save_n_epoch_ratio": (1, None),
    "save_last_n_epochs": (1, None),
    "save_last_n_steps": (1, None),
    "save_last_n_epochs_state": (1, None),
    "save_last_n_steps_state": (1, None),
    "validate_every_n_steps": (1, None),
    "validate_every_n_epochs": (1, None),
    "max_validation_steps": (1, None),
    "validation_timesteps": (1, 100),
    "sample_every_n_steps": (1, None),
    "sample_every_n_epochs": (1, None),
    "log_every_n_steps": (1, None),
    "tensorboard_port": (1, 65535),
}


def check_settings(settings: Settings) -> list[str]:
    """Every problem of the settings as a whole; what has no effect is logged as a warning."""
    warn_of_surprises(settings)
    return problems_of(settings)


def problems_of(settings: Settings) -> list[str]:
    """Every problem of the settings as a whole."""
    rules = (
        model_files, attention, memory, precision, numbers_in_range, objective, data, buckets, optimizer_problems,
        files_to_start_from, picture_folders, samples, output_folders,
    )  # fmt: skip
    problems: list[str] = []
    for rule in rules:
        try:
            problems.extend(rule(settings))
        except OSError as error:
            problems.append(f"{error.filename}: cannot be read: {error.strerror}")
    return problems


def wrong_numbers(settings: Settings) -> Iterator[str]:
    """The problems of single numbers and of bucket sides, which come before any use of them."""
    yield from numbers_in_range(settings)
    yield from buckets(settings)


def memory(settings: Settings) -> Iterator[str]:
    """Blocks that run module by module and are swapped come back for the backward pass only if computed again."""
    if settings.memory.blocks_to_swap and settings.run.gradient_checkpointing is False:
        swap, checkpointing = origin(settings, "blocks_to_swap"), origin(settings, "gradient_checkpointing")
        yield f"{swap}: needs gradient checkpointing, which {checkpointing} turns off; drop one of them"


def attention(settings: Settings) -> Iterator[str]:
    """The settings that choose the attention backend agree."""
    asked = settings.model.attention_asked_for()
    if len(set(asked.values())) > 1:
        names = " and ".join(origin(settings, name) for name in asked)
        yield f"{names}: these choose {' and '.join(asked.values())} for attention; keep one of them"


def precision(settings: Settings) -> Iterator[str]:
    """mixed_precision and the full_ switches name one precision."""
    run = settings.run
    if run.full_bf16 and run.full_fp16:
        yield f"{origin(settings, 'full_bf16')} contradicts {origin(settings, 'full_fp16')}: keep one of them"
    for name, own in (("full_bf16", "bf16"), ("full_fp16", "fp16")):
        if getattr(run, name) and "mixed_precision" in settings.given and run.mixed_precision != own:
            mixed = f"{origin(settings, 'mixed_precision')} = {run.mixed_precision}"
            yield f'{origin(settings, name)} contradicts {mixed}: set mixed_precision = "{own}", or drop one of them'


def numbers_in_range(settings: Settings) -> Iterator[str]:
    """Numbers lie within RANGES; those of datasets and subsets too."""
    flat = settings_as_flat_dict(settings)
    datasets = flat.pop("datasets")
    yield from _range_problems(settings, flat, "")
    for i, dataset in enumerate(datasets):
        subsets = dataset.pop("subsets")
        yield from _range_problems(settings, dataset, f"datasets[{i}].")
        for j, subset in enumerate(subsets):
            yield from _range_problems(settings, subset, f"datasets[{i}].subsets[{j}].")


def _range_problems(settings: Settings, values: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, (least, greatest) in RANGES.items():
        value = values.get(name)
        if value is None or (value >= least and (greatest is None or value <= greatest)):
            continue
        allowed = f"{least} or more" if greatest is None else f"from {least} to {greatest}"
        yield f"{origin(settings, name, prefix)}: {value} is out of range; give {allowed}"


def objective(settings: Settings) -> Iterator[str]:
    """The objective's settings fit each other; without a look at those that are out of range."""
    if any(numbers_in_range(settings)):
        return
    for prefix, name, problem in objective_problems(settings):
        yield f"{origin(settings, name, prefix)}: {problem}"


def data(settings: Settings) -> Iterator[str]:
    """The pictures, masks and caches go together."""
    for prefix, name, problem in data_problems(settings):
        yield f"{origin(settings, name, prefix)}: {problem}"


def buckets(settings: Settings) -> Iterator[str]:
    """Bucket sides fit the model, the limits are the right way round, and the resolution lies between them."""
    for i, dataset in enumerate(settings.datasets):
        prefix = f"datasets[{i}]."
        if dataset.bucket_reso_steps > SIDE_UNIT and dataset.bucket_reso_steps % SIDE_UNIT:  # less is out of range
            name = origin(settings, "bucket_reso_steps", prefix)
            yield f"{name}: {dataset.bucket_reso_steps} is not a multiple of {SIDE_UNIT}"
        if dataset.min_bucket_reso > dataset.max_bucket_reso:
            lower, upper = (origin(settings, name, prefix) for name in ("min_bucket_reso", "max_bucket_reso"))
            yield f"{lower} is {dataset.min_bucket_reso}, above {upper}, which is {dataset.max_bucket_reso}"
        elif dataset.enable_bucket:
            for size in dataset.sizes:
                yield from _resolution_problems(settings, dataset, size, prefix)


def _resolution_problems(
    settings: Settings, dataset: DatasetSettings, size: tuple[int, int], prefix: str
) -> Iterator[str]:
    name = "resolutions" if dataset.resolutions else "resolution"
    for limit, fits in (
        ("min_bucket_reso", min(size) >= dataset.min_bucket_reso),
        ("max_bucket_reso", max(size) <= dataset.max_bucket_reso),
    ):
        if not fits:
            beyond = f"{origin(settings, limit, prefix)}, which is {getattr(dataset, limit)}"
            size_text = f"{size[0]}x{size[1]}"
            yield f"{origin(settings, name, prefix)}: {size_text} goes beyond {beyond}: change the one or the other"
