"""What an adapter file says about how it was made.

ss_*: Kohya's keys. modelspec.*: sai_model_spec 1.0.1. sshs_*: hashes of the tensors. All values are strings.
Adapter files are shared, so nothing here holds a folder of the machine: of absolute paths the last name stays.
"""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from library.model_hashes import BLANK_HASHES

# Each holds the setting of its own name.
_FROM_SETTINGS = (
    "network_module",
    "network_dim",
    "network_alpha",
    "network_dropout",
    "scale_weight_norms",
    "learning_rate",
    "unet_lr",
    "text_encoder_lr",
    "lr_scheduler",
    "lr_warmup_steps",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "mixed_precision",
    "full_bf16",
    "full_fp16",
    "seed",
    "output_name",
    "training_comment",
    "weighting_scheme",
    "logit_mean",
    "logit_std",
    "mode_scale",
    "min_timestep",
    "max_timestep",
    "noise_offset_random_strength",
    "multires_noise_iterations",
    "multires_noise_discount",
    "ip_noise_gamma",
    "ip_noise_gamma_random_strength",
    "loss_type",
    "huber_schedule",
    "huber_c",
    "huber_scale",
)

_MODELSPEC_TEXTS = ("author", "description", "license", "tags", "trigger_phrase", "usage_hint")


def _new_session_id() -> int:
    """Not from the run's seed: it tells apart runs of the same seed."""
    return secrets.randbelow(2**32)


def _checked_out_commit() -> str:
    """The commit of this program, or "(unknown)"."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "(unknown)"
    return git.stdout.strip()


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run beside its settings.

    model: what the metadata says of the model and its objective, by whole keys.
    model_files: the model's files by Kohya's names, sd_model and vae. file_hashes: see `start_hashing`; may still grow.
    data: see `describe_data`. started_at: seconds since 1970.
    """

    model: Mapping[str, Any]
    model_files: Mapping[str, Path]
    file_hashes: Mapping[str, str]
    data: Mapping[str, Any]
    network_args: Mapping[str, str]
    num_batches_per_epoch: int
    num_epochs: int
    max_train_steps: int
    num_processes: int
    started_at: float
    session_id: int = field(default_factory=_new_session_id)
    commit_hash: str = field(default_factory=_checked_out_commit)


def adapter_metadata(
    settings: Mapping[str, Any], facts: RunFacts, step: int, epoch: int, finished_at: float
) -> dict[str, str]:
    """Metadata of an adapter saved after `step` optimizer steps, in or after `epoch` (counted from 1).

    settings: every resolved setting by name, JSON-ready and with shareable paths; ss_anima_settings holds them all.
    The hashes are blank until `fill_hashes`.
    """
    values = {
        **{name: settings[name] for name in _FROM_SETTINGS},
        **{f"{name}_name": path.name for name, path in facts.model_files.items()},
        **facts.file_hashes,
        **facts.data,
        "optimizer": _call_text(settings["optimizer_type"], settings["optimizer_args"]),
        "network_args": {name: shareable_value(text) for name, text in facts.network_args.items()},
        "num_batches_per_epoch": facts.num_batches_per_epoch,
        "num_epochs": facts.num_epochs,
        "max_train_steps": facts.max_train_steps,
        "steps": step,
        "epoch": epoch,
        "session_id": facts.session_id,
        "sd_scripts_commit_hash": facts.commit_hash,
        "training_started_at": facts.started_at,
        "training_finished_at": finished_at,
        "anima_settings": settings,
    }
    if "batch_size_per_device" in facts.data:
        batches = settings["gradient_accumulation_steps"] * facts.num_processes
        values["total_batch_size"] = facts.data["batch_size_per_device"] * batches
    told = {f"ss_{name}": value for name, value in values.items()}
    told |= {**facts.model, **_modelspec(settings, facts, finished_at), **BLANK_HASHES}
    return {key: _as_text(value) for key, value in told.items()}


def _modelspec(settings: Mapping[str, Any], facts: RunFacts, finished_at: float) -> dict[str, str]:
    width, height = facts.data["resolution"]
    texts = {f"modelspec.{name}": settings[f"metadata_{name}"] for name in _MODELSPEC_TEXTS}
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": settings["metadata_title"] or settings["output_name"],
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.date": datetime.fromtimestamp(finished_at, timezone.utc).isoformat(timespec="seconds"),
        **{key: text for key, text in texts.items() if text is not None},
    }


def shareable_path(path: Path) -> str:
    """A path for a file that others will see: a relative one as it is, of an absolute one the last name."""
    return path.name if path.anchor else path.as_posix()


def shareable_value(text: str) -> str:
    """The same of a text, where that is an absolute path."""
    path = Path(text.strip())
    return shareable_path(path) if path.is_absolute() else text


def shareable_argument(entry: str) -> str:
    """The same of the value in key=value."""
    name, separator, value = entry.partition("=")
    return f"{name}{separator}{shareable_value(value)}"


def _call_text(name: str, arguments: list[str]) -> str:
    """AdamW, ["weight_decay=0.1", "eps=1e-8"] -> "AdamW(weight_decay=0.1,eps=1e-8)"."""
    return f"{name}({','.join(arguments)})" if arguments else name


def _as_text(value: Any) -> str:
    """Dictionaries and lists as JSON, everything else as Python writes it: "True", "None", "(1024, 1024)".

    Bytes of a file name that are not UTF-8 become "?": a safetensors file could not be written with them.
    """
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    return text.encode("utf-8", "replace").decode("utf-8")
