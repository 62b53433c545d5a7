"""Checks across settings, before any model is loaded. Each rule yields messages that name what to change."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from library.data.buckets import SIDE_UNIT
from library.errors import SettingError
from library.settings.groups import Settings, settings_as_flat_dict, top_level_options
from library.settings.objective_rules import objective_problems, objective_without_effect
from library.settings.root_style_keys import DEFAULT_SOURCE
from library.training.optimizers import check_optimizer

logger = logging.getLogger(__name__)

# Option -> least and greatest allowed value. An unset option is not checked.
RANGES: dict[str, tuple[float, float | None]] = {
    "anima_seq_len": (512, None),
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
    "max_data_loader_n_workers": (0, None),
    "num_repeats": (1, None),
    "keep_tokens": (0, None),
    "caption_dropout_rate": (0, 1),
    "caption_tag_dropout_rate": (0, 1),
    "batch_size": (1, None),
    "min_bucket_reso": (16, None),
    "max_bucket_reso": (16, None),
    "bucket_reso_steps": (16, None),
    "learning_rate": (0, None),
    "max_grad_norm": (0, None),
    "lr_warmup_steps": (0, None),
    "lr_scheduler_num_cycles": (0, None),
    "lr_scheduler_power": (0, None),
    "lr_scheduler_min_lr_ratio": (0, 1),
    "max_train_steps": (1, None),
    "seed": (0, 2**32 - 1),
    "max_train_epochs": (1, None),
    "gradient_accumulation_steps": (1, None),
    "save_every_n_epochs": (1, None),
    "save_every_n_steps": (1, None),
    "sample_every_n_steps": (1, None),
    "sample_every_n_epochs": (1, None),
    "log_every_n_steps": (1, None),
}

# File names end at 255 bytes; the rest is for what saves, samples, log folders and unfinished files add to the name.
LONGEST_NAME = 180


def check_settings(settings: Settings) -> list[str]:
    """Every problem of the settings as a whole; what has no effect is logged as a warning."""
    _warn_of_no_effect(settings)
    _warn_of_rising_rate(settings)
    _warn_of_long_context(settings)
    rules = (
        model_files, numbers_in_range, objective, buckets, optimizer, files_to_start_from, samples, output_folders
    )  # fmt: skip
    problems: list[str] = []
    for rule in rules:
        try:
            problems.extend(rule(settings))
        except OSError as error:
            problems.append(f"{error.filename}: cannot be read: {error.strerror}")
    return problems


def model_files(settings: Settings) -> Iterator[str]:
    """The parts of the model are given, and are there; the tokenizers' files can be downloaded later."""
    model = settings.model
    for name, what in (
        ("pretrained_model_name_or_path", "the Anima transformer's .safetensors file"),
        ("vae", "the Qwen-Image VAE"),
        ("qwen", "the Qwen3 text encoder"),
    ):
        path = getattr(model, name)
        if path is None:
            yield f"{name} is not set: give the path of {what}"
        elif not path.exists():
            yield f"{_origin(settings, name)}: {path} does not exist; give the path of {what}"
        elif name == "pretrained_model_name_or_path" and not path.is_file():
            yield f"{_origin(settings, name)}: {path} is a folder; give {what}"
    for name in ("t5_tokenizer_dir", "qwen_tokenizer_dir"):
        folder = getattr(model, name)
        if folder is not None and folder.exists() and not folder.is_dir():
            yield f"{_origin(settings, name)}: {folder} is a file; give the folder of the tokenizer"


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
        yield f"{_origin(settings, name, prefix)}: {value} is out of range; give {allowed}"


def objective(settings: Settings) -> Iterator[str]:
    """The objective's settings fit each other; without a look at those that are out of range."""
    if any(numbers_in_range(settings)):
        return
    for prefix, name, problem in objective_problems(settings):
        yield f"{_origin(settings, name, prefix)}: {problem}"


