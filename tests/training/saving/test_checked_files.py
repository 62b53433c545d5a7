"""A file is read back as soon as it is written."""

from pathlib import Path

import pytest

from library.training.saving import checked_files
from library.training.saving.checked_files import damage_of, write_checked

CONTENT = b"weights" * 100


def test_what_was_written_well_is_sound(tmp_path):
    write_checked(tmp_path, {"one": lambda file: file.write(CONTENT)})
    assert (tmp_path / "one").read_bytes() == CONTENT
    assert damage_of(tmp_path) is None


@pytest.mark.parametrize("kept", [bytes([CONTENT[0] ^ 1]) + CONTENT[1:], CONTENT[:-1], b""])
def test_a_file_that_reads_back_other_than_written_is_an_error(tmp_path, monkeypatch, kept):
    """The disk changes or loses bytes between the writing and the reading."""
    read = checked_files.file_sha256

    def read_from_a_failing_disk(path: Path) -> str:
        if path.name == "two":
            path.write_bytes(kept)
        return read(path)

    monkeypatch.setattr(checked_files, "file_sha256", read_from_a_failing_disk)
    files = dict.fromkeys(("one", "two"), lambda file: file.write(CONTENT))
    with pytest.raises(OSError, match="two reads back other than it was written: the disk may be failing"):
        write_checked(tmp_path, files)
    assert not (tmp_path / "manifest.json").exists()
