"""Where the two tokenizers lie, and whether their files must be downloaded: known before either is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import constants

from library.anima_runtime.text.tokenizer_sources import HubFolder, TokenizerSettings, qwen_sources, t5_sources
from library.errors import ModelFileError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizerFiles:
    """Which files make a tokenizer.

    needed: what a folder must hold; instead: other files that do as well. optional: downloaded where a hub has them.
    """

    what: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    instead: tuple[str, ...] = ()

    def missing_in(self, folder: Path) -> list[str]:
        """The needed files that a folder lacks."""
        if self.instead and all((folder / name).is_file() for name in self.instead):
            return []
        return [name for name in self.needed if not (folder / name).is_file()]

    def lacking(self, missing: Sequence[str]) -> str:
        """What to say of a folder that lacks these."""
        instead = f" (or else {' and '.join(self.instead)})" if self.instead else ""
        return f"the {self.what} lacks {', '.join(missing)}{instead}"


T5_FILES = TokenizerFiles(
    what="T5 tokenizer",
    needed=("config.json", "spiece.model", "tokenizer.json"),
    optional=("tokenizer_config.json", "special_tokens_map.json"),
)
QWEN_FILES = TokenizerFiles(
    what="Qwen3 tokenizer",
    needed=("tokenizer.json",),
    instead=("vocab.json", "merges.txt"),
    optional=("tokenizer_config.json",),
)


@dataclass(frozen=True)
class TokenizerPlan:
    """Where a tokenizer is read from, and what is done when its files are not there.

    sources: the places to download it from, in their order. may_download: whether the settings allow that.
    folder_option, download_option: the settings to name in messages.
    """

    folder: Path
    files: TokenizerFiles
    sources: tuple[HubFolder, ...]
    may_download: bool
    folder_option: str
    download_option: str


def plan_t5_tokenizer(folder: Path | None, settings: TokenizerSettings) -> TokenizerPlan:
    """T5's tokenizer in `folder`, or else in a cache folder that belongs to its source. Touches no file."""
    sources = t5_sources(settings)
    return TokenizerPlan(
        folder=folder or _cache_folder(sources[0]),
        files=T5_FILES,
        sources=sources,
        may_download=settings.auto_download_t5_tokenizer,
        folder_option="t5_tokenizer_dir",
        download_option="auto_download_t5_tokenizer",
    )


def plan_qwen_tokenizer(qwen_path: Path, tokenizer_dir: Path | None, settings: TokenizerSettings) -> TokenizerPlan:
    """Qwen3's tokenizer in `tokenizer_dir`, or else beside the model, or else in a cache folder. Writes nothing."""
    sources = qwen_sources(settings)
    beside = qwen_path if qwen_path.is_dir() else qwen_path.parent
    cache = _cache_folder(sources[0])
    is_cached = settings.auto_download_qwen_tokenizer or not QWEN_FILES.missing_in(cache)
    return TokenizerPlan(
        folder=tokenizer_dir or (cache if QWEN_FILES.missing_in(beside) and is_cached else beside),
        files=QWEN_FILES,
        sources=sources,
        may_download=settings.auto_download_qwen_tokenizer,
        folder_option="qwen_tokenizer_dir",
        download_option="auto_download_qwen_tokenizer",
    )


def check_tokenizer(plan: TokenizerPlan) -> None:
    """ModelFileError naming the missing files where they may not be downloaded. Loads and downloads nothing."""
    if is_to_be_downloaded(plan):
        places = ", or else ".join(map(str, plan.sources))
        logger.info("the %s will be downloaded to %s from %s", plan.files.what, plan.folder, places)


def is_to_be_downloaded(plan: TokenizerPlan) -> bool:
    """Whether files are missing that may be downloaded; ModelFileError for those that may not."""
    missing = plan.files.missing_in(plan.folder)
    if not missing or (plan.may_download and not is_offline()):
        return bool(missing)
    remedy = "unset HF_HUB_OFFLINE" if plan.may_download else f"{plan.download_option} to true"
    raise ModelFileError(
        f"{plan.folder}: {plan.files.lacking(missing)}; set {plan.folder_option} to a folder that has them, "
        f"or {remedy} to have them downloaded."
    )


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids downloads."""
    return constants.HF_HUB_OFFLINE


def _cache_folder(source: HubFolder) -> Path:
    """One folder for each source, beside what Hugging Face's own programs keep (HF_HOME)."""
    parts = [*source.repo_id.split("/"), source.revision, *source.subfolder.split("/")]
    name = "--".join(quote(part, safe="") for part in parts if part)
    return Path(constants.HF_HOME) / "sd-scripts-anima" / "tokenizers" / name
