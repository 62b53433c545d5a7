"""The two tokenizers, read from local folders only: Qwen3's for the text encoder, T5's for the LLM adapter's queries.

A plan says where a tokenizer lies, and how its files get there when they are missing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import constants
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer, T5Tokenizer

from library.anima_runtime.tokenizer_download import TokenizerFiles, download_missing, is_offline
from library.anima_runtime.tokenizer_sources import HubFolder, TokenizerSettings, qwen_sources, t5_sources
from library.errors import ModelFileError, first_ten

logger = logging.getLogger(__name__)

_SENTENCE = "a red circle, simple background"
_EXTRA_IDS = tuple(f"<extra_id_{number}>" for number in range(100))


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
        files=_t5_files(settings.t5_tokenizer_validate_strict),
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
    is_cached = settings.auto_download_qwen_tokenizer or not _QWEN_FILES.missing_in(cache)
    return TokenizerPlan(
        folder=tokenizer_dir or (cache if _QWEN_FILES.missing_in(beside) and is_cached else beside),
        files=_QWEN_FILES,
        sources=sources,
        may_download=settings.auto_download_qwen_tokenizer,
        folder_option="qwen_tokenizer_dir",
        download_option="auto_download_qwen_tokenizer",
    )


def check_tokenizer(plan: TokenizerPlan) -> None:
    """ModelFileError naming the missing files where they may not be downloaded. Loads and downloads nothing."""
    if _is_to_be_downloaded(plan):
        places = ", or else ".join(map(str, plan.sources))
        logger.info("the %s will be downloaded to %s from %s", plan.files.what, plan.folder, places)


def provide_tokenizer(plan: TokenizerPlan) -> Path:
    """The folder with all files of the tokenizer, downloaded if need be; ModelFileError where that fails."""
    if _is_to_be_downloaded(plan):
        download_missing(plan.files, plan.sources, plan.folder)
    return plan.folder


def _is_to_be_downloaded(plan: TokenizerPlan) -> bool:
    missing = plan.files.missing_in(plan.folder)
    if not missing or (plan.may_download and not is_offline()):
        return bool(missing)
    remedy = "unset HF_HUB_OFFLINE" if plan.may_download else f"{plan.download_option} to true"
    raise ModelFileError(
        f"{plan.folder}: {_lacks(plan.files, missing)}; set {plan.folder_option} to a folder that has them, "
        f"or {remedy} to have them downloaded."
    )


def load_qwen_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Qwen3's tokenizer; ModelFileError for missing or broken files, or for one that loses parts of a text."""
    _refuse_missing(_QWEN_FILES, folder)
    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # broken files end in errors of many types, plain Exception among them
        raise ModelFileError(f"{folder}: the Qwen3 tokenizer cannot be read: {error}") from error
    decoded = tokenizer.decode(tokenizer(_SENTENCE).input_ids)
    if decoded != _SENTENCE:
        raise ModelFileError(f"{folder}: not a Qwen3 tokenizer: {_SENTENCE!r} comes back as {decoded!r}.")
    return tokenizer


def load_t5_tokenizer(folder: Path, strict: bool = False) -> PreTrainedTokenizerBase:
    """T5's tokenizer; ModelFileError for missing files, or for one that does not end a text with `</s>` = 1.

    strict: check all that `t5_tokenizer_validate_strict` promises.
    """
    _refuse_missing(_t5_files(strict), folder)
    try:
        tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # broken files end in errors of many types, plain Exception among them
        raise ModelFileError(f"{folder}: the T5 tokenizer cannot be read: {error}") from error
    special_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    if special_ids != (0, 1, 2) or tokenizer("").input_ids != [1]:
        raise ModelFileError(
            f"{folder}: not a T5 tokenizer: pad, </s> and unk are {special_ids} instead of (0, 1, 2), "
            f"and the empty text is {tokenizer('').input_ids} instead of [1]."
        )
    failures = strict_failures(tokenizer) if strict else []
    if failures:
        raise ModelFileError(f"{folder}: t5_tokenizer_validate_strict: {'; '.join(failures)}")
    return tokenizer


def strict_failures(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What is wrong with a T5 tokenizer whose special ids are right; the real one has 32100 tokens."""
    failures = []
    count = len(tokenizer)
    vocabulary = tokenizer.get_vocab()
    if count == 0 or not vocabulary:
        failures.append("its vocabulary is empty")
    for role in ("pad", "eos", "unk"):
        if not getattr(tokenizer, f"{role}_token"):
            failures.append(f"the text of its {role} token is empty")
    missing = [token for token in _EXTRA_IDS if token not in vocabulary]
    if missing:
        failures.append(f"it lacks {first_ten(missing)}")
    ids = tokenizer(_SENTENCE).input_ids
    if len(ids) < 2:
        failures.append(f"{_SENTENCE!r} has no ids but the end's")
    if not all(0 <= number < count for number in ids):
        failures.append(f"{_SENTENCE!r} has ids outside 0 to {count - 1}: {ids}")
    return failures


def _lacks(files: TokenizerFiles, missing: Sequence[str]) -> str:
    instead = f" (or else {' and '.join(files.instead)})" if files.instead else ""
    return f"the {files.what} lacks {', '.join(missing)}{instead}"


def _refuse_missing(files: TokenizerFiles, folder: Path) -> None:
    missing = files.missing_in(folder)
    if missing:
        raise ModelFileError(f"{folder}: {_lacks(files, missing)}.")


def _cache_folder(source: HubFolder) -> Path:
    """One folder for each source, beside what Hugging Face's own programs keep (HF_HOME)."""
    parts = [*source.repo_id.split("/"), source.revision, *source.subfolder.split("/")]
    name = "--".join(quote(part, safe="") for part in parts if part)
    return Path(constants.HF_HOME) / "sd-scripts-anima" / "tokenizers" / name


def _t5_files(strict: bool) -> TokenizerFiles:
    return TokenizerFiles(
        what="T5 tokenizer",
        needed=("config.json", "spiece.model", "tokenizer.json"),
        optional=("tokenizer_config.json", "special_tokens_map.json"),
        check=partial(load_t5_tokenizer, strict=strict),
        complete=_complete_t5,
    )


def _complete_t5(folder: Path) -> None:
    """Makes config.json and tokenizer.json from spiece.model, which has all of the tokenizer in it."""
    if not (folder / "spiece.model").is_file():
        return
    if not (folder / "config.json").is_file():
        (folder / "config.json").write_text('{"model_type": "t5"}\n', encoding="utf-8")
    if not (folder / "tokenizer.json").is_file():
        T5Tokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer.save(
            str(folder / "tokenizer.json")
        )


_QWEN_FILES = TokenizerFiles(
    what="Qwen3 tokenizer",
    needed=("tokenizer.json",),
    instead=("vocab.json", "merges.txt"),
    optional=("tokenizer_config.json",),
    check=load_qwen_tokenizer,
    complete=lambda _: None,
)
