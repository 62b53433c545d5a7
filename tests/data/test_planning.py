"""A run's pictures, found and divided; what is wrong with them is gathered."""

from __future__ import annotations

import pytest
from PIL import Image

from library.data.planning import plan_pictures
from library.data.settings import DatasetSettings, DataSettings, SubsetSettings
from library.errors import Problems


def datasets(folder, **settings):
    return (DatasetSettings(resolution=(64, 64), subsets=(SubsetSettings(image_dir=folder),), **settings),)


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a square")
    return tmp_path


def test_pictures_are_divided_as_validation_split_says(folder):
    problems = Problems()
    trained, measured = plan_pictures(DataSettings(), datasets(folder, validation_split=0.25), 1, True, problems)
    assert (len(trained), len(measured), problems.found) == (3, 1, [])


@pytest.mark.parametrize("wrong", ["folder", "split", "no datasets"])
def test_what_is_wrong_goes_to_the_problems(folder, tmp_path, wrong):
    found = {
        "folder": datasets(tmp_path / "nowhere"),
        "split": datasets(folder, validation_split=1.0),
        "no datasets": (),
    }[wrong]
    problems = Problems()
    assert plan_pictures(DataSettings(), found, 1, True, problems) == ((), ())
    assert len(problems.found) == (0 if wrong == "no datasets" else 1)
