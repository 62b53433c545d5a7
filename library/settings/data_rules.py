"""Rules of the training data: which of its settings contradict each other, and which do nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from library.data.settings import SubsetSettings
from library.settings.groups import Settings


def data_problems(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Contradictions, as (prefix of a subset or "", name of the setting, what is wrong and what to do)."""
    data = settings.data
    subsets = [subset for dataset in settings.datasets for subset in dataset.subsets]
    if data.masked_loss and subsets and not any(map(_has_masks, subsets)):
        yield "", "masked_loss", "there are no masks: give folders conditioning_data_dir or alpha_mask, or turn it off"
    for name in ("reg_data_dir", "in_json"):
        if getattr(data, name) is not None and data.train_data_dir is None:
            yield "", name, "it belongs to train_data_dir; in dataset tables use is_reg and metadata_file"
    if settings.validation.save_best and settings.datasets and not _validates(settings):
        yield "", "save_best", "it needs a validation loss: set validation_split, such as 0.05, to keep pictures for it"
    for i, dataset in enumerate(settings.datasets):
        if dataset.subsets and all(subset.is_reg for subset in dataset.subsets):
            yield f"datasets[{i}].subsets[0].", "is_reg", "the dataset has no other pictures than regularisation ones"
        for j, subset in enumerate(dataset.subsets):
            for name, problem in _subset_problems(settings, subset):
                yield f"datasets[{i}].subsets[{j}].", name, problem


def _subset_problems(settings: Settings, subset: SubsetSettings) -> Iterator[tuple[str, str]]:
    data = settings.data
    if data.caches_latents:
        cached_by = "cache_latents" if data.cache_latents else "cache_latents_to_disk"
        for name in subset.redrawn_by:
            yield name, f"it changes pictures at each use, and {cached_by} keeps one form: turn one of them off"
    if subset.alpha_mask and subset.conditioning_data_dir is not None:
        yield "alpha_mask", "conditioning_data_dir gives masks as well: keep one of them"
    if data.masked_loss is False and _has_masks(subset):
        name = "alpha_mask" if subset.alpha_mask else "conditioning_data_dir"
        yield name, "it gives masks, and masked_loss = false asks for none: remove one of them"
    yield from _caption_problems(subset)


def _caption_problems(subset: SubsetSettings) -> Iterator[tuple[str, str]]:
    separators = ("caption_separator", "secondary_separator", "keep_tokens_separator", "nl_separator")
    for first, second in combinations([name for name in separators if getattr(subset, name)], 2):
        if getattr(subset, first) == getattr(subset, second):
            yield second, f"it is the same as {first}: choose another mark"
    if (
        subset.secondary_separator != subset.caption_separator
        and subset.caption_separator in subset.secondary_separator
    ):
        yield "secondary_separator", "it contains caption_separator, which would cut it: choose another mark"
    if subset.caption_mix is None:
        if subset.nl_separator:
            yield "nl_separator", "without caption_mix the mark would be trained as text: set caption_mix, or remove it"
    elif subset.metadata_file is None and not subset.nl_separator and subset.nl_extension == subset.caption_extension:
        yield "nl_extension", "it is the same as caption_extension: give natural language files of its own"


def _has_masks(subset: SubsetSettings) -> bool:
    return subset.alpha_mask or subset.conditioning_data_dir is not None


def _validates(settings: Settings) -> bool:
    return any(dataset.validation_split for dataset in settings.datasets)


def data_without_effect(settings: Settings) -> Iterator[tuple[str, str]]:
    """Settings that do nothing beside the others, as (name, why)."""
    datasets = settings.datasets
    if not any(subset.is_reg for dataset in datasets for subset in dataset.subsets):
        yield "prior_loss_weight", "no pictures are for regularisation (is_reg, reg_data_dir)"
    if datasets and all(dataset.resolutions for dataset in datasets):
        yield "resolution", "resolutions is set, and wins"
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    if subsets:
        yield from _captions_without_effect(subsets)
    if all(dataset.validation_split in (0, 1) for dataset in datasets):
        yield "validation_seed", "no dataset is split: validation_split is neither above 0 nor below 1"
    if not _validates(settings):
        for name in vars(settings.validation):
            yield name, "no pictures are kept for validation: set validation_split"


def _captions_without_effect(subsets: Sequence[SubsetSettings]) -> Iterator[tuple[str, str]]:
    def has(*names: str) -> bool:
        return any(getattr(subset, name) for subset in subsets for name in names)

    if not has("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step"):
        for name in ("keep_tokens", "keep_tokens_separator"):
            yield name, "no tags are shuffled or dropped"
    if not has("token_warmup_step"):
        yield "token_warmup_min", "token_warmup_step is 0"
    if not has("caption_mix"):
        for name in ("nl_extension", "shuffle_sentences", "sentence_dropout_rate"):
            yield name, "it is for caption_mix, which is not set"
    elif all(subset.nl_separator for subset in subsets if subset.caption_mix):
        yield "nl_extension", "nl_separator is set, and wins"
