"""Which model files a run uses, and how text becomes context."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options import option


@dataclass(frozen=True)
class ModelSettings:
    """The four model files, and the length of the text context."""

    pretrained_model_name_or_path: Path | None = option(
        None, "Anima transformer: the single .safetensors file.", aliases=("anima_transformer",)
    )
    vae: Path | None = option(
        None, "Qwen-Image VAE: a .safetensors file with the original (Wan) names, or a diffusers folder."
    )
    qwen: Path | None = option(
        None, "Qwen3-0.6B-Base text encoder: a Hugging Face folder, or ComfyUI's single file.", aliases=("qwen3",)
    )
    qwen_tokenizer_dir: Path | None = option(
        None,
        "Folder with Qwen3's tokenizer; what it lacks is downloaded. Unset: the qwen folder itself or the folder that "
        "holds the qwen file, and where that has none, a folder in the Hugging Face cache.",
    )
    t5_tokenizer_dir: Path | None = option(
        None,
        "Folder with the T5 tokenizer: config.json, spiece.model, tokenizer.json; what it lacks is downloaded. "
        "Unset: a folder in the Hugging Face cache. A root-style file must set it.",
        aliases=("t5_tokenizer_path",),
    )
    anima_seq_len: int = option(
        512, "Least number of context rows; shorter captions get zero rows up to it. Captions are never cut."
    )
