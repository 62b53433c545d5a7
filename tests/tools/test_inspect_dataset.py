"""What the inspection tells of a folder of known pictures, and what its contact sheet shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.anima_runtime.text import tokenizer_plans
from library.data.pixels import load_pixels
from library.randomness import python_random
from tools.inspect_dataset import main
from tools.similar_pictures import difference_hash, groups_of_similar, groups_with_same
from tools.tiny_pictures import SHAPES, draw_picture

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["--resolution", "64", "--enable_bucket", "--min_bucket_reso", "32", "--max_bucket_reso", "128"]
SETTINGS += ["--bucket_reso_steps", "32"]


def drawn(number, size=(160, 160)):
    return draw_picture(size, SHAPES[number % len(SHAPES)], python_random(7, "drawn", number))[0]


@pytest.fixture
def folder(tmp_path):
    """Two good pictures with captions; `add` adds to them."""
    train = tmp_path / "train"
    train.mkdir()
    for name, number in (("a", 0), ("b", 1)):
        drawn(number).save(train / f"{name}.png")
        (train / f"{name}.txt").write_text(f"cat, {name}", encoding="utf-8")
    return train


def inspect(folder, capsys, *words):
    """The exit code and what --json tells, with paths as names."""
    code = main(["--train_data_dir", str(folder), *SETTINGS, "--json", *words])
    return code, json.loads(capsys.readouterr().out.replace(f"{folder}/", ""))


def test_a_good_folder(folder, capsys):
    code, report = inspect(folder, capsys, "--dataset_repeats", "3", "--train_batch_size", "4")
    assert code == 0
    assert report["buckets"] == [{"dataset": 0, "size": "64x64", "pictures": 2, "uses": 6, "batches": 2}]
    assert (report["pictures"], report["uses"], report["tags"]) == (2, 6, {"cat": 2, "a": 1, "b": 1})
    nothing = ("lost", "without_caption", "enlarged", "cropped", "same_content", "similar")
    assert all(not report[name] for name in nothing) and not report["long_captions"]


def test_what_is_lost_is_told_with_the_reason(folder, capsys):
    whole = (folder / "a.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "sketch.psd").write_bytes(b"8BPS")
    code, report = inspect(folder, capsys)
    assert code == 1 and set(report["lost"]) == {"broken.png", "sketch.psd"} and report["pictures"] == 2
    assert "cannot be read" in report["lost"]["broken.png"] and "not read" in report["lost"]["sketch.psd"]


def test_what_a_metadata_file_leaves_out_is_lost(folder, tmp_path, capsys):
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"a.png": {"caption": "x"}}))
    code, report = inspect(folder, capsys, "--in_json", str(file))
    assert code == 1 and report["lost"] == {"b.png": "its metadata file does not name it"}


def test_too_many_regularisation_pictures_are_lost(folder, tmp_path, capsys):
    regular = tmp_path / "regular"
    regular.mkdir()
    for number in range(3):
        drawn(4 + number).save(regular / f"{number}.png")
        (regular / f"{number}.txt").write_text("x")
    code, report = inspect(folder, capsys, "--reg_data_dir", str(regular))
    assert code == 1 and report["lost"] == {f"{regular}/2.png": "more regularisation pictures than are used"}


def test_missing_captions(folder, capsys):
    (folder / "b.txt").unlink()
    assert inspect(folder, capsys)[1]["without_caption"] == ["b.png"] and inspect(folder, capsys)[0] == 1
    code, report = inspect(folder, capsys, "--class_tokens", "cat")
    assert code == 0 and report["without_caption"] == []
    (folder / "b.nl.txt").write_text("It sits.")
    assert inspect(folder, capsys, "--caption_mix", "tags=1, nl=1")[0] == 0


def test_enlarged_and_cropped_pictures(folder, capsys):
    drawn(2, (32, 48)).save(folder / "a.png")
    drawn(3, (400, 64)).save(folder / "b.png")
    _, report = inspect(folder, capsys)
    # 32x48 is nearest to 64x64 (of 64x64, 32x96, 32x128): twice as wide, and of 96 lines 64 stay.
    enlarged = {"path": "a.png", "size": "32x48", "bucket": "64x64", "scale": 2.0, "cut": 0.3333}
    # 400x64 is 6.25 to 1, and the widest bucket, 128x32, 4 to 1.
    cropped = {"path": "b.png", "size": "400x64", "bucket": "128x32", "scale": 0.5, "cut": 0.36}
    assert report["enlarged"] == [enlarged] and report["cropped"] == [cropped, enlarged]


def test_copies_are_found(folder, capsys):
    for number, name in enumerate("cdef"):
        drawn(4 + number).save(folder / f"{name}.png")
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    drawn(1).resize((96, 96), Image.Resampling.LANCZOS).save(folder / "b small.jpg", quality=80)
    _, report = inspect(folder, capsys, "--class_tokens", "x")
    assert report["same_content"] == [["a.png", "copy.png"]] and report["similar"] == [["b small.jpg", "b.png"]]


def test_of_many_copies_ten_are_named(folder, capsys):
    for number in range(20):
        (folder / f"copy{number:02}.png").write_bytes((folder / "a.png").read_bytes())
    assert main(["--train_data_dir", str(folder), *SETTINGS, "--class_tokens", "x"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "copy00.png" in line]
    assert line.count(".png = ") == 10 and line.endswith(" = and 11 more")


def test_hashes_tell_scaled_pictures_from_others(tmp_path):
    hashes = {}
    for number in range(12):
        image = drawn(number, (160, 128))
        for name, side, options in (("png", 160, {}), ("jpg", 320, {"quality": 60}), ("webp", 80, {"quality": 90})):
            path = tmp_path / f"{number:02}.{name}"
            image.resize((side, side * 128 // 160), Image.Resampling.BICUBIC).save(path, **options)
            hashes[path] = difference_hash(path)
    groups = groups_of_similar(hashes)
    assert sorted({path.stem for path in group} for group in groups) == [{f"{number:02}"} for number in range(12)]
    assert [len(group) for group in groups] == [3] * 12


def test_near_hashes_are_found_wherever_they_differ():
    """Against the plain comparison of all pairs."""
    random = np.random.default_rng(0)
    values = {}
    for number in range(30):
        bits = random.integers(0, 2, 256)
        for copy, flips in enumerate((0, 10, 11)):
            changed = bits.copy()
            changed[random.choice(256, flips, replace=False)] ^= 1
            values[f"{number}.{copy}"] = int("".join(map(str, changed)), 2)
    groups = groups_of_similar(values)
    pairs = {
        frozenset((one, other)) for one in values for other in values
        if one != other and bin(values[one] ^ values[other]).count("1") <= 10
    }  # fmt: skip
    assert all(any(pair <= set(group) for group in groups) for pair in pairs) and len(pairs) >= 30
    assert [f"{number}.0" in group and f"{number}.1" in group for number, group in enumerate(groups)] == [True] * 30
    assert all(len({name.split(".")[0] for name in group}) == 1 for group in groups)
    assert groups_with_same({"a": 1, "b": 2, "c": 1}) == [["a", "c"]]


def test_captions_are_counted_in_tokens(folder, tiny_anima, capsys, monkeypatch, tmp_path):
    """T5's own tokens with the end's, by the tokenizer of the tiny model."""
    from transformers import AutoTokenizer

    text = "cat, " * 600
    (folder / "b.txt").write_text(text)
    monkeypatch.setattr(tokenizer_plans, "_cache_folder", lambda source: tmp_path / "none")
    code, report = inspect(folder, capsys)
    assert code == 0 and report["long_captions"] is None
    # Where a run downloads it to.
    monkeypatch.setattr(tokenizer_plans, "_cache_folder", lambda source: tiny_anima / "t5")
    assert inspect(folder, capsys)[1]["long_captions"].keys() == {"b.png"}
    monkeypatch.undo()
    code, report = inspect(folder, capsys, "--t5_tokenizer_dir", str(tiny_anima / "t5"))
    expected = len(AutoTokenizer.from_pretrained(tiny_anima / "t5")(text.strip()).input_ids)
    assert code == 0 and report["long_captions"] == {"b.png": expected} and expected > 512


def test_the_contact_sheet_shows_what_is_trained(folder, tmp_path, capsys):
    """Its picture is the trainer's crop; what a mask leaves out is dark and red."""
    masks, sheet = tmp_path / "masks", tmp_path / "sheets" / "sheet.png"
    masks.mkdir()
    for name in "ab":
        mask = np.zeros((160, 160), np.uint8)
        mask[:, :80] = 255 if name == "a" else 0
        Image.fromarray(mask).save(masks / f"{name}.png")
    toml = tmp_path / "data.toml"
    toml.write_text(
        f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{folder}"\n'
        f'conditioning_data_dir = "{masks}"\n'
    )
    words = ["--dataset_config", str(toml), "--contact_sheet", str(sheet), "--draws", "2", "--sheet_pictures", "1"]
    assert main(words) == 0
    shown = np.asarray(Image.open(sheet)).astype(int)
    assert shown.shape == (64 + 3 * 15, 2 * 272, 3)  # title, picture, one line of caption, space
    plain = ((load_pixels(folder / "a.png", (64, 64), False) + 1) * 127.5).round().permute(1, 2, 0).int().numpy()
    for left in (4, 276):
        trained, untrained = shown[15:79, left : left + 24], shown[15:79, left + 40 : left + 64]
        assert np.abs(trained - plain[:, :24]).max() <= 1
        red = 0.25 * plain[:, 40:] + np.array([80, 0, 0])
        assert np.abs(untrained - red).max() <= 1


