"""What of earlier saves goes, what stays, and what stops a run."""

import os

import pytest

from library.errors import SettingError
from library.files import folder_written_atomically, write_atomically
from library.training.saving.rotation import check_nothing_overwritten, clear_killed_saves, remove_outdated, size_of
from library.training.saving.settings import SavingSettings, saved_name

DEAD = 99_999_999  # the number of no process


def fill(folder, *names):
    for name in names:
        if name.endswith("-state"):
            (folder / name).mkdir()
            (folder / name / "run_state.json").touch()
        else:
            (folder / name).touch()


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def settings_for(tmp_path, **values):
    return SavingSettings(output_dir=tmp_path, output_name="a", **values)


def test_epochs_count_saves(tmp_path):
    epochs = [f"a-{epoch:06d}{ending}" for epoch in (2, 4, 6) for ending in (".safetensors", "-state")]
    fill(tmp_path, *epochs, "a-step00000001.safetensors", "a.safetensors", "a-000002-ema.safetensors")
    remove_outdated(settings_for(tmp_path, save_last_n_epochs=2), "a-000006")
    assert left(tmp_path) == sorted([*epochs[2:], "a-step00000001.safetensors", "a.safetensors"])


def test_steps_count_steps(tmp_path):
    steps = [f"a-step{step:08d}.safetensors" for step in (100, 200, 300, 400)]
    fill(tmp_path, *steps, "a-000001.safetensors")
    remove_outdated(settings_for(tmp_path, save_last_n_steps=200), "a-step00000400")
    assert left(tmp_path) == ["a-000001.safetensors", *steps[1:]]


def test_states_may_be_fewer_than_adapters(tmp_path):
    fill(tmp_path, *(f"a-00000{n}{ending}" for n in (1, 2, 3) for ending in (".safetensors", "-state")))
    remove_outdated(settings_for(tmp_path, save_last_n_epochs=2, save_last_n_epochs_state=1), "a-000003")
    assert left(tmp_path) == ["a-000002.safetensors", "a-000003-state", "a-000003.safetensors"]


def test_other_names_and_later_saves_stay(tmp_path):
    names = [
        "a-b-000001.safetensors",
        "aa-000001.safetensors",
        "a-000009.safetensors",
        "a-000001.txt",
        "a-1.safetensors",
    ]
    fill(tmp_path, *names, "a-000001.safetensors", "a-000002.safetensors")
    remove_outdated(settings_for(tmp_path, save_last_n_epochs=1), "a-000002")
    assert left(tmp_path) == sorted([*names, "a-000002.safetensors"])


def test_all_saves_are_kept_unless_told_otherwise(tmp_path):
    fill(tmp_path, "a-000001.safetensors", "a-000002.safetensors")
    for name in ("a-000002", "a-step00000009", "a"):
        remove_outdated(settings_for(tmp_path), name)
    assert len(left(tmp_path)) == 2


@pytest.mark.parametrize("name", ["a.safetensors", "a-state", "a-kohya.safetensors", "a-000001-ema.safetensors"])
def test_a_new_run_does_not_begin_over_an_earlier_ones_files(tmp_path, name):
    fill(tmp_path, name)
    with pytest.raises(
        SettingError, match=f"holds files of an earlier run named a .{name}.*--overwrite_output"
    ) as error:
        check_nothing_overwritten(settings_for(tmp_path))
    assert ("--resume latest" in str(error.value)) == name.endswith("-state")
    check_nothing_overwritten(settings_for(tmp_path, overwrite_output=True))


def test_what_of_an_earlier_run_stays_beside_the_new_one_is_told(tmp_path, caplog):
    steps = [f"a-step{step:08d}.safetensors" for step in range(1, 13)]
    fill(tmp_path, *steps, "a.safetensors", "a-state", "b.safetensors")
    settings = settings_for(tmp_path, overwrite_output=True)
    check_nothing_overwritten(settings)
    assert caplog.messages == [
        f"overwrite_output: an earlier run named a has left 14 files and states in {tmp_path} "
        f"(a-state, {', '.join(steps[:9])}, and 4 more): what this run writes replaces those of the same names, and "
        "the others stay; a.safetensors is the earlier run's until this one has ended; --resume latest means a state "
        "of that run until this one has saved its own"
    ]
    for name in ("a.safetensors", "a-state"):
        (tmp_path / name).rename(tmp_path / f"other {name}")
    check_nothing_overwritten(settings)
    assert "is the earlier run's" not in caplog.messages[1] and "--resume latest" not in caplog.messages[1]
    caplog.clear()
    check_nothing_overwritten(settings_for(tmp_path / "not there yet", overwrite_output=True))
    assert not caplog.messages