def buckets(settings: Settings) -> Iterator[str]:
    """Bucket sides fit the model, and the limits are the right way round."""
    for i, dataset in enumerate(settings.datasets):
        prefix = f"datasets[{i}]."
        if dataset.bucket_reso_steps % SIDE_UNIT:
            name = _origin(settings, "bucket_reso_steps", prefix)
            yield f"{name}: {dataset.bucket_reso_steps} is not a multiple of {SIDE_UNIT}"
        if dataset.min_bucket_reso > dataset.max_bucket_reso:
            lower, upper = (_origin(settings, name, prefix) for name in ("min_bucket_reso", "max_bucket_reso"))
            yield f"{lower} is {dataset.min_bucket_reso}, above {upper}, which is {dataset.max_bucket_reso}"


def optimizer(settings: Settings) -> Iterator[str]:
    """The optimizer exists and takes its arguments."""
    try:
        check_optimizer(settings.optimizer)
    except SettingError as error:
        name, _, problem = str(error).partition(": ")
        yield f"{_origin(settings, name)}: {problem}"


def files_to_start_from(settings: Settings) -> Iterator[str]:
    """Adapter files and state folder are there."""
    network, resume = settings.network, settings.run.resume
    weights = network.network_weights
    if weights is not None and not weights.is_file():
        yield f"{_origin(settings, 'network_weights')}: there is no file {weights}"
    if network.dim_from_weights and weights is None:
        yield f"{_origin(settings, 'dim_from_weights')} needs network_weights: the adapter file to take them from"
    for file in network.base_weights:
        if not Path(file).is_file():
            yield f"{_origin(settings, 'base_weights')}: there is no file {file}"
    if len(network.base_weights_multiplier) > len(network.base_weights):
        yield f"{_origin(settings, 'base_weights_multiplier')}: more numbers than base_weights has files"
    if resume is not None and not resume.is_dir():
        yield f"{_origin(settings, 'resume')}: there is no folder {resume}; give a state folder (…-state)"
    elif resume is not None and not (resume / "run_state.json").is_file():
        yield f"{_origin(settings, 'resume')}: {resume} is not a state folder (…-state): it has no run_state.json"


def samples(settings: Settings) -> Iterator[str]:
    """Sampling has prompts."""
    sampling = settings.sampling
    if sampling.sample_prompts is not None:
        if not sampling.sample_prompts.is_file():
            yield f"{_origin(settings, 'sample_prompts')}: there is no file {sampling.sample_prompts}"
        return
    for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"):
        if getattr(sampling, name):
            yield f"{_origin(settings, name)} needs sample_prompts: a text file of prompts"


def output_folders(settings: Settings) -> Iterator[str]:
    """The run's folders can be made and written to: found out now rather than at the first save."""
    yield from _folder_problems(settings, "output_dir", settings.saving.output_dir)
    if settings.logging.log_with != "none":
        yield from _folder_problems(settings, "logging_dir", settings.logging.logging_dir)
    name = settings.saving.output_name
    if not name or set(name) & set('/\\:*?"<>|'):
        yield f"{_origin(settings, 'output_name')}: {name!r} cannot be a file name; folders go into output_dir"
    elif len(name.encode()) > LONGEST_NAME:
        yield f"{_origin(settings, 'output_name')}: is longer than {LONGEST_NAME} bytes"


