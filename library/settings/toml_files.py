"""Reads TOML files, and knows the line of each key, which the standard reader does not tell."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import SettingError
from library.settings.entries import Entry

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KeyPath = tuple[str | int, ...]

# How the reader tells a place, and what stands there where quotes are not closed.
_LINE_AND_COLUMN = re.compile(r"(.*) \(at line (\d+), column (\d+)\)")
_LINE_END = r"'\n'"
_HEADING = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]")
_KEY = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")


@dataclass(frozen=True)
class TomlFile:
    """A parsed file; `lines` maps a key's path, such as ("datasets", 0, "resolution"), to its line from 1."""

    path: Path
    tables: Mapping[str, Any]
    lines: Mapping[KeyPath, int]

    def source(self, *key_path: str | int) -> str:
        """ "my.toml:12" for a key; the line of what encloses it where its own is not known; or the file alone."""
        for length in range(len(key_path), 0, -1):
            if key_path[:length] in self.lines:
                return f"{self.path}:{self.lines[key_path[:length]]}"
        return str(self.path)

    def entries(self, table: Mapping[str, Any], *key_path: str | int) -> list[Entry]:
        """The keys of a table at `key_path`, labelled with the heading where it is a named table."""
        heading = ".".join(part for part in key_path if isinstance(part, str))
        return [
            Entry(key, value, self.source(*key_path, key), f"{heading}.{key}" if heading else key)
            for key, value in table.items()
        ]

    def flat_entries(self) -> list[Entry]:
        """All keys, at the top and under one level of headings."""
        top = {key: value for key, value in self.tables.items() if not isinstance(value, dict)}
        headed = {key: value for key, value in self.tables.items() if isinstance(value, dict)}
        return [*self.entries(top), *(entry for key, table in headed.items() for entry in self.entries(table, key))]


def read_toml(path: Path) -> TomlFile:
    """Reads a file; SettingError names the file, and the line of a syntax error."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SettingError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "; in paths write / instead of \\, or use single quotes" if "\\" in text else ""
        if _LINE_END in str(error):
            hint = "; close the quotes before the line ends" + hint
        found = _LINE_AND_COLUMN.fullmatch(str(error))
        place, what = (f"{path}:{found[2]}", f"{found[1]} in column {found[3]}") if found else (str(path), str(error))
        raise SettingError(f"{place}: is not valid TOML: {what}{hint}") from error
    return TomlFile(path, tables, _key_lines(text))


def _key_lines(text: str) -> dict[KeyPath, int]:
    """Finds keys by the look of their lines. It need not understand every file: a key not found just has no line."""
    lines: dict[KeyPath, int] = {}
    heading: KeyPath = ()
    array_lengths: dict[KeyPath, int] = {}
    in_long_text = False
    for number, line in enumerate(text.split("\n"), start=1):
        starts_in_long_text = in_long_text
        in_long_text ^= (line.count('"""') + line.count("'''")) % 2 == 1
        if starts_in_long_text:
            continue
        if match := _HEADING.match(line):
            heading = _heading_path(_words(match[2]), match[1] == "[[", array_lengths)
            lines.setdefault(heading, number)
        elif match := _KEY.match(line):
            lines.setdefault((*heading, *_words(match[1])), number)
    return lines


def _words(dotted: str) -> list[str]:
    return [word.strip().strip("\"'") for word in dotted.split(".")]


def _heading_path(words: list[str], is_array: bool, array_lengths: dict[KeyPath, int]) -> KeyPath:
    """["datasets", "subsets"] -> ("datasets", 1, "subsets", 0): each array's latest table, a new one for [[…]]."""
    path: KeyPath = ()
    for position, word in enumerate(words):
        path = (*path, word)
        if is_array and position == len(words) - 1:
            array_lengths[path] = array_lengths.get(path, 0) + 1
        if path in array_lengths:
            path = (*path, array_lengths[path] - 1)
    return path


def toml_value(value: Any) -> str:
    """A text, number, boolean or path as TOML writes it, or a list or dictionary of them, on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{toml_value(key)} = {toml_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    text = value.as_posix() if isinstance(value, Path) else str(value)
    # JSON's escapes are TOML's, but for the one control character that JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
