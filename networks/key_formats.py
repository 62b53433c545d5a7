"""How adapter tensors are named in files.

Inside the program a tensor is named by the module's dotted path in the checkpoint and the adapter's own suffix, as in
"blocks.0.self_attn.q_proj" + "lora_down.weight". ComfyUI reads "diffusion_model." before that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from library.errors import ModelFileError

COMFY_PREFIX = "diffusion_model."
ADAPTER_SUFFIXES = ("lora_down.weight", "lora_up.weight", "alpha")


def to_comfy(adapters: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{module path: {suffix: tensor}} -> {ComfyUI key: tensor}."""
    return {
        f"{COMFY_PREFIX}{path}.{suffix}": tensor
        for path, tensors in adapters.items()
        for suffix, tensor in tensors.items()
    }


def from_comfy(tensors: Mapping[str, Tensor], source: str) -> dict[str, dict[str, Tensor]]:
    """{ComfyUI key: tensor} -> {module path: {suffix: tensor}}; ModelFileError lists keys that are not ComfyUI's."""
    adapters: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, tensor in tensors.items():
        split = _split_comfy_key(key)
        if split is None:
            foreign.append(key)
        else:
            adapters.setdefault(split[0], {})[split[1]] = tensor
    if foreign or not adapters:
        raise ModelFileError(
            f"{source}: not a LoRA in ComfyUI's names (diffusion_model.<module>.lora_down.weight, …); "
            f"{len(foreign)} other keys: {first_ten(foreign) or 'the file is empty'}"
        )
    return adapters


def _split_comfy_key(key: str) -> tuple[str, str] | None:
    for suffix in ADAPTER_SUFFIXES:
        if key.startswith(COMFY_PREFIX) and key.endswith(f".{suffix}"):
            return key[len(COMFY_PREFIX) : -len(suffix) - 1], suffix
    return None


def first_ten(names: Iterable[str]) -> str:
    """The first ten names for a message."""
    listed = list(names)
    return ", ".join(listed[:10]) + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")
