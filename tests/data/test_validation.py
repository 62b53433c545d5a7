"""Which pictures a validation split takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.data.pictures import Picture
from library.data.settings import DatasetSettings, SubsetSettings
from library.data.validation import as_measured, counterparts, measured_batches, split_validation
from library.errors import DataError


def pictures_of(subset, count, dataset=0, sizes=("",)):
    return [
        Picture(f"{dataset}/0/{i:03}.png{size}", Path(f"{i:03}.png"), "", (64, 64), (64, 64), dataset, subset)
        for size in sizes
        for i in range(count)
    ]


def names(pictures):
    return {picture.path.name for picture in pictures}


@pytest.mark.parametrize(
    ("count", "split", "taken"), [(20, 0.1, 2), (5, 0.1, 1), (1, 0.5, 0), (4, 0.99, 3), (9, 0.0, 0)]
)
def test_a_share_of_each_subset_but_never_all(count, split, taken, caplog):
    caplog.set_level("INFO")
    subset = SubsetSettings(image_dir=Path("a"))
    pictures = pictures_of(subset, count)
    kept, validating = split_validation(pictures, [DatasetSettings(validation_split=split, subsets=(subset,))], seed=1)
    assert len(validating) == taken and [*kept, *validating] != [] and set(kept) | set(validating) == set(pictures)
    assert (f"validation_split keeps {taken} of {count} pictures" in caplog.text) == (taken > 0)
    assert all(picture.path.name in caplog.text for picture in validating)


def test_a_picture_goes_whole_to_one_side():
    subset = SubsetSettings(image_dir=Path("a"))
    dataset = DatasetSettings(validation_split=0.25, subsets=(subset,), resolutions=((64, 64), (96, 96)))
    kept, validating = split_validation(pictures_of(subset, 8, sizes=("@64x64", "@96x96")), [dataset], seed=1)
    assert (len(kept), len(validating)) == (12, 4) and not names(kept) & names(validating)


def test_the_choice_follows_from_the_seed():
    subset = SubsetSettings(image_dir=Path("a"))
    pictures = pictures_of(subset, 40)

    def chosen(seed, **more):
        dataset = DatasetSettings(validation_split=0.25, subsets=(subset,), **more)
        return names(split_validation(pictures, [dataset], seed)[1])

    assert chosen(1) == chosen(1) != chosen(2)
    assert chosen(1, validation_seed=7) == chosen(2, validation_seed=7) != chosen(1)


def test_more_pictures_move_few_others():
    subset = SubsetSettings(image_dir=Path("a"))
    dataset = DatasetSettings(validation_split=0.5, subsets=(subset,))
    before, after = (names(split_validation(pictures_of(subset, n), [dataset], 1)[1]) for n in (40, 44))
    assert len(before - after) <= 4


def test_regularisation_pictures_and_other_datasets_stay():
    own, regular = SubsetSettings(image_dir=Path("a")), SubsetSettings(image_dir=Path("r"), is_reg=True)
    other = SubsetSettings(image_dir=Path("b"))
    datasets = [DatasetSettings(validation_split=0.5, subsets=(own, regular)), DatasetSettings(subsets=(other,))]
    pictures = [*pictures_of(own, 4), *pictures_of(regular, 4), *pictures_of(other, 4, dataset=1)]
    _, validating = split_validation(pictures, datasets, 1)
    assert [picture.subset for picture in validating] == [own, own]


def test_a_split_of_one_is_a_dataset_of_its_own():
    own, held_out = SubsetSettings(image_dir=Path("a")), SubsetSettings(image_dir=Path("v"))
    datasets = [DatasetSettings(subsets=(own,)), DatasetSettings(validation_split=1, subsets=(held_out,))]
    pictures = [*pictures_of(own, 3), *pictures_of(held_out, 1, dataset=1)]
    kept, validating = split_validation(pictures, datasets, 1)
    assert {picture.subset for picture in kept} == {own} and [picture.subset for picture in validating] == [held_out]


def test_something_must_be_left_to_train():
    own, regular = SubsetSettings(image_dir=Path("a")), SubsetSettings(image_dir=Path("r"), is_reg=True)
    dataset = DatasetSettings(validation_split=1, subsets=(own, regular))
    with pytest.raises(DataError, match="validation_split keeps all pictures from training: lower it"):
        split_validation([*pictures_of(own, 2), *pictures_of(regular, 2)], [dataset], 1)


def test_counterparts_are_as_many_of_the_trained_and_stay_the_same():
    own, regular = SubsetSettings(image_dir=Path("a")), SubsetSettings(image_dir=Path("r"), is_reg=True)
    trained, validating = [*pictures_of(regular, 9), *pictures_of(own, 20)], pictures_of(own, 3, dataset=1)
    chosen = counterparts(trained, validating)
    assert len(chosen) == 3 and all(picture.subset is own for picture in chosen)
    assert set(counterparts(trained[::-1], validating)) == set(chosen)
    assert len(counterparts(trained[:10], validating)) == 1


def test_nothing_is_drawn_at_random_for_a_measured_picture():
    subset = SubsetSettings(
        num_repeats=10, shuffle_caption=True, caption_dropout_rate=1.0, caption_tag_dropout_rate=0.5, flip_aug=True,
        color_aug=True, random_crop=True, face_crop_aug_range=(2.0, 4.0), shuffle_sentences=True,
        sentence_dropout_rate=0.5, token_warmup_step=10,
        caption_dropout_every_n_epochs=2, caption_prefix="p", timestep_offset=50, alpha_mask=True,
    )  # fmt: skip
    (picture,) = pictures_of(subset, 1)
    measured = as_measured(picture)
    assert measured.subset == SubsetSettings(caption_prefix="p", timestep_offset=50, alpha_mask=True)
    assert (measured.key, measured.repeats) == (picture.key, 1)


def test_measured_batches_are_of_one_bucket_and_always_the_same():
    subset = SubsetSettings()
    pictures = [*pictures_of(subset, 7), *pictures_of(subset, 5, dataset=1)]
    batches = measured_batches(pictures, [2, 4], None)
    assert sorted(len(batch.items) for batch in batches) == [1, 1, 2, 2, 2, 4]
    assert sorted(item.picture for batch in batches for item in batch.items) == list(range(12))
    assert all(len({pictures[item.picture].dataset for item in batch.items}) == 1 for batch in batches)
    assert measured_batches(pictures, [2, 4], 3) == batches[:3]
