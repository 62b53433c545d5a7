"""What becomes of each kind of odd or broken caption, from its file to the text that is trained."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from library.data import caption_fields
from library.data.captions import Use, final_caption
from library.data.pictures import scan_datasets
from library.data.settings import DatasetSettings, SubsetSettings
from library.errors import DataError

BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"
# Name, content, settings of the subset, and the caption of every use.
READ = [
    ("empty", b"", {}, ""),
    ("empty, with class tokens", b"", {"class_tokens": "cat"}, ""),
    ("no file", None, {}, ""),
    ("no file, with class tokens", None, {"class_tokens": "cat"}, "cat"),
    ("no file, with prefix and suffix", None, {"caption_prefix": "a", "caption_suffix": "b"}, "a b"),
    ("a folder of that name", ..., {"class_tokens": "cat"}, "cat"),
    ("only spaces", b" \t \r\n  ", {}, ""),
    ("byte-order mark", f"{BOM}cat, dog".encode(), {}, "cat, dog"),
    ("only a byte-order mark", BOM.encode(), {}, ""),
    ("Windows line ends", b"cat\r\n\r\ndog\r\n", {}, "cat"),
    ("old Macintosh line ends", b"cat\rdog", {}, "cat"),
    ("first lines without text", b"\n \n cat ", {}, "cat"),
    ("no line end", b"cat", {}, "cat"),
    ("only separators", b",, ,", {"shuffle_caption": True}, ""),
    ("only separators, nothing to vary", b",, ,", {}, ",, ,"),
    ("empty tags", b"cat,,dog, ", {"shuffle_caption": True, "keep_tokens": 9}, "cat, dog"),
    ("more kept than there are", b"cat, dog", {"shuffle_caption": True, "keep_tokens": 99}, "cat, dog"),
    ("everything dropped", b"cat, dog", {"caption_tag_dropout_rate": 1.0}, ""),
    ("everything but the kept", b"sks, cat, dog", {"caption_tag_dropout_rate": 1.0, "keep_tokens": 1}, "sks"),
    ("whole caption dropped", b"cat", {"caption_dropout_rate": 1.0, "caption_prefix": "a"}, ""),
    ("only the mark", b"|||", {"keep_tokens_separator": "|||"}, ""),
    ("marks at both ends", b"||| cat |||", {"keep_tokens_separator": "|||"}, "cat"),
    ("three marks", b"a ||| b ||| c ||| d", {"keep_tokens_separator": "|||"}, "a, b, c ||| d"),
    ("lone braces", b"a { cat } {", {"enable_wildcard": True}, "a  cat  {"),
    ("wildcards that are off", b"a {red|blue} cat", {}, "a {red|blue} cat"),
    ("wildcards alike", b"a {red|red} cat", {"enable_wildcard": True}, "a red cat"),
    ("weights and escapes", rb"(cat:1.2), \(sitting\), <lora:x:1>", {}, r"(cat:1.2), \(sitting\), <lora:x:1>"),
    ("other scripts", "猫、座る 🐈 é".encode(), {}, "猫、座る 🐈 é"),
    ("other spaces", "\u3000猫\u00a0".encode(), {}, "猫"),
    ("very long", b"cat, " * 50_000, {"shuffle_caption": True}, ", ".join(["cat"] * 50_000)),
    ("one word of a megabyte", b"x" * 2**20, {"shuffle_caption": True}, "x" * 2**20),
    ("a page", b"<html>404</html>", {}, "<html>404</html>"),
    ("a mix of nothing", b"", {"caption_mix": "tags+nl=1"}, ""),
    ("a mix with tags alone", b"cat", {"caption_mix": "nl=1"}, "cat"),
    ("a mark without natural language", b"cat ###", {"caption_mix": "nl=1", "nl_separator": "###"}, "cat"),
    ("a mark without tags", b"### It sits.", {"caption_mix": "tags=1", "nl_separator": "###"}, "It sits."),
]

# Name, content, settings, and what the message says beside the file.
BROKEN = [
    ("UTF-16", "cat".encode("utf-16"), {}, "is not UTF-8 (byte 0): save it as UTF-8"),
    ("Latin-1", "käse".encode("latin-1"), {}, "is not UTF-8 (byte 1): save it as UTF-8"),
    ("Shift-JIS", "a, 猫".encode("shift-jis"), {}, "is not UTF-8 (byte 3): save it as UTF-8"),
    ("a picture", b"\x89PNG\r\n\x1a\n\0", {}, "is not UTF-8 (byte 0)"),
    ("cut in a letter", "猫".encode()[:2], {}, "is not UTF-8 (byte 0)"),
    ("two marks", b"a ### b ### c", {"caption_mix": "nl=1", "nl_separator": "###"}, "'###' 2 times"),
]


@pytest.fixture
def scan(tmp_path):
    """scan(content, settings) -> the picture with this caption file; None for none, ... for a folder in its place."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    caption = tmp_path / "a.txt"

    def scanned(content, settings):
        if content is ...:
            caption.mkdir()
        elif content is not None:
            caption.write_bytes(content)
        subset = SubsetSettings(image_dir=tmp_path, **settings)
        (found,) = scan_datasets([DatasetSettings(subsets=(subset,))], False, show_progress=False)
        return found

    return scanned


def ids(table):
    return [each[0] for each in table]


@pytest.mark.parametrize(("name", "content", "settings", "expected"), READ, ids=ids(READ))
def test_odd_captions_are_read(scan, name, content, settings, expected):
    picture = scan(content, settings)
    for repeat in range(3):
        assert final_caption(picture.caption, picture.nl, picture.subset, Use(1, 0, picture.key, repeat)) == expected


@pytest.mark.parametrize(("name", "content", "settings", "message"), BROKEN, ids=ids(BROKEN))
def test_broken_captions_are_named_at_the_start(scan, name, content, settings, message):
    with pytest.raises(DataError, match=rf"1 caption file cannot be read:\n.*a\.txt.*{re.escape(message)}"):
        scan(content, settings)


def test_a_caption_that_may_not_be_read_is_named(scan, monkeypatch):
    opened = caption_fields.Path.open

    def refused(self, *arguments, **more):
        if self.suffix == ".txt":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **more)

    picture = scan(b"cat", {})
    monkeypatch.setattr(caption_fields.Path, "open", refused)
    with pytest.raises(DataError, match=r"a\.txt cannot be read: .*Permission denied"):
        caption_fields.fields_from_files(picture.path, picture.subset)
