"""Which settings of the tokenizers' download do nothing beside the others."""

from __future__ import annotations

from collections.abc import Iterator

from library.anima_runtime.text.tokenizer_sources import MODELSCOPE, t5_sources
from library.settings.groups import Settings


def tokenizers_without_effect(settings: Settings) -> Iterator[tuple[str, str]]:
    """Option and reason, for each that does nothing."""
    tokenizers = settings.tokenizers
    of_modelscope = ["t5_tokenizer_modelscope_repo_id", "t5_tokenizer_modelscope_subfolder"]
    if not tokenizers.auto_download_t5_tokenizer:
        names = ("t5_tokenizer_repo_id", "t5_tokenizer_subfolder", "t5_tokenizer_modelscope_revision", *of_modelscope)
        for name in names:
            yield name, "auto_download_t5_tokenizer is off"
        if not tokenizers.auto_download_qwen_tokenizer:
            yield "t5_tokenizer_modelscope_fallback", "no tokenizer is downloaded"
    elif not tokenizers.t5_tokenizer_modelscope_fallback:
        if t5_sources(tokenizers)[0].hub != MODELSCOPE:
            of_modelscope.append("t5_tokenizer_modelscope_revision")
        for name in of_modelscope:
            yield name, "t5_tokenizer_modelscope_fallback is off"
