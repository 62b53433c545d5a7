"""Captions: reading them, and the form each use of a picture gets."""

from __future__ import annotations

from pathlib import Path
from random import Random

from library.data.settings import SubsetSettings
from library.errors import DataError
from library.randomness import python_random


def read_caption_lines(path: Path) -> list[str]:
    """The caption file's lines that hold text, stripped. DataError: it is not UTF-8 (a byte-order mark is fine)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"caption file {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def final_caption(caption: str, subset: SubsetSettings, seed: int, epoch: int, key: str, repeat: int) -> str:
    """The caption of one use of the picture `key`: exactly "" where it is dropped whole.

    Otherwise prefix, tags (shuffled and thinned out as the subset says) and suffix, joined by spaces. Every choice
    follows from (seed, epoch, key, repeat).
    """
    if python_random(seed, "caption dropout", epoch, key, repeat).random() < subset.caption_dropout_rate:
        return ""
    varied = _vary_tags(caption, subset, python_random(seed, "caption tags", epoch, key, repeat))
    return " ".join(part for part in (subset.caption_prefix, varied, subset.caption_suffix) if part)


def _vary_tags(caption: str, subset: SubsetSettings, random: Random) -> str:
    """Shuffles and drops the tags that are not kept; a caption with nothing to vary stays as it was written."""
    split_by_mark = subset.keep_tokens_separator != "" and subset.keep_tokens_separator in caption
    if not (split_by_mark or subset.shuffle_caption or subset.caption_tag_dropout_rate > 0):
        return caption
    if split_by_mark:
        parts = [_tags(part, subset) for part in caption.split(subset.keep_tokens_separator, 2)]
        first, free, last = parts if len(parts) == 3 else (*parts, [])
    else:
        tags = _tags(caption, subset)
        first, free, last = tags[: subset.keep_tokens], tags[subset.keep_tokens :], []
    if subset.shuffle_caption:
        random.shuffle(free)
    free = [tag for tag in free if random.random() >= subset.caption_tag_dropout_rate]
    return f"{subset.caption_separator.strip()} ".join(first + free + last)


def _tags(text: str, subset: SubsetSettings) -> list[str]:
    return [tag.strip() for tag in text.split(subset.caption_separator) if tag.strip()]
