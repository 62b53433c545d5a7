"""docs/root_style.md says what the tables of root-style keys say."""

from __future__ import annotations

import re
from pathlib import Path

from library.settings.root_style_keys import (
    ADAMW_DEFAULTS,
    ARGUMENTS,
    COMPUTED,
    DEFAULTS,
    LOKR_DEFAULTS,
    PRODIGY_PREFIX,
    SAME_VALUE,
    SIGNS,
    WITHOUT_COUNTERPART,
)
from library.settings.toml_files import toml_value

PAGE = (Path(__file__).parents[2] / "docs" / "root_style.md").read_text(encoding="utf-8")
INTRODUCTION, _, REST = PAGE.partition("## Keys")
KEYS, _, DEFAULTS_SECTION = REST.partition("## Defaults")


def test_every_key_is_listed():
    named = set(re.findall(r"`((?:model|dataset|training|lora|optimizer|output)\.\w+)`", KEYS))
    unmapped = {key for key in WITHOUT_COUNTERPART if "." in key}
    assert named == {*SAME_VALUE, *ARGUMENTS, *COMPUTED, *unmapped}
    assert f"`{PRODIGY_PREFIX}…`" in KEYS
    assert all(f"`[{heading}]`" in KEYS for heading in WITHOUT_COUNTERPART if "." not in heading)


def test_the_setting_of_each_key_stands_in_its_row():
    rows = [row for row in KEYS.splitlines() if row.startswith("|")]
    for key, setting in [*SAME_VALUE.items(), *((key, argument[0]) for key, argument in ARGUMENTS.items())]:
        assert any(f"`{key}`" in row and f"`{setting}`" in row for row in rows), key


def test_the_signs_are_named():
    assert set(re.findall(r"`(\w+\.\w+)`", INTRODUCTION.partition("headings alone")[0])) >= SIGNS


def test_the_defaults_are_those_in_use():
    rows = dict(re.findall(r"^\| `(\w+)`(?: of \w+)? \| `(.*)` \|$", DEFAULTS_SECTION, re.MULTILINE))
    expected = {name: toml_value(value) for name, value in DEFAULTS.items()}
    for name, defaults in (("optimizer_args", ADAMW_DEFAULTS), ("network_args", LOKR_DEFAULTS)):
        expected[name] = ", ".join(f"{key}={value}" for key, value in defaults.items())
    assert rows == expected
