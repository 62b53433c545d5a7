"""Metadata files: their two forms, how pictures are found, and what is wrong with them."""

from __future__ import annotations

import json

import pytest

from library.data.metadata_files import read_metadata_file
from library.data.pictures import scan_datasets
from library.data.settings import DatasetSettings, SubsetSettings
from library.errors import DataError

ENTRIES = {
    "a": {"caption": "a cat", "tags": "cat, sitting", "image_size": [128, 64]},
    "deep/b.png": {"caption": "a dog"},
    "c.png": {"tags": ["bird", "sky"]},
    "d.png": {},
}


@pytest.fixture
def folder(tmp_path, draw):
    for name in ("a", "deep/b", "c", "d"):
        draw(f"pictures/{name}")
    return tmp_path / "pictures"


def write_json(file, entries):
    file.write_text(json.dumps(entries), encoding="utf-8")
    return file


def write_lines(file, entries, key="image_path"):
    lines = [json.dumps({key: name, **entry}) for name, entry in entries.items()]
    file.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("write", [write_json, write_lines])
def test_captions_tags_and_sizes(tmp_path, folder, write):
    file = write(tmp_path / ("meta.json" if write is write_json else "meta.jsonl"), ENTRIES)
    entries = read_metadata_file(file, folder)
    assert [(each.path.relative_to(folder).as_posix(), each.size) for each in entries] == [
        ("a.png", (128, 64)),
        ("deep/b.png", None),
        ("c.png", None),
        ("d.png", None),
    ]
    assert [each.whole_caption(",") for each in entries] == ["a cat, cat, sitting", "a dog", "bird, sky", None]


def test_paths_begin_where_the_file_lies_without_image_dir_and_may_be_whole(folder):
    entries = {"deep\\b.png": {}, str(folder / "c.png"): {}}
    found = read_metadata_file(write_json(folder / "meta.json", entries), None)
    assert [each.path for each in found] == [folder / "deep" / "b.png", folder / "c.png"]


@pytest.mark.parametrize("key", ["file_name", "image", "path"])
def test_other_names_of_the_path(tmp_path, folder, key):
    (entry,) = read_metadata_file(write_lines(tmp_path / "m.jsonl", {"c.png": {}}, key), folder)
    assert entry.path == folder / "c.png"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.json", "{", r"m\.json is not valid JSON"),
        ("m.json", "[]", r"\.jsonl"),
        ("m.json", '{"a": 3}', r"m\.json: a: expected"),
        ("m.json", '{"a": {"caption": 3}}', "caption is '3', not a text"),
        ("m.json", '{"a": {"image_size": [10]}}', r"image_size is \[10\], not \[width, height\]"),
        ("m.json", '{"a": {"image_size": [10, true]}}', "image_size"),
        ("m.json", "[" * 100_000, "not valid JSON"),
        ("m.jsonl", '{"image_path": "a"}\n{', r"m\.jsonl:2 is not valid JSON"),
        ("m.jsonl", '{"caption": "x"}', r"m\.jsonl:1: expected"),
        ("m.jsonl", "3", r"m\.jsonl:1: expected"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_metadata_file(tmp_path / name, None)


def test_unreadable_files(tmp_path):
    (tmp_path / "m.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"m\.json is not UTF-8"):
        read_metadata_file(tmp_path / "m.json", None)
    with pytest.raises(DataError, match=r"gone\.json cannot be read"):
        read_metadata_file(tmp_path / "gone.json", None)


def scan(folder, file, **more):
    subset = SubsetSettings(image_dir=folder, metadata_file=file, **more)
    return scan_datasets([DatasetSettings(resolution=(64, 64), subsets=(subset,))], False, show_progress=False)


def test_a_subset_of_a_metadata_file(tmp_path, folder, caplog):
    entries = {name: ENTRIES[name] for name in ("deep/b.png", "a", "d.png")}
    pictures = scan(folder, write_json(tmp_path / "m.json", entries), class_tokens="thing")
    assert [(each.key, each.caption, each.size) for each in pictures] == [
        ("0/0/deep/b.png", "a dog", (64, 64)),
        ("0/0/a", "a cat, cat, sitting", (128, 64)),  # as the file says
        ("0/0/d.png", "thing", (64, 64)),
    ]
    assert "1 picture is not in" in caplog.text and "c.png" in caplog.text
    assert "1 picture has no caption in" in caplog.text


def test_pictures_that_are_not_there_are_named(tmp_path, folder):
    file = write_json(tmp_path / "m.json", {"a": {}, "gone": {}, "away/x.png": {}})
    with pytest.raises(DataError, match=r"names 2 pictures that are not there, of 3(?s:.)*gone\n  away/x\.png"):
        scan(folder, file)


def test_an_empty_file_is_an_error(tmp_path, folder):
    with pytest.raises(DataError, match=r"m\.json names no pictures"):
        scan(folder, write_json(tmp_path / "m.json", {}))


def test_a_picture_named_twice_is_an_error(tmp_path, folder):
    with pytest.raises(DataError, match=r"names pictures twice(?s:.)*a\.png"):
        scan(folder, write_json(tmp_path / "m.json", {"a": {}, "a.png": {}, "c": {}}))
