"""Captions: the form that each use of a picture gets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from library.data.caption_mix import FORMS, mix_weights
from library.data.settings import SubsetSettings
from library.data.wildcards import draw_line
from library.randomness import python_random

# Where one sentence ends and the next begins, in scripts with and without spaces.
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*")
_WIDE_ENDS = "。！？"
_ENDS = ".!?" + _WIDE_ENDS


@dataclass(frozen=True)
class Use:
    """One use of a picture: what every choice for its caption follows from.

    picture: its key. epoch, repeat, step: counted from 0. total_steps: the run's length; None where it is not known,
    and token_warmup_step holds nothing back.
    """

    seed: int
    epoch: int
    picture: str
    repeat: int
    step: int = 0
    total_steps: int | None = None

    def random(self, purpose: str) -> Random:
        """For one kind of choice."""
        return python_random(self.seed, purpose, self.epoch, self.picture, self.repeat)


def final_caption(caption: str, nl: str, subset: SubsetSettings, use: Use) -> str:
    """The caption of one use of a picture: exactly "" where it is dropped whole.

    caption: the tags, or the whole caption; nl: natural language. Otherwise prefix, fields (see `caption_mix`) and
    suffix, each varied as the subset says, joined by spaces.
    """
    if _is_dropped(subset, use):
        return ""
    fields = {"tags": caption, "nl": nl}
    varied = []
    for name in _form(fields, subset, use):
        text = _drawn(fields[name], subset, use, name)
        varied.append(_vary_tags(text, subset, use) if name == "tags" else _vary_sentences(text, subset, use))
    prefix = _drawn(subset.caption_prefix, subset, use, "prefix")
    suffix = _drawn(subset.caption_suffix, subset, use, "suffix")
    return " ".join(part for part in (prefix, _joined(varied, subset.caption_separator), suffix) if part)


def _is_dropped(subset: SubsetSettings, use: Use) -> bool:
    every = subset.caption_dropout_every_n_epochs
    if every is not None and (use.epoch + 1) % every == 0:
        return True
    return use.random("caption dropout").random() < subset.caption_dropout_rate


def _form(fields: dict[str, str], subset: SubsetSettings, use: Use) -> Sequence[str]:
    """The names of the fields to show, in order; those that are empty give way to the other."""
    if subset.caption_mix is None:
        return ["tags"]
    weights = mix_weights(subset.caption_mix)
    (form,) = use.random("caption mix").choices(list(weights), list(weights.values()))
    return [name for name in FORMS[form] if fields[name]] or [name for name in fields if fields[name]]


def _drawn(text: str, subset: SubsetSettings, use: Use, part: str) -> str:
    return draw_line(text, use.random(f"caption wildcards, {part}")) if subset.enable_wildcard else text


def _vary_tags(text: str, subset: SubsetSettings, use: Use) -> str:
    """Shuffles and drops the tags that are not kept; a text with nothing to vary stays as it was written."""
    mark, separator = subset.keep_tokens_separator, subset.caption_separator
    split_by_mark = mark != "" and mark in text
    if split_by_mark or subset.shuffle_caption or subset.caption_tag_dropout_rate > 0 or subset.token_warmup_step > 0:
        if split_by_mark:
            parts = [_tags(part, separator) for part in text.split(mark, 2)]
            first, free, last = parts if len(parts) == 3 else (*parts, [])
        else:
            tags = _tags(text, separator)
            first, free, last = tags[: subset.keep_tokens], tags[subset.keep_tokens :], []
        free = free[: _warmed_up(len(free), subset, use)]
        free = _shuffled_and_thinned(
            free, subset.shuffle_caption, subset.caption_tag_dropout_rate, use.random("caption tags")
        )
        text = f"{separator.strip()} ".join(first + free + last)
    if subset.secondary_separator and subset.secondary_separator in text:
        text = f"{separator.strip()} ".join(_tags(text, subset.secondary_separator))
    return text


def _tags(text: str, separator: str) -> list[str]:
    return [tag.strip() for tag in text.split(separator) if tag.strip()]


def _warmed_up(count: int, subset: SubsetSettings, use: Use) -> int:
    """How many of `count` tags are used: as in Kohya's scripts, growing linearly, rounded down."""
    if use.total_steps is None:
        return count
    steps = subset.token_warmup_step
    steps = steps if steps >= 1 else int(steps * use.total_steps)
    least = min(subset.token_warmup_min, count)
    return count if use.step >= steps else least + int(use.step * (count - least) / steps)


def _vary_sentences(text: str, subset: SubsetSettings, use: Use) -> str:
    if not (subset.shuffle_sentences or subset.sentence_dropout_rate > 0):
        return text
    sentences = [part.strip() for part in _BETWEEN_SENTENCES.split(text) if part.strip()]
    sentences = [part if part[-1] in _ENDS else f"{part}." for part in sentences]
    random = use.random("caption sentences")
    kept = _shuffled_and_thinned(sentences, subset.shuffle_sentences, subset.sentence_dropout_rate, random)
    return "".join(part if part[-1] in _WIDE_ENDS else f"{part} " for part in kept).strip()


def _shuffled_and_thinned(parts: Sequence[str], shuffle: bool, dropout_rate: float, random: Random) -> list[str]:
    parts = list(parts)
    if shuffle:
        random.shuffle(parts)
    return [part for part in parts if random.random() >= dropout_rate]


def _joined(parts: Iterable[str], separator: str) -> str:
    """["a, b", "It sits."] -> "a, b, It sits."; after a whole sentence there is a space alone."""
    text = ""
    for part in filter(None, parts):
        glue = "" if not text else " " if text[-1] in _ENDS else f"{separator.strip()} "
        text += glue + part
    return text
