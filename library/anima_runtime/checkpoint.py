"""The Anima transformer's checkpoint: its sizes, told from its shapes, and its tensors under any known prefix."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from library.anima_runtime.config import AnimaConfig
from library.anima_runtime.file_kinds import describe_tensors
from library.anima_runtime.memory.quantised import fold_scales
from library.anima_runtime.model_files import Rename, load_into, match_tensors, read_header
from library.anima_runtime.transformer import AnimaTransformer
from library.errors import ModelFileError

_WHAT = "an Anima transformer"
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "model.", "net.", "")


def check_transformer_file(path: Path) -> AnimaConfig:
    """Tells the model's sizes from the file's header; raises ModelFileError where load_transformer would."""
    transformer, rename = _plan_transformer(path)
    match_tensors(path, transformer, rename, _WHAT)
    return transformer.config


def load_transformer(path: Path, dtype: torch.dtype, device: torch.device | str) -> AnimaTransformer:
    """The frozen transformer, with its LLM adapter, of a checkpoint with any of the known name prefixes.

    Host memory peaks at little more than the weights in `dtype` (on a GPU: at little more than nothing).
    Raises ModelFileError; see match_tensors.
    """
    transformer, rename = _plan_transformer(path)
    load_into(transformer, path, rename, dtype, device, _WHAT)
    return transformer


def _plan_transformer(path: Path) -> tuple[AnimaTransformer, Rename]:
    """The transformer of the file's sizes, on the meta device, and how the file's names become its own."""
    header = read_header(path)
    rename = strip_prefix(header)
    shapes = {rename(name) or name: tensor.shape for name, tensor in fold_scales(path, header).items()}
    try:
        config = AnimaConfig.from_shapes(shapes)
    except ModelFileError as error:
        kind = describe_tensors(header)
        raise ModelFileError(f"{path} was given as {_WHAT}, and looks like {kind}. {error}") from error
    with torch.device("meta"):
        return AnimaTransformer(config), rename


def names_in_file(names: Collection[str]) -> dict[str, str]:
    """{the model's own name: the name in a transformer file} of a file's tensors, without position buffers."""
    rename = strip_prefix(names)
    return {own: name for name in names if (own := rename(name)) is not None}


def strip_prefix(names: Collection[str]) -> Rename:
    """Renames a transformer file's tensors as the model does: without their prefix; None for position buffers."""
    prefix = next((prefix for prefix in _PREFIXES if f"{prefix}x_embedder.proj.1.weight" in names), "")

    def rename(name: str) -> str | None:
        bare = name.removeprefix(prefix)
        return None if bare.startswith("pos_embedder.") else bare

    return rename