def test_other_files_stop_nothing(tmp_path):
    fill(tmp_path, "b.safetensors", "a-b.safetensors", "a.txt", "a-02.safetensors")
    check_nothing_overwritten(settings_for(tmp_path))
    check_nothing_overwritten(settings_for(tmp_path / "not there yet"))


def test_what_a_killed_run_left_is_removed_and_a_state_that_was_being_replaced_put_back(tmp_path):
    own = [f".a.{DEAD}-01234567.tmp.safetensors", f".a-step00000002.{DEAD}-89abcdef.tmp.safetensors"]
    others = [f".b.{DEAD}-01234567.tmp.safetensors", f".a-b.{DEAD}.tmp", ".a.conf", "a.safetensors"]
    fill(tmp_path, *own, *others, "a-000002-state")
    for name in (f".a-step00000001-state.{DEAD}.tmp", f".a-000001-state.{DEAD}.old", f".a-000002-state.{DEAD}.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "optimizer.pt").touch()
    clear_killed_saves(settings_for(tmp_path))
    assert left(tmp_path) == sorted([*others, "a-000001-state", "a-000002-state"])
    assert (tmp_path / "a-000001-state" / "optimizer.pt").exists()
    assert not (tmp_path / "a-000002-state" / "optimizer.pt").exists()


def test_sample_pictures_in_the_making_are_removed_and_those_of_other_runs_stay(tmp_path):
    names = ("a_grid", "a_000100_00_20260101000000_5", "a_e000002_sheet", "a_2_grid", "b_base_00_20260101000000_5")
    unfinished = [f".{name}.{DEAD}-0f.tmp.png" for name in names]
    own, others = unfinished[:3], [*unfinished[3:], "a_grid.png"]
    (tmp_path / "sample").mkdir()
    fill(tmp_path / "sample", *own, *others)
    clear_killed_saves(settings_for(tmp_path))
    assert left(tmp_path / "sample") == sorted(others)


def test_the_size_of_a_file_and_of_a_states_folder(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(bytes(5))
    (tmp_path / "a-state").mkdir()
    for name, size in (("optimizer.pt", 7), ("run_state.json", 11)):
        (tmp_path / "a-state" / name).write_bytes(bytes(size))
    assert [size_of(tmp_path / name) for name in ("a.safetensors", "a-state", "removed")] == [5, 18, 0]


def test_what_a_running_process_writes_stays(tmp_path):
    """A second run of the name begins in the midst of both kinds of write."""
    settings = settings_for(tmp_path)

    def write(file):
        file.write_bytes(b"whole")
        clear_killed_saves(settings)

    write_atomically(tmp_path / "a.safetensors", write)
    with folder_written_atomically(tmp_path / "a-state") as folder:
        (folder / "optimizer.pt").touch()
        clear_killed_saves(settings)
    assert left(tmp_path) == ["a-state", "a.safetensors"]
    assert (tmp_path / "a-state" / "optimizer.pt").exists()


def test_a_later_process_with_the_number_of_a_killed_one_keeps_nothing(tmp_path):
    leftover = tmp_path / f".a.{os.getpid()}-0f.tmp.safetensors"
    leftover.touch()
    os.utime(leftover, (1e9, 1e9))  # in 2001, before this process began
    clear_killed_saves(settings_for(tmp_path))
    assert left(tmp_path) == []


def test_names_are_taken_apart():
    parts = saved_name("my.lora").fullmatch("my.lora-step00000012-best-ema.safetensors")
    assert (parts["epoch"], parts["step"], parts["ending"]) == (None, "00000012", ".safetensors")
    assert saved_name("my.lora").fullmatch("my_lora.safetensors") is None
