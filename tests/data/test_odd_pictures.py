"""What becomes of each kind of odd or broken picture, from the scan to its pixels."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from library.data.headers import read_header
from library.data.pictures import scan_datasets
from library.data.pixels import load_pixels, read_rgb
from library.data.settings import DatasetSettings, SubsetSettings
from library.errors import DataError

NOISE = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6
RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image, kind, **more):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **more)
    return buffer.getvalue()


def picture(kind, image=None, **more):
    return encoded(Image.fromarray(NOISE) if image is None else image, kind, **more)


def plain(mode, colour, kind="PNG", **more):
    return encoded(Image.new(mode, (80, 60), colour), kind, **more)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk_before_end(png, kind, data):
    return png[:-12] + chunk(kind, data) + png[-12:]


def palette():
    image = Image.new("P", (80, 60), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    return image


def animation(kind, **more):
    frames = [Image.new("RGB", (80, 60), colour) for colour in ("red", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **more)


def sixteen_bit_rgb():
    """A PNG of 16 bits a channel, which Pillow cannot write: red."""
    rows = b"".join(b"\0" + struct.pack(">HHH", 65535, 0, 0) * 80 for _ in range(60))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 80, 60, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# Name, content, upright size, and the colour of its first pixel where it is of one colour.
READ = [
    ("plain.png", picture("PNG"), (80, 60), None),
    ("turned.png", picture("PNG", exif=SIDEWAYS), (60, 80), None),
    ("turned_late.png", with_chunk_before_end(picture("PNG"), b"eXIf", SIDEWAYS.tobytes()[6:]), (60, 80), None),
    ("turned.jpg", picture("JPEG", exif=SIDEWAYS), (60, 80), None),
    ("turned.webp", picture("WEBP", exif=SIDEWAYS), (60, 80), None),
    ("turned.tiff", picture("TIFF", exif=SIDEWAYS), (60, 80), None),
    ("UPPER.JPEG", picture("JPEG"), (80, 60), None),
    ("progressive.jpg", picture("JPEG", progressive=True), (80, 60), None),
    ("trailing.jpg", picture("JPEG") + b"\0" * 5000, (80, 60), None),
    ("cmyk.jpg", plain("CMYK", (0, 255, 255, 0), "JPEG", quality=100), (80, 60), (254, 0, 0)),
    ("camera.jpg", encoded(Image.new("RGB", (80, 60), "red"), "MPO", save_all=True, quality=100,
     append_images=[Image.new("RGB", (80, 60))]), (80, 60), (254, 0, 0)),
    ("grey.png", plain("L", 77), (80, 60), (77, 77, 77)),
    ("bit.png", plain("1", 1), (80, 60), WHITE),
    ("deep_grey.png", plain("I;16", 257 * 200), (80, 60), (200, 200, 200)),
    ("deep_colour.png", sixteen_bit_rgb(), (80, 60), RED),
    ("palette.png", encoded(palette(), "PNG"), (80, 60), RED),
    ("palette_clear.png", encoded(palette(), "PNG", transparency=0), (80, 60), WHITE),
    ("clear.png", plain("RGBA", (255, 0, 0, 0)), (80, 60), WHITE),
    ("clear_grey.png", plain("LA", (10, 0)), (80, 60), WHITE),
    ("half_clear.webp", plain("RGBA", (0, 0, 0, 51), "WEBP", lossless=True), (80, 60), (204, 204, 204)),
    ("bits.bmp", plain("RGB", RED, "BMP"), (80, 60), RED),
    ("still.gif", encoded(palette(), "GIF"), (80, 60), RED),
    ("moving.gif", animation("GIF"), (80, 60), RED),
    ("moving.webp", animation("WEBP", lossless=True), (80, 60), RED),
    ("pages.tif", animation("TIFF"), (80, 60), RED),
    ("no_end_mark.png", plain("RGB", RED)[:-12], (80, 60), RED),
    ("wrong_ending.png", plain("RGB", RED, "BMP"), (80, 60), RED),
    ("thin.png", encoded(Image.new("RGB", (1, 900), RED), "PNG"), (1, 900), RED),
    ("ü ñ 猫.png", plain("RGB", RED), (80, 60), RED),
]  # fmt: skip
if features.check("avif"):
    READ.append(("new.avif", plain("RGB", RED, "AVIF", quality=100), (80, 60), None))

# Name and content of what is named as broken when training starts.
BROKEN = [
    ("empty.png", b""),
    ("text.png", b"not a picture"),
    ("page.jpg", b"<html>404</html>"),
    ("cut.png", picture("PNG")[:-100]),
    ("head_only.png", picture("PNG")[:40]),
    ("cut.jpg", picture("JPEG")[:-200]),
    ("cut.webp", picture("WEBP")[:-200]),
    ("cut.bmp", picture("BMP")[:-200]),
    ("cut.gif", encoded(Image.fromarray(NOISE).quantize(), "GIF")[:-400]),
    ("cut.tif", picture("TIFF")[:-400]),
    ("new.jxl", b"\xff\x0a" + b"\0" * 100),
    ("phone.heic", b"\0\0\0\x18ftypheic" + b"\0" * 100),
    ("bomb.png", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
     + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")),
]  # fmt: skip


def damaged_inside():
    """Whole by its structure, but with pixels that cannot be unpacked."""
    content = bytearray(picture("PNG"))
    content[content.index(b"IDAT") + 1000] ^= 255
    return bytes(content)


# What only shows when it is decoded.
BROKEN_INSIDE = [("damaged.png", damaged_inside()), ("float.tif", plain("F", 0.5, "TIFF"))]


def scan(folder, skip_broken=False):
    dataset = DatasetSettings(resolution=(64, 64), subsets=(SubsetSettings(image_dir=folder, class_tokens="x"),))
    return scan_datasets([dataset], skip_broken, show_progress=False)


@pytest.mark.parametrize(("name", "content", "size", "colour"), READ, ids=[each[0] for each in READ])
@pytest.mark.parametrize("decode", [False, True])
def test_odd_pictures_are_read(tmp_path, name, content, size, colour, decode):
    path = tmp_path / name
    path.write_bytes(content)
    assert read_header(path, decode).size == size == read_rgb(path).size
    if colour is not None:
        assert all(abs(a - b) <= 1 for a, b in zip(read_rgb(path).getpixel((0, 0)), colour, strict=True))
    pixels_CHW = load_pixels(path, (64, 64), flipped=False)
    assert pixels_CHW.shape == (3, 64, 64) and pixels_CHW.isfinite().all() and pixels_CHW.abs().max() <= 1
    assert [each.size for each in scan(tmp_path, skip_broken=decode)] == [size]


@pytest.mark.parametrize(("name", "content"), BROKEN, ids=[each[0] for each in BROKEN])
def test_broken_pictures_are_named_at_the_start(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"1 picture cannot be read(?s:.)*{name}"):
        scan(tmp_path)
    (tmp_path / "good.png").write_bytes(picture("PNG"))
    assert [each.path.name for each in scan(tmp_path, skip_broken=True)] == ["good.png"]


@pytest.mark.parametrize(("name", "content"), BROKEN_INSIDE, ids=[each[0] for each in BROKEN_INSIDE])
def test_damage_inside_is_named_when_it_is_trained_or_left_out_when_asked(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    if name.endswith(".png"):
        (found,) = scan(tmp_path)
        (tmp_path / "good.png").write_bytes(picture("PNG"))
        assert [each.path.name for each in scan(tmp_path, skip_broken=True)] == ["good.png"]
        tmp_path = found.path.parent
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        load_pixels(tmp_path / name, (64, 64), flipped=False)


def test_several_frames_are_told(tmp_path, caplog):
    (tmp_path / "moving.gif").write_bytes(animation("GIF"))
    (tmp_path / "still.png").write_bytes(picture("PNG"))
    scan(tmp_path)
    message = caplog.records[-1].getMessage()
    assert message.startswith("1 picture has several frames or pages; the first is trained")
    assert "moving.gif" in message and "still.png" not in message


def test_kinds_that_are_not_read_are_named(tmp_path, caplog):
    (tmp_path / "good.png").write_bytes(picture("PNG"))
    for name in ("a.psd", "b.PSD", "c.kra", "note.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert len(scan(tmp_path)) == 1
    assert "files of kinds that are not read are left out (1 .kra, 2 .psd): save them as .png" in caplog.text


def test_whole_files_are_not_decoded(tmp_path, monkeypatch):
    for name, kind in (("a.png", "PNG"), ("b.jpg", "JPEG"), ("c.webp", "WEBP"), ("d.bmp", "BMP")):
        (tmp_path / name).write_bytes(picture(kind))
    monkeypatch.setattr(Image.Image, "load", None)
    for name in ("PngImagePlugin.PngImageFile", "JpegImagePlugin.JpegImageFile", "WebPImagePlugin.WebPImageFile"):
        monkeypatch.setattr(f"PIL.{name}.load", None)
    assert len(scan(tmp_path)) == 4
