"""A run's settings, sorted by what it means for a resumed run when they change; see `training.saving.snapshot`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from library.options import options_of
from library.settings.groups import Settings, run_groups, settings_as_flat_dict
from library.values import is_path

_SECTION_OF_GROUP = {
    "timesteps": "objective",
    "noise": "objective",
    "loss": "objective",
    "network": "network",
    "optimizer": "optimizer",
    "schedule": "schedule",
    "ema": "ema",
}
_SECTION_OF_NAME = {
    "network_module": "topology",
    "network_dim": "topology",
    "network_alpha": "topology",
    "learning_rate": "schedule",
    "unet_lr": "schedule",
    "llm_adapter_lr": "schedule",
    "text_encoder_lr": "schedule",
    "anima_seq_len": "objective",
    "mixed_precision": "run",
    "full_bf16": "run",
    "full_fp16": "run",
    "fp8_base": "run",
    "seed": "run",
    "gradient_accumulation_steps": "run",
}
# network_args are compared as arguments, base_weights by their contents (`ModelHooks.model_identity`); what the
# adapter is saved as may change.
_OTHERWISE = ("network_args", "adapter_format", "base_weights")


def settings_sections(settings: Settings, network_arguments: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Settings by section and name. network_arguments: all that a network of this project has, else network_args."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in ("topology", "data")}
    flat = settings_as_flat_dict(settings)
    for group_name, group in run_groups().items():
        for option in options_of(group):
            section = _SECTION_OF_NAME.get(option.name, _SECTION_OF_GROUP.get(group_name))
            if section is not None and not is_path(option) and option.name not in _OTHERWISE:
                sections.setdefault(section, {})[option.name] = flat[option.name]
    for name, text in network_arguments.items():
        section = "schedule" if "_lr" in name else "network" if "dropout" in name else "topology"
        sections[section][f"network_args {name}"] = text.lower()
    for number, dataset in enumerate(flat["datasets"]):
        sections["data"].update(_flattened(dataset, f"datasets[{number}]."))
    return sections


def _flattened(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """A dataset's settings and those of its subsets, without the places of files, which may move."""
    for name, value in table.items():
        if name == "subsets":
            for number, subset in enumerate(value):
                yield from _flattened(subset, f"{prefix}subsets[{number}].")
        elif not name.endswith(("_dir", "_file")):
            yield f"{prefix}{name}", value
