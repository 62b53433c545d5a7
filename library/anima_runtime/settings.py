"""Which model files a run uses, how text becomes context, and by what attention is computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.options import option

# What other trainers call the backends.
_OTHER_NAMES = {"sdpa": "torch", "flash_attn": "flash", "flash_attn_3": "flash3", "flash_attention": "flash"}


def parse_backend(value: Any) -> Any:
    """An attention backend by this trainer's name."""
    return _OTHER_NAMES.get(value, value) if isinstance(value, str) else value


@dataclass(frozen=True)
class ModelSettings:
    """The four model files, the length of the text context, and how attention is computed."""

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
    no_half_vae: bool = option(
        False, "Run the VAE in fp32 whatever mixed_precision says. Try it where sample pictures come out black in fp16."
    )
    anima_attention_backend: str = option(
        "auto",
        "What computes attention; the results are the same. auto: what is known to be good on your card. flash3: "
        "FlashAttention-3 for Hopper, whose package you install. One that does not work on your card is replaced by "
        "torch, with a warning that says why.",
        aliases=("attn_mode",),
        choices=("auto", "torch", "xformers", "flash", "flash3", "cudnn"),
        parse=parse_backend,
    )
    xformers: bool = option(False, "Same as anima_attention_backend = xformers.")
    xfomers: bool = option(False, "An old misspelling of xformers; false turns nothing off.")
    sdpa: bool = option(False, "Same as anima_attention_backend = torch.")
    mem_eff_attn: bool = option(False, "Same as anima_attention_backend = torch, which saves memory as well.")

    def attention_asked_for(self) -> dict[str, str]:
        """Each setting that chooses the attention backend, with the one it chooses; rules see that they agree."""
        asked = {"anima_attention_backend": self.anima_attention_backend}
        asked |= {name: "xformers" for name in ("xformers", "xfomers") if getattr(self, name)}
        asked |= {name: "torch" for name in ("sdpa", "mem_eff_attn") if getattr(self, name)}
        return {name: backend for name, backend in asked.items() if backend != "auto"}

    @property
    def attention_backend(self) -> str:
        """The attention backend that any of these settings chooses; auto where none does."""
        return next(iter(self.attention_asked_for().values()), "auto")
