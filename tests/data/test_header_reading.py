"""Headers are remembered between starts, as long as the files stay what they were."""

from __future__ import annotations

import pytest
from PIL import Image

from library.data import header_reading, picture_index
from library.data.header_reading import read_headers
from library.data.headers import PictureHeader
from library.data.picture_hashes import hash_picture, hash_pictures
from library.data.picture_index import PictureIndex
from library.data.pictures import scan_datasets
from library.data.settings import DatasetSettings, SubsetSettings
from library.data.team import ALONE


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that are opened; files count as old enough to be remembered."""
    names, original = [], header_reading.read_header
    monkeypatch.setattr(picture_index, "_TOO_YOUNG_NS", -1)
    monkeypatch.setattr(
        header_reading, "read_header", lambda path, decode: names.append(path.name) or original(path, decode)
    )
    return names


def read(paths, decode=False, **how):
    return read_headers(paths, decode, show_progress=False, index=PictureIndex(**how))


def test_a_second_start_opens_nothing(tmp_path, draw, opened):
    paths = [draw(str(number), (16 + number, 32)) for number in range(150)]
    first = read(paths)
    assert first == {path: PictureHeader((16 + number, 32), 1) for number, path in enumerate(paths)}
    assert sorted(opened) == sorted(path.name for path in paths)
    opened.clear()
    assert read(paths) == first == read(paths, trust_times=True) and opened == []


def test_a_changed_picture_is_opened_again(draw, opened):
    paths = [draw("a", (32, 32)), draw("b", (32, 32))]
    read(paths)
    opened.clear()
    draw("b", (48, 32))
    assert read(paths)[paths[1]].size == (48, 32) and opened == ["b.png"]


def test_frames_are_remembered(tmp_path, opened):
    path = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert [read([path])[path].frames for _ in range(2)] == [3, 3] and opened == ["moving.gif"]


def test_broken_pictures_are_never_remembered(draw, opened):
    path = draw("a")
    path.write_bytes(path.read_bytes()[:200])
    for _ in range(2):
        assert "a.png cannot be read" in read([path])[path]
    assert opened == ["a.png", "a.png"]


def test_a_header_does_not_stand_for_a_decoded_picture(draw, opened):
    path = draw("a")
    read([path])
    for decode in (True, True, False):
        read([path], decode)
    assert opened == ["a.png", "a.png"]


def test_headers_and_hashes_share_an_index(draw, tmp_path, opened):
    path = draw("a")
    for _ in range(2):
        read([path])
        assert hash_pictures([path], PictureIndex(), ALONE, show_progress=False) == {path: hash_picture(path)}
    assert opened == ["a.png"] and [file.name for file in (tmp_path / ".anima_cache").iterdir()] == ["pictures.json"]


def test_other_processes_write_nothing(draw, tmp_path, opened):
    read([draw("a")], writes=False)
    assert not (tmp_path / ".anima_cache").exists()


def test_a_scan_remembers_pictures_and_masks(draw, tmp_path, opened):
    """The index lies in cache_dir where that is set."""
    draw("train/a", (64, 64), "x")
    draw("masks/a", (32, 32))
    subset = SubsetSettings(image_dir=tmp_path / "train", conditioning_data_dir=tmp_path / "masks")
    dataset = DatasetSettings(resolution=(64, 64), subsets=(subset,))

    def scan(index):
        return scan_datasets([dataset], skip_broken=False, show_progress=False, index=index)

    first = scan(PictureIndex(tmp_path / "cache"))
    assert opened == ["a.png", "a.png"] and scan(PictureIndex(tmp_path / "cache")) == first == scan(None)
    assert len(opened) == 4 and not (tmp_path / "train" / ".anima_cache").exists()
