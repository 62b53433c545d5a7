"""Warnings about settings that are allowed together, but do nothing or may surprise."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from library.data.buckets import SIDE_UNIT, fixed_size
from library.settings.data_rules import data_without_effect
from library.settings.groups import Settings, top_level_options
from library.settings.guard_rules import guard_without_effect
from library.settings.objective_rules import objective_without_effect
from library.settings.optimizer_rules import optimizer_without_effect, warn_of_rates
from library.settings.origins import origin
from library.settings.root_style_keys import DEFAULT_SOURCE
from library.settings.tokenizer_rules import tokenizers_without_effect
from library.training.run import LATEST

logger = logging.getLogger(__name__)


def warn_of_surprises(settings: Settings) -> None:
    """Logs every such warning."""
    _warn_of_no_effect(settings)
    warn_of_rates(settings)
    _warn_of_long_context(settings)
    _warn_of_full_precision(settings)
    _warn_of_other_sizes(settings)


def _warn_of_long_context(settings: Settings) -> None:
    """More context rows than inference pads to are allowed, but worth a word."""
    if settings.model.anima_seq_len > 512:
        rows = settings.model.anima_seq_len
        name = origin(settings, "anima_seq_len")
        logger.warning("%s: short captions get %d context rows, where inference gives them 512", name, rows)


def _warn_of_full_precision(settings: Settings) -> None:
    """In 16 bits an adapter's small updates would round to nothing."""
    for name in ("full_bf16", "full_fp16"):
        if getattr(settings.run, name):
            logger.warning(
                "%s: the model runs in %s; adapter weights and optimizer state stay fp32, as small updates would be "
                "lost", origin(settings, name), settings.run.precision,
            )  # fmt: skip


def _warn_of_other_sizes(settings: Settings) -> None:
    """Without buckets a size is trained as it is, as far as its sides fit the model."""
    for i, dataset in enumerate(settings.datasets):
        name = origin(settings, "resolutions" if dataset.resolutions else "resolution", f"datasets[{i}].")
        for size in () if dataset.enable_bucket else dataset.sizes:
            if (trained := fixed_size(size)) != size:
                logger.warning(
                    "%s: %dx%d is trained at %dx%d: sides must be multiples of %d", name, *size, *trained, SIDE_UNIT
                )


def _warn_of_no_effect(settings: Settings) -> None:
    """One warning for each option that was set to other than its default, but does nothing beside the others."""
    options = top_level_options()
    for name, reason in _no_effect(settings):
        for key, given in settings.given.items():
            is_asked = given.value != options[name].default and given.source != DEFAULT_SOURCE
            if key.rpartition(".")[2] == name and is_asked:
                logger.warning("%s: %s does nothing: %s", given.source, given.label, reason)


def _no_effect(settings: Settings) -> Iterator[tuple[str, str]]:
    data, run, sampling = settings.data, settings.run, settings.sampling
    network = settings.network
    if network.dim_from_weights:
        for name in ("network_dim", "network_alpha", "network_dropout"):
            yield name, "dim_from_weights takes it from network_weights"
    if network.network_weights is None and not network.base_weights:
        yield "allow_partial_weights", "neither network_weights nor base_weights is set"
    if not data.caches_latents:
        yield "vae_batch_size", "it is for cache_latents, which is off"
    if not data.cache_latents_to_disk:
        yield "skip_cache_check", "it is for cache_latents_to_disk, which is off"
    if not (data.cache_latents_to_disk or data.cache_text_encoder_outputs_to_disk):
        yield "cache_dir", "nothing is cached to disk"
    if not data.caches_text:
        yield "text_cache_memory_gb", "it is for cache_text_encoder_outputs, which is off"
    if not data.cache_text_encoder_outputs_to_disk:
        yield "text_cache_disk_gb", "it is for cache_text_encoder_outputs_to_disk, which is off"
    if data.max_data_loader_n_workers == 0 and data.persistent_data_loader_workers:
        yield "persistent_data_loader_workers", "max_data_loader_n_workers is 0"
    yield from optimizer_without_effect(settings)
    yield from objective_without_effect(settings)
    yield from tokenizers_without_effect(settings)
    yield from data_without_effect(settings)
    yield from guard_without_effect(settings)
    if run.max_train_epochs is not None:
        yield "max_train_steps", "max_train_epochs is set, and wins"
    if run.initial_step:
        yield "initial_epoch", "initial_step is set, and wins"
    if run.resume is None:
        yield "resume_ignore_optimizer_mismatch", "resume is not set"
        yield "anima_resume_snapshot_strict", "resume is not set"
    if run.resume not in (None, LATEST):  # of the latest, `find_state` tells: there may be none yet
        for name in ("initial_step", "initial_epoch", "skip_until_initial_step"):
            yield name, "resume goes on from where the state was saved"
    elif not (run.initial_step or run.initial_epoch > 1):
        yield "skip_until_initial_step", "neither initial_step nor initial_epoch is set"
    if settings.logging.log_with == "none":
        for name in ("logging_dir", "log_prefix", "log_config", "log_tracker_config"):
            yield name, "log_with is none"
    if settings.logging.auto_start_tensorboard and not settings.logging.uses_tensorboard:
        yield "auto_start_tensorboard", f"log_with is {settings.logging.log_with}"
    if not settings.logging.shows_tensorboard:
        for name in ("tensorboard_host", "tensorboard_port", "tensorboard_logdir"):
            yield name, "TensorBoard is not started"
    if not settings.logging.uses_wandb:
        for name in ("log_tracker_name", "wandb_run_name", "wandb_api_key"):
            yield name, f"log_with is {settings.logging.log_with}"
    if not (sampling.sample_every_n_steps or sampling.sample_every_n_epochs or sampling.sample_at_first):
        yield "sample_prompts", "none of sample_every_n_steps, sample_every_n_epochs and sample_at_first is set"
    hub = settings.hub
    if hub.huggingface_repo_id is None:
        for name in (
            "huggingface_path_in_repo",
            "huggingface_repo_visibility",
            "save_state_to_huggingface",
            "async_upload",
        ):
            yield name, "huggingface_repo_id is not set"
    if run.resume is None:
        yield "resume_from_huggingface", "resume is not set"
    if settings.saving.save_n_epoch_ratio is not None:
        yield "save_every_n_epochs", "save_n_epoch_ratio is set, and wins"
    if sampling.sample_prompts is None:
        yield "sample_sampler", "sample_prompts is not set"
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
