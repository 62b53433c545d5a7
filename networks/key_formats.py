"""How adapter tensors are named in files, read from every trainer's spelling and written in three.

Inside the program a tensor is named by its module's dotted path in the checkpoint ("blocks.0.self_attn.q_proj";
"text_encoder.layers.0.mlp.up_proj") and the adapter's own suffix ("lora_down.weight", "lokr_w1", "alpha", ...).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.errors import ModelFileError, SettingError, first_ten
from networks.adapter_types import NORM_VALUE, Adapters, adapter_kind, normalised, rank_of, tensor_shapes
from networks.module_names import TEXT_ENCODER, diffusers_name
from networks.peft_alphas import PEFT_PREFIX, peft_alpha

FORMATS = ("comfy", "kohya", "diffusers")

COMFY_PREFIX = "diffusion_model."
_COMFY_TEXT_ENCODER = "text_encoders.qwen3_06b.transformer.model."
_OLD_NORM_PREFIX = "__anima_norm__."

# Prefix in a file, what stands for it inside, and whose spelling it is. The first that leads to a module wins.
_PREFIXES = (
    (COMFY_PREFIX, "", "ComfyUI"),
    ("model.diffusion_model.", "", "ComfyUI"),
    (_COMFY_TEXT_ENCODER, TEXT_ENCODER, "ComfyUI"),
    ("lora_unet_", "", "Kohya"),
    ("lora_te_model_", "text_encoder_", "Kohya"),
    ("lora_te_", "text_encoder_", "Kohya"),
    ("lora_te1_model_", "text_encoder_", "Kohya"),
    ("lora_te1_", "text_encoder_", "Kohya"),
    ("lycoris_", "", "LyCORIS"),
    ("transformer.", "", "diffusers"),
    ("text_conditioner.", "text_conditioner.", "diffusers"),
    ("text_encoder.model.", TEXT_ENCODER, "diffusers"),
    ("text_encoder.", TEXT_ENCODER, "diffusers"),
    ("net.", "", "checkpoint names"),
    ("", "", "bare names"),
    ("model.layers.", "text_encoder.layers.", "bare names"),
    ("layers.", "text_encoder.layers.", "bare names"),
)
# ComfyUI's, Kohya's and LyCORIS' names without alpha mean a strength of 1, whatever a config beside them says.
_PEFT_SPELLINGS = ("PEFT", "diffusers", "bare names")
_OWN_SUFFIXES = (
    *("lora_down.weight", "lora_up.weight", "alpha", "dora_scale"),
    *(f"lokr_{factor}{part}" for factor in ("w1", "w2") for part in ("", "_a", "_b")),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    *("w_norm", "b_norm", "diff", "diff_b"),
)
_SUFFIXES = {
    **{suffix: suffix for suffix in _OWN_SUFFIXES},
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
}
_REFUSED_SUFFIXES = {
    **dict.fromkeys(("oft_blocks", "oft_diag", "oft_R.weight", "rescale"), "OFT, which multiplies the weight"),
    **dict.fromkeys(("lokr_t2", "hada_t1", "hada_t2", "lora_mid.weight"), "a Tucker core, for convolutions only"),
    **dict.fromkeys(
        ("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"),
        "PEFT's DoRA, which divides by another norm than ComfyUI does",
    ),
    "scalar": "LyCORIS' trained scalar, which ComfyUI does not read",
}


@dataclass(frozen=True)
class FileKey:
    """One key of a file: the module's path and the suffix inside, the module as the file spells it, whose spelling."""

    path: str
    suffix: str
    spelling: str
    format: str


@dataclass(frozen=True)
class ParsedAdapter:
    """unused: keys that belong to no module. format: whose spelling the file has ("ComfyUI", "Kohya", ...)."""

    adapters: Adapters
    unused: tuple[str, ...]
    format: str


def parse_keys(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None,
    module_names: Iterable[str],
    peft_config: Mapping[str, Any] | None = None,
) -> ParsedAdapter:
    """Reads an adapter in any known spelling; every alpha is float32 and 0-d afterwards.

    metadata: the file's header, which may hold PEFT's settings; peft_config: what adapter_config.json says.
    module_names: the model's modules, norms included; see `networks.module_names`.
    Raises ModelFileError naming the keys: two spellings of one module, an incomplete adapter, a type that ComfyUI
    does not read (OFT, Tucker cores).
    """
    found = find_keys(tensors, module_names)
    adapters: Adapters = {}
    spellings: dict[str, FileKey] = {}
    for key, file_key in found.items():
        adapters.setdefault(file_key.path, {})[file_key.suffix] = tensors[key]
        spellings[file_key.path] = file_key
    for path, own in adapters.items():
        alpha = None
        if spellings[path].format in _PEFT_SPELLINGS:
            alpha = peft_alpha(spellings[path].spelling, rank_of(tensor_shapes(own)), metadata or {}, peft_config)
        adapters[path] = normalised(path, own, alpha)
    formats = Counter(file_key.format for file_key in spellings.values())
    unused = tuple(key for key in tensors if key not in found)
    return ParsedAdapter(adapters, unused, " and ".join(formats))


def find_keys(keys: Iterable[str], module_names: Iterable[str]) -> dict[str, FileKey]:
    """The module and suffix of every key that belongs to one; see `parse_keys` for the errors."""
    modules = _spellings(module_names)
    found = {key: file_key for key in keys if (file_key := _find_key(key, modules)) is not None}
    _refuse_two_spellings(found)
    return found


