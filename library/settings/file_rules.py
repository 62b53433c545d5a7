"""Rules about files and folders: those a run reads are there, those it writes can be made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from library.settings.groups import Settings
from library.settings.origins import origin
from library.training.run import LATEST

# File names end at 255 bytes; the rest is for what saves, samples, log folders and unfinished files add to the name.
LONGEST_NAME = 180


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
            yield f"{origin(settings, name)}: {path} does not exist; give the path of {what}"
        elif name == "pretrained_model_name_or_path" and not path.is_file():
            yield f"{origin(settings, name)}: {path} is a folder; give {what}"
    for name in ("t5_tokenizer_dir", "qwen_tokenizer_dir"):
        folder = getattr(model, name)
        if folder is not None and folder.exists() and not folder.is_dir():
            yield f"{origin(settings, name)}: {folder} is a file; give the folder of the tokenizer"


def files_to_start_from(settings: Settings) -> Iterator[str]:
    """Adapter files and state folder are there."""
    network, resume = settings.network, settings.run.resume
    weights = network.network_weights
    if weights is not None and not weights.is_file():
        yield f"{origin(settings, 'network_weights')}: there is no file {weights}"
    if network.dim_from_weights and weights is None:
        yield f"{origin(settings, 'dim_from_weights')} needs network_weights: the adapter file to take them from"
    for file in network.base_weights:
        if not file.is_file():
            yield f"{origin(settings, 'base_weights')}: there is no file {file}"
    if len(network.base_weights_multiplier) > len(network.base_weights):
        yield f"{origin(settings, 'base_weights_multiplier')}: more numbers than base_weights has files"
    if resume is None or resume == LATEST or settings.hub.resume_from_huggingface:
        return
    if not resume.is_dir():
        yield f"{origin(settings, 'resume')}: there is no folder {resume}; give a state folder (…-state)"
    elif not (resume / "run_state.json").is_file():
        yield f"{origin(settings, 'resume')}: {resume} is not a state folder (…-state): it has no run_state.json"


def picture_folders(settings: Settings) -> Iterator[str]:
    """Folders of pictures and of masks are there."""
    for i, dataset in enumerate(settings.datasets):
        for j, subset in enumerate(dataset.subsets):
            names = {"train_data_dir" if settings.data.train_data_dir is not None else "image_dir": subset.image_dir}
            names |= {"conditioning_data_dir": subset.conditioning_data_dir}
            for name, folder in names.items():
                if folder is not None and not folder.is_dir():
                    yield f"{origin(settings, name, f'datasets[{i}].subsets[{j}].')}: there is no folder {folder}"


def samples(settings: Settings) -> Iterator[str]:
    """Sampling has prompts."""
    sampling = settings.sampling
    if sampling.sample_prompts is not None:
        if not sampling.sample_prompts.is_file():
            yield f"{origin(settings, 'sample_prompts')}: there is no file {sampling.sample_prompts}"
        return
    for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"):
        if getattr(sampling, name):
            yield f"{origin(settings, name)} needs sample_prompts: a text file of prompts"


def output_folders(settings: Settings) -> Iterator[str]:
    """The run's folders can be made and written to: found out now rather than at the first save."""
    yield from _folder_problems(settings, "output_dir", settings.saving.output_dir)
    if settings.logging.log_with != "none":
        yield from _folder_problems(settings, "logging_dir", settings.logging.logging_dir)
    name = settings.saving.output_name
    if not name or set(name) & set('/\\:*?"<>|'):
        yield f"{origin(settings, 'output_name')}: {name!r} cannot be a file name; folders go into output_dir"
    elif len(name.encode()) > LONGEST_NAME:
        yield f"{origin(settings, 'output_name')}: is longer than {LONGEST_NAME} bytes"


def _folder_problems(settings: Settings, name: str, folder: Path) -> Iterator[str]:
    """Nothing is made yet: these settings may be those of a dry run."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    if not there.is_dir():
        yield f"{origin(settings, name)}: {folder} cannot be made, as {there} is a file; give another folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        yield f"{origin(settings, name)}: {there} may not be written into; give another folder, or change its rights"
