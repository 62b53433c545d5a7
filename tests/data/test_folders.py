"""Which folders and files become subsets."""

from __future__ import annotations

import pytest

from library.data.folders import find_subsets, pictures_in
from library.data.settings import SubsetSettings
from library.errors import DataError


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_endings_in_any_case_sorted_without_hidden_files(tmp_path):
    touch(tmp_path, "b.PNG", "a.jpeg", "c.Webp", "a.txt", ".hidden.png", "d.mp4")
    touch(tmp_path / "folder.png")
    assert [path.name for path in pictures_in(tmp_path)] == ["a.jpeg", "b.PNG", "c.Webp"]


def test_each_folder_with_pictures_is_a_subset(tmp_path):
    touch(tmp_path, "root.png")
    touch(tmp_path / "10_my subject" / "more", "x.png")
    touch(tmp_path / "10_my subject", "y.png")
    touch(tmp_path / "only_text", "note.txt")
    touch(tmp_path / ".thumbnails", "x.png")
    subsets = find_subsets(tmp_path, SubsetSettings(num_repeats=3, shuffle_caption=True))
    assert [(subset.image_dir, subset.num_repeats, subset.class_tokens) for subset in subsets] == [
        (tmp_path, 3, None),
        (tmp_path / "10_my subject", 10, "my subject"),
        (tmp_path / "10_my subject" / "more", 3, None),
    ]
    assert all(subset.shuffle_caption for subset in subsets)


def test_a_name_with_no_repeats_is_refused(tmp_path):
    touch(tmp_path / "0_thing", "x.png")
    with pytest.raises(DataError, match="0_thing asks for 0 repeats"):
        find_subsets(tmp_path, SubsetSettings())


def test_class_tokens_given_win_over_the_folder_name(tmp_path):
    touch(tmp_path / "2_thing", "x.png")
    (subset,) = find_subsets(tmp_path, SubsetSettings(class_tokens="mine"))
    assert (subset.num_repeats, subset.class_tokens) == (2, "mine")


def test_linked_folders_count_once(tmp_path):
    touch(tmp_path / "train" / "a", "x.png")
    touch(tmp_path / "elsewhere", "y.png")
    (tmp_path / "train" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "a" / "loop").symlink_to(tmp_path / "train")
    names = [subset.image_dir.name for subset in find_subsets(tmp_path / "train", SubsetSettings())]
    assert names == ["a", "b"]


def test_no_pictures_and_no_folder(tmp_path):
    touch(tmp_path / "empty", "note.txt")
    with pytest.raises(DataError, match=r"no pictures in .*empty.*\.png, \.jpg"):
        find_subsets(tmp_path / "empty", SubsetSettings())
    with pytest.raises(DataError, match=r"gone does not exist"):
        find_subsets(tmp_path / "gone", SubsetSettings())
