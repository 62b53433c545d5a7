"""The settings that Kohya's ss_* metadata keys tell, as far as they go."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from library.settings.groups import by_spelling, top_level_options
from library.settings.kohya_only import FIXED, NO_EFFECT, REFUSED, is_fixed_value, is_off
from library.values import convert, is_path

_RENAMED = {"batch_size_per_device": "batch_size"}

# Modules that can build an adapter for Anima; other names are of networks for other models.
_MODULES = re.compile(r"networks\.\w+_anima|lycoris\.kohya")


def kohya_settings(metadata: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Settings by name, as a settings file would hold them, and what could not be known or used, a line each.

    A key is ss_ and a setting's name; its value is what Python's str() made of it. Keys of no setting count pictures,
    hash files and the like.
    """
    told: dict[str, Any] = {}
    untold = [f"the model files{_names(metadata)}", "the pictures: set train_data_dir or dataset_config"]
    options = by_spelling(top_level_options())
    for key, text in metadata.items():
        name = _RENAMED.get(key.removeprefix("ss_"), key.removeprefix("ss_"))
        if not key.startswith("ss_") or text in ("None", ""):
            continue
        if reason := _why_not(name, text):
            untold.append(f"{name} = {text}: {reason}")
        elif name == "optimizer":
            told |= _optimizer(text)
        elif name in options and not is_path(options[name]):
            value = _arguments(text) if name == "network_args" else text.strip("()")
            try:
                convert(options[name], value)
            except ValueError as error:
                untold.append(f"{name} = {text}: {error}")
            else:
                told[name] = value
    return told, untold


def _why_not(name: str, text: str) -> str | None:
    """Why a setting that was made cannot be made again, if it cannot."""
    if name == "network_module" and not _MODULES.fullmatch(text):
        return "a network for another model"
    if name == "base_model_version" and "anima" not in text.lower():
        return "the adapter is for another model"
    if is_off(text) or (name in FIXED and is_fixed_value(name, text)):
        return None
    return NO_EFFECT.get(name) or REFUSED.get(name) or ("not available here" if name in FIXED else None)


def _names(metadata: Mapping[str, str]) -> str:
    """What the metadata says of the model files: their names, without folders."""
    known = [metadata[key] for key in ("ss_sd_model_name", "ss_vae_name") if metadata.get(key, "None") != "None"]
    called = f" (called {', '.join(known)})" if known else ""
    return f"{called}: set pretrained_model_name_or_path, vae, qwen, t5_tokenizer_dir"


def _arguments(text: str) -> list[str]:
    """{"conv_dim": "4"} as JSON -> ["conv_dim=4"]; anything else -> []."""
    try:
        arguments = json.loads(text)
    except ValueError:
        return []
    return [f"{key}={value}" for key, value in arguments.items()] if isinstance(arguments, dict) else []


def _optimizer(text: str) -> dict[str, Any]:
    """torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99)) -> its name and its arguments.

    Kohya's scripts write the class; the names of these are looked up without their module.
    """
    name, _, arguments = text.partition("(")
    # A comma separates arguments where a name and "=" follow it; others stand inside a value.
    given = [part.strip() for part in re.split(r",(?=\s*\w+=)", arguments.removesuffix(")")) if part.strip()]
    return {"optimizer_type": name.rpartition(".")[2], "optimizer_args": given}
