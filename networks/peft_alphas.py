"""The alphas of PEFT's and diffusers' LoRA files: in the file's header, or in adapter_config.json beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from library.errors import ModelFileError

HEADER_KEY = "lora_adapter_metadata"
# What PEFT puts before the names of the model that it wraps.
PEFT_PREFIX = "base_model.model."


def peft_alpha(
    module: str, rank: int | None, metadata: Mapping[str, str], config: Mapping[str, Any] | None
) -> float | None:
    """The alpha of one module, such that its strength is alpha / rank; None where neither place tells it.

    module: as the file spells it. metadata: the file's header, whose JSON has its settings by component as a
    pipeline saves them ("transformer.lora_alpha"), or bare as one model does. config: adapter_config.json's contents.
    """
    module = module.removeprefix(PEFT_PREFIX)
    component, _, inside = module.partition(".")
    header = _header_settings(metadata)
    own = {key.removeprefix(f"{component}."): value for key, value in header.items() if key.startswith(f"{component}.")}
    for name, settings in ((inside, own), (module, header), (module, config or {})):
        if "lora_alpha" in settings:
            return _alpha(name, rank, settings)
    return None


def _header_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        settings = json.loads(metadata.get(HEADER_KEY, "{}"))
    except json.JSONDecodeError as error:
        raise ModelFileError(f"the header's {HEADER_KEY} is not JSON: {error}; its alphas are unknown") from error
    return settings if isinstance(settings, dict) else {}


def _alpha(module: str, rank: int | None, settings: Mapping[str, Any]) -> float:
    """alpha_pattern's keys are regular expressions for the end of a module's name; rsLoRA divides by √rank."""
    patterns = settings.get("alpha_pattern") or {}
    matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = float(next(matching, settings["lora_alpha"]))
    return alpha * math.sqrt(rank) if settings.get("use_rslora") and rank else alpha
