"""Tags and natural language: where they are read from, and what is said of what is missing or unused."""

from __future__ import annotations

import json

import pytest

from library.data.caption_fields import CaptionFields, read_caption
from library.data.pictures import scan_datasets
from library.data.settings import DatasetSettings, SubsetSettings
from library.errors import DataError

MIX = "tags=1, nl=1"


def scan(folder, **subset):
    (subset,) = (SubsetSettings(image_dir=folder, **subset),)
    return scan_datasets([DatasetSettings(resolution=(64, 64), subsets=(subset,))], False, show_progress=False)


def fields(pictures):
    return [(picture.path.stem, picture.caption, picture.nl) for picture in pictures]


def test_lines_are_stripped_and_the_byte_order_mark_goes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff 1girl, käse \r\n\r\nsecond\n".encode())
    assert read_caption(path) == "1girl, käse\nsecond"
    path.write_text(" \n")
    assert (read_caption(path), read_caption(tmp_path / "none.txt")) == ("", None)


def test_other_encodings_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("käse".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 \(byte 1\)"):
        read_caption(tmp_path / "a.txt")


def test_first_lines():
    assert CaptionFields("a\nb", None).first_lines() == CaptionFields("a", None)
    assert CaptionFields("", "c").first_lines() == CaptionFields("", "c")


def test_two_files(tmp_path, draw, caplog):
    for name in ("both", "tags", "nl", "none"):
        draw(name)
    for name, text in {
        "both.txt": "1girl, solo",
        "both.nl.txt": "A girl.",
        "tags.txt": "cat",
        "nl.nl.txt": "A dog.",
    }.items():
        (tmp_path / name).write_text(text)
    pictures = scan(tmp_path, caption_mix=MIX, class_tokens="thing")
    assert fields(pictures) == [
        ("both", "1girl, solo", "A girl."),
        ("nl", "", "A dog."),
        ("none", "thing", ""),
        ("tags", "cat", ""),
    ]
    told = [record.getMessage() for record in caplog.records]
    assert [message.partition(";")[0] for message in told] == [
        "1 picture has no caption file (.txt)",
        "1 picture has no tags",
        "1 picture has no natural language",
    ]
    assert '; it gets "thing", by class_tokens:' in told[0]
    assert [name in message for message, name in zip(told, ("none.png", "nl.png", "tags.png"), strict=True)] == [
        True
    ] * 3


def test_without_a_mix_natural_language_is_left_and_told(tmp_path, draw, caplog):
    draw("a", caption="cat")
    (tmp_path / "a.nl.txt").write_text("A cat.")
    assert fields(scan(tmp_path)) == [("a", "cat", "")]
    assert "1 file of natural language not used: set caption_mix:\n  a.nl.txt" in caplog.text


def test_other_ending(tmp_path, draw):
    draw("a", caption="cat")
    (tmp_path / "a.long").write_text("A cat.")
    assert fields(scan(tmp_path, caption_mix=MIX, nl_extension=".long")) == [("a", "cat", "A cat.")]


def test_one_file_with_a_mark(tmp_path, draw):
    draw("a", caption="1girl, solo ### A girl.")
    draw("b", caption="tags\nother tags\n###\nA text.\nAnother.")
    draw("c", caption="no mark")
    (tmp_path / "c.nl.txt").write_text("not this")
    subset = {"caption_mix": MIX, "nl_separator": "###"}
    assert fields(scan(tmp_path, **subset)) == [
        ("a", "1girl, solo", "A girl."),
        ("b", "tags", "A text."),
        ("c", "no mark", ""),
    ]
    drawn = scan(tmp_path, enable_wildcard=True, **subset)
    assert fields(drawn)[1] == ("b", "tags\nother tags", "A text.\nAnother.")


def test_a_second_mark_is_an_error_that_names_every_file(tmp_path, draw):
    for name in "ab":
        draw(name, caption="a ### b ### c")
    with pytest.raises(DataError, match=r"2 caption files(?s:.)*a\.txt holds nl_separator '###' 2 times(?s:.)*b\.txt"):
        scan(tmp_path, caption_mix=MIX, nl_separator="###")


@pytest.fixture
def metadata(tmp_path, draw):
    entries = {
        "a": {"caption": "A cat.", "tags": "cat, red"},
        "b": {"caption": "dog, blue", "nl": "A dog."},
        "c": {"tags": ["bird"], "nl": "A bird.", "caption": "A bird flies."},
        "d": {"caption": "one\ntwo", "tags": "x"},
        "e": {"caption": "1girl ### A girl."},
        "f": {},
    }
    for name in entries:
        draw(name)
    (tmp_path / "m.json").write_text(json.dumps(entries))
    return tmp_path / "m.json"


def test_a_metadata_file(metadata, caplog):
    pictures = scan(metadata.parent, metadata_file=metadata, caption_mix=MIX, nl_separator="###", class_tokens="thing")
    assert fields(pictures) == [
        ("a", "cat, red", "A cat."),
        ("b", "dog, blue", "A dog."),
        ("c", "bird", "A bird."),
        ("d", "x", "one"),
        ("e", "1girl", "A girl."),
        ("f", "thing", ""),
    ]
    assert "1 picture in" in caplog.text and "unused caption: caption_mix uses tags and nl:\n  c" in caplog.text


def test_a_metadata_file_without_a_mix_is_one_text_as_kohyas_scripts_have_it(metadata, caplog):
    pictures = scan(metadata.parent, metadata_file=metadata)
    assert [text for _, text, _ in fields(pictures)] == [
        "A cat., cat, red", "dog, blue", "A bird flies., bird", "one, x", "1girl ### A girl.", "",
    ]  # fmt: skip
    assert "2 pictures in" in caplog.text and "with an unused nl: set caption_mix to use it:\n  b\n  c" in caplog.text
    drawn = scan(metadata.parent, metadata_file=metadata, enable_wildcard=True)
    assert drawn[3].caption == "one, x\ntwo, x"


def test_an_nl_that_is_no_text_is_named(tmp_path, draw):
    draw("a")
    (tmp_path / "m.json").write_text('{"a": {"nl": 3}}')
    with pytest.raises(DataError, match="a: nl is '3', not a text"):
        scan(tmp_path, metadata_file=tmp_path / "m.json")