def _folder_problems(settings: Settings, name: str, folder: Path) -> Iterator[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield f"{_origin(settings, name)}: cannot write to {folder}: {error.strerror}; give another folder"


def _origin(settings: Settings, name: str, prefix: str = "") -> str:
    """The setting as its author wrote it, with its source; `prefix` names a dataset or subset to look in first."""
    levels = [prefix, prefix.partition(".")[0] + ".", "general.", ""] if prefix else [""]
    for level in levels:
        if level + name in settings.given:
            found = settings.given[level + name]
            return f"{found.source}: {found.label}"
    return name


def _warn_of_long_context(settings: Settings) -> None:
    """More context rows than inference pads to are allowed, but worth a word."""
    if settings.model.anima_seq_len > 512:
        rows = settings.model.anima_seq_len
        logger.warning("anima_seq_len: short captions get %d context rows, where inference gives them 512", rows)


def _warn_of_rising_rate(settings: Settings) -> None:
    """Other trainers ignore the number of waves where one cosine falls, so their files may hold any."""
    schedule = settings.schedule
    waves = schedule.lr_scheduler_num_cycles
    if schedule.lr_scheduler in ("cosine", "cosine_with_min_lr") and waves is not None and waves % 1 != 0.5:
        name = _origin(settings, "lr_scheduler_num_cycles")
        logger.warning("%s: after %g waves the learning rate ends above its lowest; 0.5 falls once", name, waves)


def _warn_of_no_effect(settings: Settings) -> None:
    """One warning for each option that was set to other than its default, but does nothing beside the others."""
    options = top_level_options()
    for name, reason in _no_effect(settings):
        for key, given in settings.given.items():
            is_asked = given.value != options[name].default and given.source != DEFAULT_SOURCE
            if key.rpartition(".")[2] == name and is_asked:
                logger.warning("%s: %s does nothing: %s", given.source, given.label, reason)


def _no_effect(settings: Settings) -> Iterator[tuple[str, str]]:
    data, schedule, run, sampling = settings.data, settings.schedule, settings.run, settings.sampling
    network = settings.network
    if network.dim_from_weights:
        for name in ("network_dim", "network_alpha", "network_dropout"):
            yield name, "dim_from_weights takes it from network_weights"
    if network.network_weights is None and not network.base_weights:
        yield "allow_partial_weights", "neither network_weights nor base_weights is set"
    if not data.cache_latents:
        yield "vae_batch_size", "it is for cache_latents, which is off"
    if data.max_data_loader_n_workers == 0 and data.persistent_data_loader_workers:
        yield "persistent_data_loader_workers", "max_data_loader_n_workers is 0"
    if not schedule.lr_scheduler.startswith("cosine"):
        yield "lr_scheduler_num_cycles", f"it is for cosine schedules, and lr_scheduler is {schedule.lr_scheduler}"
    if schedule.lr_scheduler != "polynomial":
        yield "lr_scheduler_power", f"it is for polynomial, and lr_scheduler is {schedule.lr_scheduler}"
    if schedule.lr_scheduler != "cosine_with_min_lr":
        yield "lr_scheduler_min_lr_ratio", f"it is for cosine_with_min_lr, and lr_scheduler is {schedule.lr_scheduler}"
    yield from objective_without_effect(settings)
    if run.max_train_epochs is not None:
        yield "max_train_steps", "max_train_epochs is set, and wins"
    if settings.logging.log_with == "none":
        yield "logging_dir", "log_with is none"
        yield "log_prefix", "log_with is none"
    if not (sampling.sample_every_n_steps or sampling.sample_every_n_epochs or sampling.sample_at_first):
        yield "sample_prompts", "none of sample_every_n_steps, sample_every_n_epochs and sample_at_first is set"
    if settings.saving.save_state:
        yield "save_state_on_train_end", "save_state includes the end"
    if settings.saving.no_metadata:
        for name in ("training_comment", *(name for name in vars(settings.saving) if name.startswith("metadata_"))):
            yield name, "no_metadata leaves it out"
    if not settings.datasets:
        return  # their folder is missing, which is told elsewhere
    if not any(dataset.enable_bucket for dataset in settings.datasets):
        for name in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"):
            yield name, "enable_bucket is off"
    subsets = [subset for dataset in settings.datasets for subset in dataset.subsets]
    if not any(subset.shuffle_caption or subset.caption_tag_dropout_rate for subset in subsets):
        for name in ("keep_tokens", "keep_tokens_separator"):
            yield name, "no tags are shuffled or dropped"