def test_the_sheet_draws_captions_as_training_does(folder, tmp_path, monkeypatch):
    from tools import contact_sheet

    (folder / "a.txt").write_text(", ".join(f"tag{number}" for number in range(12)))
    cells = []
    original = contact_sheet._draw_cell
    monkeypatch.setattr(
        contact_sheet, "_draw_cell", lambda sheet, cell, *at: cells.append(cell) or original(sheet, cell, *at)
    )
    words = ["--train_data_dir", str(folder), *SETTINGS, "--shuffle_caption", "--flip_aug"]
    assert main([*words, "--contact_sheet", str(tmp_path / "s.png"), "--draws", "6"]) == 0
    captions = [cell.caption for cell in cells[:6]]
    assert len(set(captions)) == 6 and {tuple(sorted(caption.split(", "))) for caption in captions} == {
        tuple(sorted(f"tag{number}" for number in range(12)))
    }
    assert {cell.title for cell in cells[6:]} == {"b.png  160x160 > 64x64"}
    assert len({cell.image.tobytes() for cell in cells[6:]}) == 2  # as it is, and mirrored


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no pictures are named"),
        (["--train_data_dir", "{folder}", "--resolutoin", "64"], "did you mean --resolution"),
        (["--train_data_dir", "{folder}", "--num_repeats", "0"], "out of range"),
        (["--train_data_dir", "{folder}", "--random_crop", "--cache_latents"], "turn one of them off"),
        (["--train_data_dir", "{folder}", *SETTINGS, "--contact_sheet", "{folder}/sheet.xyz"], "cannot be written"),
    ],
)
def test_mistakes_are_named(folder, capsys, words, message):
    assert main([word.format(folder=folder) for word in words]) == 1
    assert message in capsys.readouterr().err


def test_as_a_program(folder):
    (folder / "b.txt").unlink()
    command = [sys.executable, "tools/inspect_dataset.py", "--train_data_dir", str(folder), *SETTINGS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "2 pictures, used 2 times in an epoch\nlost, not trained: none\nwithout a caption: 1\n" in done.stdout
    assert "tags: 2, each with the pictures that have it\n  1 a, 1 cat" in done.stdout
    assert not (folder / ".anima_cache").exists()


def test_missing_folders_are_told_with_their_lines(folder, tmp_path, capsys):
    sets = tmp_path / "sets.toml"
    sets.write_text(
        '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "gone"\n'
        '[[datasets.subsets]]\nimage_dir = "lost"\n'
    )
    assert main(["--dataset_config", str(sets)]) == 1
    error = capsys.readouterr().err
    for line, name in ((4, "gone"), (6, "lost")):
        assert f"{sets}:{line}: datasets.subsets.image_dir: there is no folder {name}" in error
