"""The two tokenizers, read from local folders: Qwen3's for the text encoder, T5's for the LLM adapter's queries."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer, T5Tokenizer

from library.anima_runtime.text.tokenizer_download import Proof, download_missing
from library.anima_runtime.text.tokenizer_plans import (
    QWEN_FILES,
    T5_FILES,
    TokenizerFiles,
    TokenizerPlan,
    is_to_be_downloaded,
)
from library.errors import ModelFileError, first_ten

_SENTENCE = "a red circle, simple background"
_EXTRA_IDS = tuple(f"<extra_id_{number}>" for number in range(100))


def provide_qwen_tokenizer(plan: TokenizerPlan) -> PreTrainedTokenizerBase:
    """Qwen3's tokenizer, its files downloaded if need be; ModelFileError where that fails, or as it is loaded."""
    if is_to_be_downloaded(plan):
        download_missing(plan, Proof(load_qwen_tokenizer, complete=lambda _: None))
    return load_qwen_tokenizer(plan.folder)


def provide_t5_tokenizer(plan: TokenizerPlan, strict: bool = False) -> PreTrainedTokenizerBase:
    """T5's tokenizer in the same way. strict: see `load_t5_tokenizer`."""
    if is_to_be_downloaded(plan):
        download_missing(plan, Proof(partial(load_t5_tokenizer, strict=strict), _complete_t5))
    return load_t5_tokenizer(plan.folder, strict)


def load_qwen_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Qwen3's tokenizer; ModelFileError for missing or broken files, or for one that loses parts of a text."""
    _refuse_missing(QWEN_FILES, folder)
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
    _refuse_missing(T5_FILES, folder)
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


def _refuse_missing(files: TokenizerFiles, folder: Path) -> None:
    missing = files.missing_in(folder)
    if missing:
        raise ModelFileError(f"{folder}: {files.lacking(missing)}.")


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