def _refuse_two_spellings(found: Mapping[str, FileKey]) -> None:
    first_of_module: dict[str, str] = {}
    first_of_tensor: dict[tuple[str, str], str] = {}
    for key, file_key in found.items():
        first = first_of_module.setdefault(file_key.path, key)
        same = first_of_tensor.setdefault((file_key.path, file_key.suffix), key)
        other = first if found[first].spelling != file_key.spelling else same
        if other != key:
            raise ModelFileError(
                f"{other} and {key} are two spellings of {file_key.path}; readers keep one of them. Keep one adapter."
            )


def _spellings(module_names: Iterable[str]) -> dict[str, str]:
    """{a module's name in the checkpoint or in diffusers, with dots or underscores: its path}"""
    spellings = {}
    for path in module_names:
        for name in (path, diffusers_name(path)):
            spellings[name] = path
            spellings[name.replace(".", "_")] = path
    return spellings


def _find_key(key: str, modules: Mapping[str, str]) -> FileKey | None:
    if key.startswith(_OLD_NORM_PREFIX) and key.endswith(".weight"):
        spelling, suffix = key[: -len(".weight")], NORM_VALUE
        module = _find_module(spelling.removeprefix(_OLD_NORM_PREFIX), modules)
        return module and FileKey(module[0], suffix, spelling, "this trainer's first version")
    for refused, meaning in _REFUSED_SUFFIXES.items():
        if key.endswith(f".{refused}"):
            raise ModelFileError(f"{key} is {meaning}. It cannot be used here; train or export without it.")
    known = next((known for known in _SUFFIXES if key.endswith(f".{known}")), None)
    if known is None:
        return None
    spelling = key[: -len(known) - 1]
    bare = spelling.removeprefix(PEFT_PREFIX)
    module = _find_module(bare, modules)
    return module and FileKey(module[0], _SUFFIXES[known], spelling, module[1] if bare == spelling else "PEFT")


def _find_module(name: str, modules: Mapping[str, str]) -> tuple[str, str] | None:
    for prefix, inside, spelled_by in _PREFIXES:
        if name.startswith(prefix) and (path := modules.get(inside + name[len(prefix) :])) is not None:
            return path, spelled_by
    return None


def resolve_norm_values(adapters: Adapters, base_weight: Callable[[str], Tensor]) -> Adapters:
    """Turns absolute norm values into differences from the base.

    base_weight: gives the base's weight tensor for a norm's module path.
    """
    resolved = {}
    for path, own in adapters.items():
        own = dict(own)
        if NORM_VALUE in own:
            own["w_norm"] = own.pop(NORM_VALUE).float() - base_weight(path).detach().float().cpu()
        resolved[path] = own
    return resolved


def write_keys(adapters: Mapping[str, Mapping[str, Tensor]], file_format: str) -> dict[str, Tensor]:
    """The adapter as a file holds it, in its tensors' own dtypes; alpha is a float32 0-d tensor.

    file_format: "comfy", "kohya", or "diffusers": LoRA on the transformer only, alpha / rank multiplied into lora_B
    in float32. Raises SettingError for what diffusers cannot hold, and ModelFileError for an incomplete adapter.
    """
    if file_format not in FORMATS:
        raise SettingError(f"adapter format {file_format!r} is unknown; choose from {', '.join(FORMATS)}")
    unresolved = [path for path, own in adapters.items() if NORM_VALUE in own]
    if unresolved:
        raise ModelFileError(
            f"the norm values of {first_ten(unresolved)} are absolute, as this trainer's first version saved them: "
            "the base model is needed to turn them into differences"
        )
    if file_format == "diffusers":
        _check_diffusers_holds(adapters)
    tensors = {}
    for path, own in adapters.items():
        own = normalised(path, own)
        named = _diffusers_lora(own) if file_format == "diffusers" else own
        name = _kohya_name(path) if file_format == "kohya" else _comfy_name(path)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in named.items()}
    return tensors


def _comfy_name(path: str) -> str:
    if path.startswith(TEXT_ENCODER):
        return _COMFY_TEXT_ENCODER + path.removeprefix(TEXT_ENCODER)
    return COMFY_PREFIX + path


def _kohya_name(path: str) -> str:
    prefix = "lora_te_" if path.startswith(TEXT_ENCODER) else "lora_unet_"
    return prefix + path.removeprefix(TEXT_ENCODER).replace(".", "_")


def _diffusers_lora(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    down, up = own["lora_down.weight"], own["lora_up.weight"]
    scale = float(own["alpha"]) / down.shape[0]
    return {"lora_A.weight": down, "lora_B.weight": up if scale == 1 else up.to(torch.float32) * scale}


def _check_diffusers_holds(adapters: Mapping[str, Mapping[str, Tensor]]) -> None:
    cures = {
        "norm": "train with --no-train_norm",
        "lokr": "train with networks.lora_anima",
        "loha": "train with networks.lora_anima",
        "diff": "convert the full differences to LoRA first",
        "DoRA": "train without DoRA",
        "text encoder": "train without text-encoder adapters",
    }
    for path, own in adapters.items():
        kind = adapter_kind(path, own)
        kind = "DoRA" if "dora_scale" in own else "text encoder" if path.startswith(TEXT_ENCODER) else kind
        if kind in cures:
            raise SettingError(
                f"adapter format diffusers holds LoRA on the transformer only, and {path} has {kind}: "
                f"{cures[kind]}, or choose the format comfy or kohya."
            )
