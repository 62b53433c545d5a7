"""Edits the tags in the caption files of picture folders. Shows what would change; --apply changes it.

    python tools/edit_captions.py train --trigger mychar --underscores_to_spaces --remove "bad hands" --dedupe
    python tools/edit_captions.py train --replace "1girl=1woman" "long hair=very long hair" --apply
    python tools/edit_captions.py --undo train/caption_edits_20261123_190000.json

Folders are searched as train_data_dir is. Only files that belong to a picture are touched, and of these only lines
whose tags change; every line is a caption of its own. --apply first writes a file with what was there before, which
--undo puts back. The exit code is 1 after an error, or where --undo left a caption alone because it was edited since.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.console import show, show_error
from library.data.folders import find_subsets, pictures_in
from library.data.settings import SubsetSettings
from library.errors import DataError, SettingError, UserError
from library.files import write_atomically
from tools.tag_edits import TagEdits

_UNDO_VERSION = 1


@dataclass(frozen=True)
class Edit:
    """A caption file's text before and after; line ends and a byte-order mark are part of it."""

    path: Path
    before: str
    after: str


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 after an error was shown or a caption was not put back."""
    arguments = _parse(argv)
    try:
        if arguments.undo is not None:
            return _undo(arguments.undo)
        _edit(arguments)
    except UserError as error:
        show_error(error)
        return 1
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="picture folders, searched with all folders below them")
    parser.add_argument("--trigger", help="tag, or several, to stand first, in this order, and nowhere else")
    parser.add_argument(
        "--underscores_to_spaces", action="store_true", help="long_hair -> long hair; emoticons such as ^_^ stay"
    )
    parser.add_argument("--remove", nargs="+", default=[], metavar="TAG", help="tags to take out")
    parser.add_argument("--replace", nargs="+", default=[], metavar="OLD=NEW", help="tags to call otherwise")
    parser.add_argument("--dedupe", action="store_true", help="keep the first of tags that stand there several times")
    parser.add_argument("--separator", default=",", help="what separates tags; as caption_separator")
    parser.add_argument(
        "--keep_tokens_separator", default="", help="the mark of this name in captions, if they have it"
    )
    parser.add_argument("--caption_extension", default=".txt", help="ending of caption files")
    parser.add_argument("--apply", action="store_true", help="change the files, and write an undo file")
    parser.add_argument("--undo", type=Path, metavar="FILE", help="put back what an --apply changed")
    return parser.parse_args(argv)


def _edit(arguments: argparse.Namespace) -> None:
    edits = list(_changes(arguments.folders, arguments.caption_extension, _tag_edits(arguments)))
    for edit in edits:
        show("\n".join(_difference(edit)))
    if not arguments.apply:
        show(f"{len(edits)} captions would change" + ("; --apply changes them" if edits else ""))
    elif not edits:
        show("no caption changes")
    else:
        undo_file = arguments.folders[0] / f"caption_edits_{datetime.now():%Y%m%d_%H%M%S_%f}.json"
        _apply(edits, undo_file)
        show(f"{len(edits)} captions changed; to undo: --undo {undo_file}")


def _tag_edits(arguments: argparse.Namespace) -> TagEdits:
    """SettingError: there is nothing to do, or a replacement is not OLD=NEW."""
    if not arguments.folders:
        raise SettingError("name one or more folders of pictures, or --undo FILE")
    replaced = dict(word.partition("=")[::2] for word in arguments.replace)
    for word in arguments.replace:
        if not all(part.strip() for part in word.partition("=")):
            raise SettingError(f"--replace {word!r}: write OLD=NEW; to take a tag out use --remove")
    if not arguments.separator.strip():
        raise SettingError("--separator: give the text that separates tags, such as ','")
    edits = TagEdits(
        trigger=arguments.trigger or "",
        underscores_to_spaces=arguments.underscores_to_spaces,
        removed=tuple(arguments.remove),
        replaced=replaced,
        dedupe=arguments.dedupe,
        separator=arguments.separator.strip(),
        mark=arguments.keep_tokens_separator,
    )
    if not edits.do_anything:
        raise SettingError("nothing to do: give --trigger, --underscores_to_spaces, --remove, --replace or --dedupe")
    return edits


def _changes(folders: Iterable[Path], extension: str, edits: TagEdits) -> Iterator[Edit]:
    """The caption files that would change, each once, also where two pictures share it."""
    found = (subset.image_dir for folder in folders for subset in find_subsets(folder, SubsetSettings()))
    pictures = (path for folder in dict.fromkeys(found) for path in pictures_in(folder))
    for path in dict.fromkeys(picture.with_name(picture.stem + extension) for picture in pictures):
        if path.is_file():
            before = _read(path)
            after = edits.edit_text(before)
            if after != before:
                yield Edit(path, before, after)


def _difference(edit: Edit) -> Iterator[str]:
    """The lines that change, old above new."""
    yield str(edit.path)
    for old, new in zip_longest(edit.before.splitlines(), edit.after.splitlines(), fillvalue=""):
        if old != new:
            yield from (f"  - {old}", f"  + {new}")


def _apply(edits: Sequence[Edit], undo_file: Path) -> None:
    """Writes the undo file, then each caption whole."""
    captions = {str(edit.path.resolve()): {"before": edit.before, "after": edit.after} for edit in edits}
    _write(undo_file, json.dumps({"version": _UNDO_VERSION, "captions": captions}, ensure_ascii=False, indent=1))
    for edit in edits:
        _write(edit.path, edit.after)


def _undo(undo_file: Path) -> int:
    """Puts captions back that are as --apply left them; the exit code is 1 where some are not."""
    others = []
    captions = _read_undo_file(undo_file)
    for name, texts in captions.items():
        path = Path(name)
        now = _read(path) if path.is_file() else None
        if now == texts["after"]:
            _write(path, texts["before"])
        elif now != texts["before"]:
            others.append(f"  {path}" + (" (gone)" if now is None else ""))
    show(f"{len(captions) - len(others)} captions are as they were before")
    if others:
        show("left alone, as they were edited since:\n" + "\n".join(others))
    return 1 if others else 0


def _read_undo_file(path: Path) -> Mapping[str, Mapping[str, str]]:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path} is not an undo file: {error}") from error
    if not isinstance(content, dict) or content.get("version") != _UNDO_VERSION or "captions" not in content:
        raise DataError(f"{path} is not an undo file of this program")
    return content["captions"]


def _read(path: Path) -> str:
    """The text with its line ends and byte-order mark."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, lambda file: file.write_bytes(text.encode("utf-8")))
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}; what was written before it stays") from error


if __name__ == "__main__":
    sys.exit(main())
