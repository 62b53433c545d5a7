"""How written values of the data settings are read."""

from __future__ import annotations

import pytest

from library.data.setting_values import (
    parse_face_crop_range,
    parse_resolution,
    parse_resolutions,
    parse_separator,
)
from library.data.settings import DatasetSettings


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


@pytest.mark.parametrize("written", ["2.0,4.0", "2, 4", [2.0, 4.0], [2, 4], ["2", "4"], (2.0, 4.0)])
def test_face_crop_range(written):
    assert parse_face_crop_range(written) == (2.0, 4.0)


@pytest.mark.parametrize(
    "written", ["2.0", "2,4,6", "4,2", "0.5,2", "a,b", "nan,2", "2,inf", 2.0, [2, None], [True, 2], {"a": 1}, ","]
)
def test_what_is_no_face_crop_range(written):
    with pytest.raises(ValueError, match=r'"2\.0,4\.0": two numbers of 1 or more'):
        parse_face_crop_range(written)


@pytest.mark.parametrize(
    "written, sizes",
    [
        ([512, 1024], ((512, 512), (1024, 1024))),
        ([[832, 1216], 1024], ((832, 1216), (1024, 1024))),
        (["768", "832,1216"], ((768, 768), (832, 1216))),
        (1024, ((1024, 1024),)),
        ("832,1216", ((832, 1216),)),
    ],
)
def test_several_resolutions(written, sizes):
    assert parse_resolutions(written) == sizes
    assert DatasetSettings(resolutions=sizes).sizes == sizes


@pytest.mark.parametrize("written, message", [([512, 512], "each size once"), ([[1, 2, 3]], "1024"), (["x"], "1024")])
def test_what_are_no_resolutions(written, message):
    with pytest.raises(ValueError, match=message):
        parse_resolutions(written)


def test_two_numbers_are_one_size_and_more_are_sent_to_resolutions():
    assert parse_resolution([512, 1024]) == (512, 1024) and DatasetSettings().sizes == ((1024, 1024),)
    with pytest.raises(ValueError, match="several sizes go into resolutions"):
        parse_resolution([512, 768, 1024])
