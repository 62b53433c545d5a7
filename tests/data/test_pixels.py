"""Odd pictures become the right colours; damaged ones are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.headers import read_header
from library.data.pixels import load_pixels, read_rgb
from library.errors import DataError


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    return image.getpixel((x, y))


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated 90 degrees clockwise
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    assert read_header(path).size == (20, 40)
    upright = read_rgb(path)
    assert upright.size == (20, 40)
    assert pixel(upright, 10, 5) == (255, 0, 0) and pixel(upright, 10, 35) == (0, 0, 255)


def test_jpeg_size_is_the_full_one_and_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    path = tmp_path / "turned.JPG"
    Image.new("RGB", (403, 205)).save(path, format="JPEG", exif=exif)
    assert read_header(path).size == (205, 403)
    assert read_rgb(path).size == (205, 403)


@pytest.mark.parametrize("mode, colour", [("RGBA", (255, 0, 0, 0)), ("LA", (10, 0))])
def test_transparent_becomes_white(tmp_path, mode, colour):
    path = tmp_path / "clear.png"
    Image.new(mode, (4, 4), colour).save(path)
    assert pixel(read_rgb(path)) == (255, 255, 255)


def test_half_transparent_is_mixed_with_white(tmp_path):
    path = tmp_path / "half.webp"
    Image.new("RGBA", (4, 4), (0, 0, 0, 51)).save(path, lossless=True)
    assert pixel(read_rgb(path)) == (204, 204, 204)  # 0 * 0.2 + 255 * 0.8


def test_palette_with_transparent_entry(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    path = tmp_path / "palette.png"
    image.save(path, transparency=0)
    assert pixel(read_rgb(path), 0, 0) == (255, 255, 255) and pixel(read_rgb(path), 1, 0) == (0, 0, 255)


def test_rgb_with_a_transparent_colour(tmp_path):
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    image.putpixel((1, 0), (9, 8, 7))
    path = tmp_path / "key.png"
    image.save(path, transparency=(1, 2, 3))
    assert pixel(read_rgb(path), 0, 0) == (255, 255, 255) and pixel(read_rgb(path), 1, 0) == (9, 8, 7)


def test_cmyk(tmp_path):
    path = tmp_path / "print.jpg"
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(path, quality=100)  # full cyan ink
    red, green, blue = pixel(read_rgb(path), 8, 8)
    assert red <= 4 and green >= 251 and blue >= 251


@pytest.mark.parametrize("value, expected", [(0, 0), (257 * 200, 200), (65535, 255)])
def test_sixteen_bit_grey(tmp_path, value, expected):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), value, np.uint16)).save(path)
    assert Image.open(path).mode.startswith("I")
    assert pixel(read_rgb(path)) == (expected,) * 3


def test_turned_sixteen_bit_grey(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.zeros((2, 4), np.uint16)
    values[0, 0] = 65535
    path = tmp_path / "deep.png"
    Image.fromarray(values).save(path, exif=exif)
    upright = np.asarray(read_rgb(path))
    assert upright.shape == (4, 2, 3)
    assert upright[..., 0].argmax() == 1  # the first pixel is now at the top right


def test_grey_and_one_bit(tmp_path):
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    Image.new("1", (4, 4), 1).save(tmp_path / "bit.png")
    assert pixel(read_rgb(tmp_path / "grey.png")) == (77, 77, 77)
    assert pixel(read_rgb(tmp_path / "bit.png")) == (255, 255, 255)


@pytest.mark.parametrize("size", [(1, 100), (100, 1)])
def test_one_pixel_wide(tmp_path, size):
    path = tmp_path / "thin.png"
    Image.new("RGB", size, (0, 255, 0)).save(path)
    pixels_CHW = load_pixels(path, (32, 16), flipped=False)
    assert pixels_CHW.shape == (3, 16, 32)
    assert torch.equal(pixels_CHW[:, 0, 0], torch.tensor([-1.0, 1.0, -1.0]))
    assert pixels_CHW.var(dim=(1, 2)).max() == 0


def damaged(path, kind):
    if kind == "text":
        path.write_text("not a picture")
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, format=kind)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.mark.parametrize("kind", ["text", "empty", "PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("read", [read_header, read_rgb])
def test_damaged_files_are_named(tmp_path, kind, read):
    path = tmp_path / "harm.png"
    damaged(path, kind)
    with pytest.raises(DataError, match=r"harm\.png cannot be read"):
        read(path)


def gradient(path, width, height):
    """Red is the column and green the row, so that a crop can be read off its pixels."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    Image.fromarray(np.stack([columns, rows, rows * 0], axis=-1).astype(np.uint8)).save(path)


def test_same_scale_crops_around_the_centre(tmp_path):
    gradient(tmp_path / "wide.png", 80, 32)
    pixels_CHW = load_pixels(tmp_path / "wide.png", (32, 32), flipped=False)
    columns = ((pixels_CHW[0] + 1) * 127.5).round()
    assert torch.equal(columns[0], torch.arange(24.0, 56.0))  # (80 - 32) / 2 = 24 columns cut from each side
    rows = ((pixels_CHW[1] + 1) * 127.5).round()
    assert torch.equal(rows[:, 0], torch.arange(32.0))


def test_flipped_is_the_mirror_image(tmp_path):
    gradient(tmp_path / "wide.png", 80, 32)
    straight = load_pixels(tmp_path / "wide.png", (32, 32), flipped=False)
    assert torch.equal(load_pixels(tmp_path / "wide.png", (32, 32), flipped=True), straight.flip(2))


def test_shrinking_covers_the_bucket(tmp_path):
    gradient(tmp_path / "tall.png", 96, 240)
    pixels_CHW = load_pixels(tmp_path / "tall.png", (48, 48), flipped=False)
    rows = (pixels_CHW[1] + 1) * 127.5
    # Scale 1/2; of 240 rows the middle 96 stay, and each output row lies at the middle of two of them.
    expected = 72 + 2 * torch.arange(48.0) + 0.5
    assert (rows[2:-2, 24] - expected[2:-2]).abs().max() <= 1.0


def test_fine_pattern_is_averaged_not_sampled(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    pixels_CHW = load_pixels(tmp_path / "stripes.png", (16, 16), flipped=False)
    assert pixels_CHW[:, 3:-3, 3:-3].abs().max() < 0.03
