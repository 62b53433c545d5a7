"""The two tokenizers, from local folders only: Qwen3's for the text encoder, T5's for the LLM adapter's queries."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer, T5Tokenizer

from library.errors import ModelFileError

_T5_FILES = ("config.json", "spiece.model", "tokenizer.json")
_QWEN_FILES = "tokenizer.json, or vocab.json and merges.txt"


def load_qwen_tokenizer(qwen_path: Path, tokenizer_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """Qwen3's tokenizer from `tokenizer_dir` or else from beside the model; ModelFileError where there is none."""
    folder = find_qwen_tokenizer(qwen_path, tokenizer_dir)
    try:
        return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # broken files end in errors of many types, plain Exception among them
        raise ModelFileError(f"{folder}: the Qwen3 tokenizer cannot be read: {error}") from error


def find_qwen_tokenizer(qwen_path: Path, tokenizer_dir: Path | None = None) -> Path:
    """The folder Qwen3's tokenizer is read from; ModelFileError when its files are not there. Loads nothing."""
    folder = tokenizer_dir or (qwen_path if qwen_path.is_dir() else qwen_path.parent)
    has_one_file = (folder / "tokenizer.json").is_file()
    has_two_files = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not (has_one_file or has_two_files):
        raise ModelFileError(
            f"{folder}: no Qwen3 tokenizer here. Needed: {_QWEN_FILES} (from Qwen/Qwen3-0.6B-Base); "
            "set qwen_tokenizer_dir to the folder that has them."
        )
    return folder


def load_t5_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """T5's tokenizer; ModelFileError for missing files, or for one that does not end a text with `</s>` = 1."""
    check_t5_tokenizer(folder)
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
    return tokenizer


def check_t5_tokenizer(folder: Path) -> None:
    """ModelFileError naming each missing file of T5's tokenizer. Loads nothing."""
    missing = [name for name in _T5_FILES if not (folder / name).is_file()]
    if missing:
        raise ModelFileError(
            f"{folder}: the T5 tokenizer lacks {', '.join(missing)} (from google/t5-v1_1-xxl); "
            "set t5_tokenizer_dir to a folder that has them."
        )
