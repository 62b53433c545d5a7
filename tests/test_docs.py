"""Pages that repeat what the code declares say the same."""

from __future__ import annotations

import re
from pathlib import Path

from library.options import options_of
from networks.arguments import NetworkArguments, read_arguments
from networks.key_formats import FORMATS
from networks.setup import _OWN_MODULES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")


def shown(default: object) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, int | float) else ""


def test_the_adapters_page_lists_every_argument_with_its_default_and_help():
    section = PAGE.partition("## Arguments")[2].partition("## Targets")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| `.*\|$", section, re.MULTILINE)]
    declared = {each.name: each for each in options_of(NetworkArguments)}
    assert [cells[0].split(",")[0].strip("`") for cells in rows] == list(declared)
    for names, default, meaning in rows:
        name, *spellings = re.findall(r"`(\w+)`", names)
        assert (default, meaning) == (shown(declared[name].default), declared[name].help)
        assert set(declared[name].aliases) <= set(spellings)
        for spelling in spellings:
            assert read_arguments({spelling: declared[name].default}, "lokr") == NetworkArguments()


def test_the_adapters_page_names_every_module_and_format_and_only_files_that_exist():
    assert all(f'"{module}"' in PAGE for module in _OWN_MODULES)
    assert all(f"| `{name}`" in PAGE for name in FORMATS)
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (ROOT / "docs" / target).is_file(), target
