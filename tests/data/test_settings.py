"""How written values of the data settings are read."""

from __future__ import annotations

import pytest

from library.data.settings import parse_resolution, parse_separator


@pytest.mark.parametrize(
    "written, size",
    [
        (1024, (1024, 1024)),
        ([832, 1216], (832, 1216)),
        ("768", (768, 768)),
        ("832, 1216", (832, 1216)),
        ([64], (64, 64)),
    ],
)
def test_resolutions(written, size):
    assert parse_resolution(written) == size


@pytest.mark.parametrize("written", [15, [1, 2, 3], [], "wide", 1024.0, True, None, [512, "x"]])
def test_what_is_no_resolution(written):
    with pytest.raises(ValueError, match=r"1024, or \[width, height\]"):
        parse_resolution(written)


def test_separator():
    assert parse_separator(";") == ";"
    for wrong in ("", 3, None):
        with pytest.raises(ValueError, match="separates tags"):
            parse_separator(wrong)
