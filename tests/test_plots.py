"""Pictures of curves: the line is where its points are."""

import numpy as np
import pytest
from PIL import Image

from library.errors import UserError
from library.plots import save_histogram, save_line_plot


def blue(path):
    """Where matplotlib's first colour, #1f77b4, is: (rows, columns) as fractions of the picture from its top left."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    rows, columns = np.nonzero((abs(pixels - [0x1F, 0x77, 0xB4]) < 8).all(axis=2))
    return rows / pixels.shape[0], columns / pixels.shape[1]


def test_a_falling_line_falls(tmp_path):
    path = tmp_path / "new folder" / "a.png"
    save_line_plot(path, "rate", "step", {"transformer": [(0, 1.0), (50, 0.5), (100, 0.0)]})
    rows, columns = blue(path)
    left, right = rows[columns < 0.2].mean(), rows[columns > 0.9].mean()
    assert left < 0.25
    assert right > 0.75
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_a_constant_rate_lies_high_above_zero(tmp_path):
    save_line_plot(tmp_path / "a.png", "rate", "step", {"rate": [(0, 1e-4), (100, 1e-4)]})
    rows, _ = blue(tmp_path / "a.png")
    assert rows.max() < 0.25


def test_a_histogram_is_high_where_values_are_many(tmp_path):
    save_histogram(tmp_path / "a.png", "t", "timestep", [0.1] * 90 + [0.9] * 10, bins=10)
    rows, columns = blue(tmp_path / "a.png")
    assert rows[columns < 0.5].min() < 0.2
    assert rows[columns > 0.5].min() > 0.7


def test_what_cannot_be_written_is_told(tmp_path):
    with pytest.raises(UserError, match="txtt: the picture cannot be written"):
        save_line_plot(tmp_path / "a.txtt", "t", "x", {"a": [(0, 1)]})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        save_histogram(tmp_path / "file" / "a.png", "t", "x", [1.0])
