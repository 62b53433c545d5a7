"""What is written of a picture: its tags and its natural language, from caption files or a metadata file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.data.metadata_files import PictureMetadata
from library.data.settings import SubsetSettings
from library.data.wildcards import text_lines
from library.errors import DataError


@dataclass(frozen=True)
class CaptionFields:
    """The two fields of a caption, a variant to a line; None where nothing is written.

    tags: without caption_mix the whole caption, whatever it is. nl: natural language; None without caption_mix.
    """

    tags: str | None
    nl: str | None

    def first_lines(self) -> CaptionFields:
        """The first variant of each."""
        return CaptionFields(*(text and text.partition("\n")[0] for text in (self.tags, self.nl)))


def fields_from_files(picture: Path, subset: SubsetSettings) -> CaptionFields:
    """The fields from the files beside a picture. DataError: one is not UTF-8, or holds nl_separator twice."""
    file = picture.with_name(picture.stem + subset.caption_extension)
    tags = read_caption(file)
    if subset.caption_mix is None:
        return CaptionFields(tags, None)
    if subset.nl_separator:
        return CaptionFields(None, None) if tags is None else _split(tags, subset.nl_separator, str(file))
    return CaptionFields(tags, read_caption(picture.with_name(picture.stem + subset.nl_extension)))


def fields_from_metadata(entry: PictureMetadata, subset: SubsetSettings) -> CaptionFields:
    """The fields from what a metadata file says of a picture. DataError: a caption holds nl_separator twice.

    Without caption_mix, caption and tags are one text. With it, `nl` is natural language and so is `caption`, unless
    it is the only other text beside `nl`: then it holds the tags.
    """
    if subset.caption_mix is None:
        return CaptionFields(entry.whole_caption(subset.caption_separator), None)
    caption, tags, nl = (_lines(text) for text in (entry.caption, entry.tags, entry.nl))
    if caption and subset.nl_separator and not (tags or nl):
        return _split(caption, subset.nl_separator, f"the caption of {entry.name}")
    return CaptionFields(tags or (caption if nl else None), nl or caption)


def read_caption(file: Path) -> str | None:
    """The file's lines that hold text, stripped; None where there is no file.

    DataError: it cannot be read, or is not UTF-8 (a byte-order mark is fine).
    """
    try:
        with file.open("rb", buffering=0) as opened:
            text = opened.readall().decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"caption file {file} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"caption file {file} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    return _lines(text)


def _split(text: str, mark: str, place: str) -> CaptionFields:
    """Tags before the mark and natural language after it; without a mark everything is tags."""
    tags, *nl = text.split(mark)
    if len(nl) > 1:
        raise DataError(f"{place} holds nl_separator {mark!r} {len(nl)} times: write all tags before one mark")
    return CaptionFields(_lines(tags), _lines(nl[0]) if nl else None)


def _lines(text: str | None) -> str | None:
    return None if text is None else "\n".join(text_lines(text))
