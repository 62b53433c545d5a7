"""Sheets of pictures: what lies where, and how a sheet grows."""

from __future__ import annotations

from PIL import Image

from library.contact_sheets import MOST_COLUMNS, can_grow, contact_sheet, grow_sheet


def filled(colour, size=(64, 32)):
    return Image.new("RGB", size, colour)


def colours(sheet):
    """The colour in the middle of each column's first picture, of 320 x 160 pixels below 24 of words."""
    return [sheet.getpixel((8 + 160 + left, 24 + 80)) for left in range(0, sheet.width - 8, 328)]


def test_columns_stand_side_by_side_with_pictures_below_each_other():
    sheet = contact_sheet([("a", [filled("red"), filled("blue", (32, 32))]), ("b", [filled("lime"), filled("black")])])
    assert sheet.size == (8 + 2 * 328, 24 + 160 + 8 + 320 + 8)
    assert colours(sheet) == [(255, 0, 0), (0, 255, 0)]
    assert sheet.getpixel((168, 24 + 168 + 160)) == (0, 0, 255)
    assert sheet.crop((0, 0, 100, 24)).getextrema() != ((255, 255),) * 3  # words


def test_a_sheet_gains_columns_and_a_resumed_run_replaces_later_ones(tmp_path):
    path = tmp_path / "grid.png"
    assert not can_grow(path)
    grow_sheet(path, [(-1, "base", [filled("white")]), (10, "10", [filled("red")])])
    assert can_grow(path)
    grow_sheet(path, [(20, "20", [filled("lime")])])
    grow_sheet(path, [(30, "30", [filled("blue")])])
    assert colours(Image.open(path)) == [(255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)]
    grow_sheet(path, [(20, "20", [filled("black")])])
    assert colours(Image.open(path)) == [(255, 255, 255), (255, 0, 0), (0, 0, 0)]


def test_other_pictures_and_damaged_files_begin_a_new_sheet(tmp_path):
    path = tmp_path / "grid.png"
    grow_sheet(path, [(1, "1", [filled("red")])])
    assert colours(grow_sheet(path, [(2, "2", [filled("blue"), filled("blue")])])) == [(0, 0, 255)]
    path.write_bytes(path.read_bytes()[:100])
    assert not can_grow(path)
    assert colours(grow_sheet(path, [(3, "3", [filled("red")])])) == [(255, 0, 0)]
    filled("red").save(path)
    assert not can_grow(path)


def test_a_long_runs_sheet_stays_of_a_size_and_keeps_its_first_and_last(tmp_path):
    path = tmp_path / "grid.png"
    for step in range(MOST_COLUMNS + 3):
        sheet = grow_sheet(path, [(step, str(step), [filled((step, 0, 0), (8, 1))])])
    found = [sheet.getpixel((168 + left, 24 + 20))[0] for left in range(0, sheet.width - 8, 328)]
    assert len(found) <= MOST_COLUMNS and (found[0], found[-1]) == (0, MOST_COLUMNS + 2)
    assert found == sorted(set(found))
