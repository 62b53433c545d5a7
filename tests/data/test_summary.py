"""What the metadata says of the pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.data import summary
from library.data.pictures import Picture
from library.data.settings import DatasetSettings, SubsetSettings
from library.data.summary import describe_data


def picture(subset, caption="", dataset=0, size=(64, 64), bucket=(64, 64), name=None):
    path = subset.image_dir / f"{name or caption or size}.png"
    return Picture(key="", path=path, caption=caption, size=size, bucket=bucket, dataset=dataset, subset=subset)


def test_one_dataset_in_kohyas_shapes():
    cat = SubsetSettings(image_dir=Path("/home/alice/train/10_cat"), num_repeats=10, flip_aug=True)
    dog = SubsetSettings(image_dir=Path("/home/alice/train/2_dog"), num_repeats=2)
    dataset = DatasetSettings(resolution=(96, 64), batch_size=4, enable_bucket=True, subsets=(cat, dog))
    pictures = [
        picture(cat, "1girl, smile, smile", size=(200, 100), bucket=(96, 64)),
        picture(cat, " smile ,,hat", size=(100, 100)),
        picture(dog, "smile", size=(100, 160)),
    ]
    told = json.loads(json.dumps(describe_data([dataset], pictures)))

    assert told["num_train_images"] == 10 + 10 + 2
    assert told["resolution"] == [96, 64]
    assert told["dataset_dirs"] == {
        "10_cat": {"n_repeats": 10, "img_count": 2},
        "2_dog": {"n_repeats": 2, "img_count": 1},
    }
    assert told["tag_frequency"] == {"10_cat": {"smile": 2, "1girl": 1, "hat": 1}, "2_dog": {"smile": 1}}
    assert told["bucket_info"]["buckets"] == {
        "0": {"resolution": [64, 64], "count": 12},
        "1": {"resolution": [96, 64], "count": 10},
    }
    # |2 - 1.5|, |1 - 1| and |0.625 - 1|
    assert told["bucket_info"]["mean_img_ar_error"] == pytest.approx((0.5 + 0 + 0.375) / 3)
    assert (told["batch_size_per_device"], told["enable_bucket"], told["keep_tokens"]) == (4, True, 0)
    assert "flip_aug" not in told  # the subsets differ

    (described,) = told["datasets"]
    assert (described["batch_size_per_device"], described["num_train_images"]) == (4, 22)
    assert described["bucket_info"] == told["bucket_info"]
    first, second = described["subsets"]
    assert (first["image_dir"], first["num_repeats"], first["img_count"], first["flip_aug"]) == ("10_cat", 10, 2, True)
    assert (second["image_dir"], second["img_count"], second["flip_aug"]) == ("2_dog", 1, False)
    assert "alice" not in json.dumps(told)


def test_the_same_folder_in_two_datasets_is_told_twice():
    subsets = [SubsetSettings(image_dir=Path("cat")) for _ in range(2)]
    datasets = [
        DatasetSettings(resolution=(32, 32), batch_size=8, subsets=(subsets[0],)),
        DatasetSettings(resolution=(64, 64), batch_size=2, subsets=(subsets[1],)),
    ]
    pictures = [picture(subsets[0], "a"), picture(subsets[1], "a", dataset=1), picture(subsets[1], "b", dataset=1)]
    told = describe_data(datasets, pictures)
    assert told["resolution"] == (64, 64)
    assert told["dataset_dirs"] == {
        "cat": {"n_repeats": 1, "img_count": 1},
        "cat (2)": {"n_repeats": 1, "img_count": 2},
    }
    assert told["tag_frequency"] == {"cat": {"a": 1}, "cat (2)": {"a": 1, "b": 1}}
    assert [dataset["num_train_images"] for dataset in told["datasets"]] == [1, 2]
    assert "batch_size_per_device" not in told


def test_only_short_and_the_most_frequent_tags(monkeypatch):
    monkeypatch.setattr(summary, "_MOST_TAGS", 2)
    subset = SubsetSettings(image_dir=Path("cat"), keep_tokens_separator="|||")
    captions = ["sks ||| b, c", "sks ||| b", "sks, " + "x" * 201, "sks, " + "y" * 200]
    told = describe_data([DatasetSettings(subsets=(subset,))], [picture(subset, caption) for caption in captions])
    assert told["tag_frequency"] == {"cat": {"sks": 4, "b": 2}}
    monkeypatch.setattr(summary, "_MOST_TAGS", 10)
    told = describe_data([DatasetSettings(subsets=(subset,))], [picture(subset, caption) for caption in captions])
    assert told["tag_frequency"] == {"cat": {"sks": 4, "b": 2, "c": 1, "y" * 200: 1}}


def test_a_folder_named_by_a_dot_has_its_real_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subset = SubsetSettings(image_dir=Path())
    told = describe_data([DatasetSettings(subsets=(subset,))], [picture(subset)])
    assert list(told["dataset_dirs"]) == [tmp_path.name]


def test_regularisation_pictures_and_several_sizes_are_counted_apart():
    own = SubsetSettings(image_dir=Path("3_cat"), num_repeats=3)
    reg = SubsetSettings(image_dir=Path("1_animal"), is_reg=True)
    dataset = DatasetSettings(resolutions=((64, 64), (96, 96)), subsets=(own, reg))
    pictures = [picture(own, "a, b", bucket=size) for size in dataset.sizes]
    pictures += [picture(reg, "a", bucket=size) for size in dataset.sizes]
    told = describe_data([dataset], pictures)
    assert (told["num_train_images"], told["num_reg_images"], told["resolution"]) == (6, 2, (96, 96))
    assert told["dataset_dirs"] == {"3_cat": {"n_repeats": 3, "img_count": 1}}
    assert told["reg_dataset_dirs"] == {"1_animal": {"n_repeats": 1, "img_count": 1}}
    assert told["tag_frequency"] == {"3_cat": {"a": 1, "b": 1}, "1_animal": {"a": 1}}


def test_a_metadata_file_names_a_subset_without_a_folder():
    subset = SubsetSettings(metadata_file=Path("/home/alice/captions.json"))
    told = describe_data([DatasetSettings(subsets=(subset,))], [])
    assert list(told["dataset_dirs"]) == ["captions.json"] and "alice" not in str(told)
