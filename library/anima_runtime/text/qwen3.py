"""Reading the Qwen3 text encoder: a Hugging Face folder, or ComfyUI's single file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.utils.logging import disable_progress_bar

from library.anima_runtime.file_kinds import describe_tensors
from library.anima_runtime.model_files import list_misfits, load_into, match_tensors, read_header
from library.errors import ModelFileError

_WHAT = "the Qwen3 text encoder"
# Qwen3's own; a single file tells neither.
_ROPE_THETA = 1e6
_NORM_EPS = 1e-6


def load_qwen3(path: Path, dtype: torch.dtype, device: torch.device | str) -> Qwen3Model:
    """Qwen3 without its language head, frozen, in eval mode.

    All sizes come from config.json, or from the single file's shapes. Raises ModelFileError for a wrong file, and for
    missing, unknown or mis-shaped tensors by name.
    """
    if path.is_dir():
        return _load_folder(path, dtype).to(device)
    model = _plan_single_file(path)
    load_into(model, path, _own_name, dtype, device, _WHAT)
    # The rotary frequencies are in no file: they are computed here, and stay float32 whatever the dtype.
    model.rotary_emb = Qwen3RotaryEmbedding(model.config).to(device)
    return model


def check_qwen_file(path: Path) -> None:
    """ModelFileError for what is wrong by a folder's config.json and headers, or a single file's header."""
    if path.is_dir():
        _check_folder(path)
        return
    match_tensors(path, _plan_single_file(path), _own_name, _WHAT)


def plan_qwen3(path: Path) -> Qwen3Model:
    """The model of these files, without weights, on the meta device; raises what `check_qwen_file` does."""
    check_qwen_file(path)
    if not path.is_dir():
        return _plan_single_file(path)
    with torch.device("meta"):
        return Qwen3Model(Qwen3Config.from_pretrained(path, local_files_only=True))


def _own_name(name: str) -> str | None:
    """Qwen3Model's name of a tensor; the language head is left out: only hidden states are used."""
    return None if name == "lm_head.weight" else name.removeprefix("model.")


def _plan_single_file(path: Path) -> Qwen3Model:
    """The model of a single file's sizes, on the meta device."""
    header = read_header(path)
    try:
        config = _read_sizes({_own_name(name) or name: tensor.shape for name, tensor in header.items()})
    except (KeyError, IndexError, ValueError) as error:
        raise ModelFileError(f"{path} was given as {_WHAT}, and looks like {describe_tensors(header)}.") from error
    with torch.device("meta"):
        return Qwen3Model(config)


def _read_sizes(shapes: Mapping[str, tuple[int, ...]]) -> Qwen3Config:
    vocabulary, width = shapes["embed_tokens.weight"]
    head_size = shapes["layers.0.self_attn.q_norm.weight"][0]
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shapes["layers.0.mlp.gate_proj.weight"][0],
        num_hidden_layers=len({name.split(".")[1] for name in shapes if name.startswith("layers.")}),
        num_attention_heads=shapes["layers.0.self_attn.q_proj.weight"][0] // head_size,
        num_key_value_heads=shapes["layers.0.self_attn.k_proj.weight"][0] // head_size,
        head_dim=head_size,
        rms_norm_eps=_NORM_EPS,
        rope_theta=_ROPE_THETA,
    )


def _check_folder(folder: Path) -> None:
    config = _read_json(folder / "config.json")
    if config.get("model_type") != "qwen3":
        raise ModelFileError(f"{folder} was given as {_WHAT}, but its config.json says {config.get('model_type')!r}.")
    index = folder / "model.safetensors.index.json"
    shards = set(_read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    for shard in sorted(shards):
        read_header(folder / shard)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path.parent} was given as {_WHAT}, but {path.name} cannot be read: {error}") from error


def _load_folder(folder: Path, dtype: torch.dtype) -> Qwen3Model:
    _check_folder(folder)
    disable_progress_bar()  # of the second that this takes
    try:
        model, found = Qwen3Model.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            # Mis-shaped tensors are reported below, by name, together with the others.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelFileError(f"{folder}: the Qwen3 text encoder cannot be loaded: {error}") from error
    misfits = list_misfits(
        missing=sorted(found["missing_keys"]),
        unknown=sorted(found["unexpected_keys"] - {"lm_head.weight"}),
        misshaped=sorted(name for name, *_ in found["mismatched_keys"]),
    )
    if misfits:
        raise ModelFileError(f"{folder} was given as {_WHAT}, but does not fit its config.json.{misfits}")
    return model.requires_grad_(False).eval()
