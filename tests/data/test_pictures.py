"""Scanning datasets: what is found, and what each kind of bad input leads to."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.epochs import plan_epoch
from library.data.pictures import Picture, balance, scan_datasets
from library.data.settings import DatasetSettings, SubsetSettings
from library.errors import DataError, SettingError


def dataset(folder, **subset):
    return DatasetSettings(resolution=(64, 64), subsets=(SubsetSettings(image_dir=folder, **subset),))


def scan(*datasets, skip_broken=False):
    return scan_datasets(datasets, skip_broken, show_progress=False)


def test_pictures_with_captions_sizes_and_buckets(tmp_path, draw):
    draw("b", (128, 64), "one, two")
    draw("a", (64, 128), "")
    bucketed = replace(dataset(tmp_path, num_repeats=3), enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128)
    first, second = scan(replace(bucketed, bucket_reso_steps=16))
    assert (first.key, first.path.name, first.caption, first.size) == ("0/0/a.png", "a.png", "", (64, 128))
    assert (second.key, second.caption, second.size, second.repeats) == ("0/0/b.png", "one, two", (128, 64), 3)
    assert (first.bucket, second.bucket) == ((48, 80), (80, 48))  # the nearest to 1:2 with 4096 pixels at most


def test_keys_tell_datasets_and_subsets_apart(tmp_path, draw):
    draw("one/a", caption="x")
    draw("two/a", caption="x")
    both = replace(
        dataset(tmp_path / "one"),
        subsets=(SubsetSettings(image_dir=tmp_path / "one"), SubsetSettings(image_dir=tmp_path / "two")),
    )
    pictures = scan(both, dataset(tmp_path / "one"))
    assert [(picture.key, picture.dataset) for picture in pictures] == [
        ("0/0/a.png", 0),
        ("0/1/a.png", 0),
        ("1/0/a.png", 1),
    ]


def test_missing_captions_are_counted_and_named(tmp_path, draw, caplog):
    for index in range(12):
        draw(f"p{index:02}")
    draw("captioned", caption="here")
    pictures = scan(dataset(tmp_path, class_tokens="sks cat"))
    assert [picture.caption for picture in pictures] == ["here"] + ["sks cat"] * 12
    (record,) = caplog.records
    message = record.getMessage()
    assert record.levelno == logging.WARNING
    assert message.startswith('12 pictures have no caption file (.txt); they get "sks cat", by class_tokens:')
    assert "p09.png" in message and "p10.png" not in message and "and 2 more" in message


def test_caption_is_the_first_line_and_the_rest_is_told(tmp_path, draw, caplog):
    draw("a", caption="\nfirst\nsecond\n")
    (picture,) = scan(dataset(tmp_path))
    assert picture.caption == "first"
    assert "1 caption has several lines, of which the first is used" in caplog.text


def test_other_caption_ending(tmp_path, draw):
    draw("a.b", caption="not this")
    (tmp_path / "a.b.caption").write_text("this")
    (picture,) = scan(dataset(tmp_path, caption_extension=".caption"))
    assert picture.caption == "this"


def test_all_bad_captions_are_named_at_once(tmp_path, draw):
    for name in "ab":
        draw(name).with_suffix(".txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"(?s)a\.txt is not UTF-8.*b\.txt is not UTF-8"):
        scan(dataset(tmp_path))


def test_all_broken_pictures_are_named_at_once(tmp_path, draw):
    draw("good", caption="x")
    for index in range(12):
        (tmp_path / f"bad{index:02}.png").write_text("no picture")
    with pytest.raises(DataError) as caught:
        scan(dataset(tmp_path))
    message = str(caught.value)
    assert message.startswith("12 pictures cannot be read") and "skip_broken_images" in message
    assert "bad00.png" in message and "bad09.png" in message and "and 2 more" in message


def test_broken_pictures_are_left_out_when_asked(tmp_path, draw, caplog):
    path = draw("cut", caption="x")
    path.write_bytes(path.read_bytes()[:-2000])
    draw("good", caption="x")
    (picture,) = scan(dataset(tmp_path), skip_broken=True)
    assert picture.path.name == "good.png"
    assert "left out 1 picture, which cannot be read" in caplog.text and "cut.png" in caplog.text


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of the 1 pictures can be read"):
        scan(dataset(tmp_path), skip_broken=True)


def test_missing_and_empty_folders(tmp_path, draw):
    draw("deeper/a", caption="x")
    with pytest.raises(DataError, match=r"gone does not exist"):
        scan(dataset(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"no pictures directly in image_dir"):
        scan(dataset(tmp_path))
    with pytest.raises(DataError, match="no datasets"):
        scan()


def test_bucket_settings_are_checked_before_folders_are_read(tmp_path):
    wrong = replace(dataset(tmp_path / "gone"), enable_bucket=True, min_bucket_reso=256)
    with pytest.raises(SettingError, match="min_bucket_reso"):
        scan(wrong)


def test_several_resolutions_train_each_picture_at_each(tmp_path, draw):
    draw("a", (128, 64), "one")
    draw("b", (64, 64), "two")
    sized = replace(
        dataset(tmp_path), resolutions=((64, 64), (96, 96)), enable_bucket=True, min_bucket_reso=32,
        max_bucket_reso=256, bucket_reso_steps=16,
    )  # fmt: skip
    pictures = scan(sized)
    assert [(each.key, each.bucket, each.caption) for each in pictures] == [
        ("0/0/a.png@64x64", (80, 48), "one"),
        ("0/0/b.png@64x64", (64, 64), "two"),
        ("0/0/a.png@96x96", (128, 64), "one"),
        ("0/0/b.png@96x96", (96, 96), "two"),
    ]
    assert all(each.bucket[0] * each.bucket[1] <= 96 * 96 for each in pictures)


@pytest.mark.parametrize(
    ("repeats", "regular", "reg_repeats", "expected"),
    [
        (5, 3, 1, [4, 3, 3]),
        (1, 1, 1, [2]),
        (1, 2, 1, [1, 1]),
        (1, 4, 1, [1, 1]),  # the last two are left out
        (2, 3, 3, [3, 3]),
    ],
)
def test_regularisation_pictures_match_the_others(tmp_path, draw, caplog, repeats, regular, reg_repeats, expected):
    """Two pictures with `repeats` each."""
    for name in ("own/a", "own/b", *(f"reg/r{number}" for number in range(regular))):
        draw(name, caption="x")
    own = SubsetSettings(image_dir=tmp_path / "own", num_repeats=repeats)
    reg = SubsetSettings(image_dir=tmp_path / "reg", num_repeats=reg_repeats, is_reg=True)
    pictures = scan(DatasetSettings(resolution=(64, 64), subsets=(own, reg)))
    found = [each.repeats for each in pictures if each.subset.is_reg]
    assert found == expected
    assert [each.repeats for each in pictures if not each.subset.is_reg] == [repeats] * 2
    assert 0 <= sum(found) - 2 * repeats < reg_repeats
    left_out = regular - len(expected)
    assert (f"{left_out} regularisation pictures are more than needed" in caplog.text) == (left_out > 0)


def test_only_regularisation_pictures_stay_as_they_are(tmp_path, draw):
    draw("a", caption="x")
    assert [each.repeats for each in scan(dataset(tmp_path, is_reg=True, num_repeats=3))] == [3]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_every_use_comes_once_an_epoch_whatever_the_sources(drawn, batch_size, accumulation, ranks):
    """Pictures of own and regularisation subsets: what is not reported as left out is used as often as it should be."""
    pictures = [
        Picture(f"0/{i}/a.png", Path(f"{i}.png"), "", (64, 64), (64 + 16 * (i % 3), 64), 0,
                SubsetSettings(image_dir=Path(str(i)), num_repeats=repeats, is_reg=is_reg))
        for i, (repeats, is_reg) in enumerate(drawn)
    ]  # fmt: skip
    balanced = balance(pictures)
    own = sum(each.repeats for each in balanced if not each.subset.is_reg)
    reg = sum(each.repeats for each in balanced if each.subset.is_reg)
    assert own == sum(repeats for repeats, is_reg in drawn if not is_reg)
    if own and any(is_reg for _, is_reg in drawn):
        assert own <= reg < own + 9
    used = Counter()
    for step in plan_epoch(balanced, [batch_size], 1, 0, accumulation, ranks):
        for batch in (batch for rank in step.batches_of_rank for batch in rank if batch.counted):
            used.update((balanced[item.picture].key, item.repeat) for item in batch.items)
    assert used == Counter((each.key, repeat) for each in balanced for repeat in range(each.repeats))
