"""Which state --resume latest finds."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from library.training.run import LATEST, RunSettings, RunState
from library.training.saving.checked_files import write_checked
from library.training.saving.resuming import find_state, skip_finished_epoch
from library.training.saving.settings import SavingSettings
from library.training.saving.upload import HubSettings


@pytest.fixture
def saving(tmp_path):
    return SavingSettings(output_dir=tmp_path, output_name="a")


def state(tmp_path, name, step, saved_at):
    folder = tmp_path / name
    folder.mkdir()
    content = json.dumps(asdict(RunState(step=step, saved_at=saved_at))).encode()
    write_checked(folder, {"run_state.json": lambda file: file.write(content)})
    return folder


def test_the_last_saved_state_of_this_name(tmp_path, saving):
    state(tmp_path, "a-step00000900-state", 900, saved_at=10.0)
    newest = state(tmp_path, "a-step00000200-state", 200, saved_at=20.0)
    state(tmp_path, "b-step00000300-state", 300, saved_at=30.0)
    state(tmp_path, ".a-step00000300-state.77.tmp", 300, saved_at=30.0)
    assert find_state(RunSettings(resume=LATEST), saving, HubSettings()) == newest


def test_damaged_states_are_passed_over(tmp_path, saving, caplog):
    good = state(tmp_path, "a-000001-state", 5, saved_at=1.0)
    state(tmp_path, "a-000002-state", 10, saved_at=2.0)
    path = tmp_path / "a-000002-state" / "run_state.json"
    path.write_text(path.read_text().replace("10", "11"))
    (tmp_path / "a-000003-state").mkdir()
    assert find_state(RunSettings(resume=LATEST), saving, HubSettings()) == good
    assert "a-000002-state is damaged (run_state.json is not what was written)" in caplog.text
    assert "a-000003-state is no complete state" in caplog.text


def test_without_a_state_the_run_begins(saving):
    assert find_state(RunSettings(resume=LATEST), saving, HubSettings()) is None
    assert find_state(RunSettings(), saving, HubSettings()) is None
    assert find_state(RunSettings(resume=Path("x-state")), saving, HubSettings()) == Path("x-state")


@pytest.mark.parametrize("start", [{"initial_step": 5}, {"initial_epoch": 2}])
def test_that_a_start_is_set_in_vain_is_told_where_a_state_is_found(tmp_path, saving, caplog, start):
    run = RunSettings(resume=LATEST, **start)
    find_state(run, saving, HubSettings())
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    folder = state(tmp_path, "a-step00000007-state", 7, saved_at=1.0)
    find_state(run, saving, HubSettings())
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == f"initial_step and initial_epoch do nothing: resume goes on from {folder}"


@pytest.mark.parametrize(("epoch_steps", "place"), [(3, (1, 0)), (4, (1, 0)), (5, (0, 4))])
def test_a_resumed_epoch_that_has_become_shorter_is_over(epoch_steps, place, caplog):
    state = RunState(step=4, epoch=0, step_in_epoch=4)
    skip_finished_epoch(state, epoch_steps)
    assert (state.epoch, state.step_in_epoch) == place
    assert state.step == 4
    assert ("going on with the next epoch" in caplog.text) == (place == (1, 0))
