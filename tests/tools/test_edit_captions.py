"""Captions are edited as asked, nothing else changes, and all of it can be undone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.edit_captions import main
from tools.tag_edits import TagEdits

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("edits", "before", "after"),
    [
        ({"trigger": "mika"}, "1girl, solo", "mika, 1girl, solo"),
        ({"trigger": "mika"}, "1girl, mika, solo, mika", "mika, 1girl, solo"),
        ({"trigger": "mika, blue coat"}, "blue coat, 1girl", "mika, blue coat, 1girl"),
        ({"trigger": "mika"}, "", "mika"),
        ({"underscores_to_spaces": True}, "long_hair, ^_^, o_o", "long hair, ^_^, o_o"),
        ({"underscores_to_spaces": True}, "(o)_(o), 6_9, k-on!_", "(o)_(o), 6_9, k-on!"),
        ({"underscores_to_spaces": True, "trigger": "my_char"}, "long_hair, my_char", "my_char, long hair"),
        ({"removed": ("solo",)}, "1girl, solo, solo focus", "1girl, solo focus"),
        ({"removed": ("bad_hands",), "underscores_to_spaces": True}, "a_cat, bad_hands", "a cat"),
        ({"removed": ("bad hands",), "underscores_to_spaces": True}, "a_cat, bad_hands", "a cat"),
        ({"removed": ("solo",)}, "solo", ""),
        ({"replaced": {"1girl": "1woman"}}, "1girl, 1girls", "1woman, 1girls"),
        ({"replaced": {"a": "b"}, "removed": ("b",)}, "a, b, c", "c"),
        ({"dedupe": True}, "a, b, a, c, b", "a, b, c"),
        ({"replaced": {"a": "b"}, "dedupe": True}, "b, c, a", "b, c"),
        ({"dedupe": True, "mark": "|||"}, "a, b ||| b, c ||| a, d", "a, b ||| c ||| d"),
        ({"trigger": "t", "mark": "|||"}, "a ||| t, b", "t, a ||| b"),
        ({"dedupe": True, "separator": ";"}, "a, b; a, b; c", "a, b; c"),
    ],
)  # fmt: skip
def test_edits_of_a_line(edits, before, after):
    assert TagEdits(**edits).edit_line(before) == after


def test_a_line_without_a_change_stays_as_it_was_written():
    edits = TagEdits(trigger="t", removed=("x",), dedupe=True, underscores_to_spaces=True)
    for line in ("t,a ,  b", "t, It sits there,and looks.  ", "t"):
        assert edits.edit_line(line) == line


def test_every_line_is_a_caption_and_ends_stay():
    edits = TagEdits(trigger="t")
    assert edits.edit_text("\ufeffa, t\r\n\r\nb \nt, c") == "\ufefft, a\r\n\r\nt, b \nt, c"
    assert edits.edit_text("") == "t" and edits.edit_text("\n") == "t\n"


tags = st.lists(st.sampled_from(["t", "a", "blue_c", "d e", "^_^", "x"]), max_size=8)


@given(tags)
def test_editing_again_changes_nothing(words):
    edits = TagEdits(trigger="t", removed=("x",), replaced={"a": "d e"}, dedupe=True, underscores_to_spaces=True)
    once = edits.edit_line(", ".join(words))
    result = once.split(", ")
    assert edits.edit_line(once) == once and result[0] == "t" and len(set(result)) == len(result)
    assert set(result) == {"t", *({"a": "d e", "blue_c": "blue c"}.get(word, word) for word in words if word != "x")}


@pytest.fixture
def folder(tmp_path):
    """Three pictures in two folders, one without a caption; a text that belongs to none."""
    texts = {"a.txt": "1girl, solo\r\n", "sub/b.txt": "mika, cat_ears", "notes.txt": "1girl"}
    for name in ("a.png", "sub/b.png", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def texts(folder):
    return {str(path.relative_to(folder)): path.read_bytes().decode() for path in folder.rglob("*.txt")}


BEFORE = {"a.txt": "1girl, solo\r\n", "sub/b.txt": "mika, cat_ears", "notes.txt": "1girl"}
AFTER = {"a.txt": "mika, 1girl, solo\r\n", "sub/b.txt": "mika, cat ears", "notes.txt": "1girl"}


def edit(folder, *words):
    return main([str(folder), "--trigger", "mika", "--underscores_to_spaces", *words])


def test_a_dry_run_shows_the_difference_and_writes_nothing(folder, capsys):
    assert edit(folder) == 0
    output = capsys.readouterr().out
    assert f"{folder / 'a.txt'}\n  - 1girl, solo\n  + mika, 1girl, solo\n" in output
    assert "  - mika, cat_ears\n  + mika, cat ears\n2 captions would change; --apply changes them\n" in output
    assert texts(folder) == BEFORE and not list(folder.glob("*.json"))


def test_apply_and_undo(folder, capsys):
    assert edit(folder, "--apply") == 0 and texts(folder) == AFTER
    (undo_file,) = folder.glob("caption_edits_*.json")
    assert f"--undo {undo_file}" in capsys.readouterr().out
    assert edit(folder, "--apply") == 0 and len(list(folder.glob("*.json"))) == 1
    assert "no caption changes" in capsys.readouterr().out
    for _ in range(2):  # a second time changes nothing
        assert main(["--undo", str(undo_file)]) == 0 and texts(folder) == BEFORE


def test_undo_leaves_alone_what_was_edited_since(folder, capsys):
    edit(folder, "--apply")
    (undo_file,) = folder.glob("caption_edits_*.json")
    (folder / "a.txt").write_text("mine")
    assert main(["--undo", str(undo_file)]) == 1
    assert texts(folder) == {**BEFORE, "a.txt": "mine"}
    assert f"left alone, as they were edited since:\n  {folder / 'a.txt'}" in capsys.readouterr().out
    (folder / "a.txt").unlink()
    assert main(["--undo", str(undo_file)]) == 1 and "(gone)" in capsys.readouterr().out


def test_an_interrupted_apply_can_be_undone(folder, monkeypatch):
    """The undo file is complete before the first caption changes."""
    from tools import edit_captions

    write, done = edit_captions.write_atomically, []

    def fails_after_two(path, content):
        if len(done) == 2:
            raise OSError(28, "No space left on device")
        done.append(path)
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(edit_captions, "write_atomically", fails_after_two)
        assert edit(folder, "--apply") == 1
    assert texts(folder) != BEFORE
    (undo_file,) = folder.glob("caption_edits_*.json")
    assert main(["--undo", str(undo_file)]) == 0 and texts(folder) == BEFORE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}"], "nothing to do"),
        ([], "name one or more folders"),
        (["{folder}", "--replace", "a"], "write OLD=NEW"),
        (["{folder}", "--replace", "a="], "to take a tag out use --remove"),
        (["{folder}", "--dedupe", "--separator", " "], "separates tags"),
        (["{folder}/none", "--dedupe"], "does not exist"),
        (["--undo", "{folder}/notes.txt"], "not an undo file"),
        (["--undo", "{folder}/no.json"], "cannot be read"),
    ],
)
def test_mistakes_are_named(folder, capsys, words, message):
    assert main([word.format(folder=folder) for word in words]) == 1
    assert message in capsys.readouterr().err and texts(folder) == BEFORE


def test_a_caption_that_is_not_utf8_stops_before_anything_changes(folder, capsys):
    (folder / "sub" / "b.txt").write_bytes(b"caf\xe9")
    assert edit(folder, "--apply") == 1 and "b.txt is not UTF-8 (byte 3)" in capsys.readouterr().err
    assert (folder / "a.txt").read_bytes() == BEFORE["a.txt"].encode() and not list(folder.glob("*.json"))


def test_as_a_program(folder):
    command = [sys.executable, "tools/edit_captions.py", str(folder), "--remove", "solo", "--apply"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 captions changed" in done.stdout, done.stderr
    assert (folder / "a.txt").read_bytes() == b"1girl\r\n"
    (undo_file,) = folder.glob("*.json")
    assert list(json.loads(undo_file.read_text())["captions"]) == [str(folder / "a.txt")]
