import pytest

from library.errors import SettingError
from library.training.run import RunSettings, RunState, starting_state


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({}, (0, 0, 0)),
        ({"initial_step": 25}, (25, 2, 0)),
        ({"initial_step": 25, "skip_until_initial_step": True}, (25, 2, 5)),
        ({"initial_epoch": 3}, (20, 2, 0)),
        ({"initial_epoch": 3, "skip_until_initial_step": True}, (20, 2, 0)),
        ({"initial_epoch": 3, "initial_step": 7}, (7, 0, 0)),
    ],
)
def test_where_a_run_begins_with_ten_steps_an_epoch(settings, start):
    assert starting_state(RunSettings(**settings), 10) == RunState(*start)


@pytest.mark.parametrize(
    ("settings", "name", "step"),
    [
        ({"initial_step": 40, "max_train_steps": 40}, "initial_step", 40),
        ({"initial_epoch": 5, "max_train_epochs": 4}, "initial_epoch", 40),
    ],
)
def test_a_run_that_would_be_over_at_once_is_refused(settings, name, step):
    with pytest.raises(
        SettingError, match=f"^{name}: the run would start at step {step}, and ends at step 40: lower it"
    ):
        starting_state(RunSettings(**settings), 10)


@pytest.mark.parametrize(
    ("settings", "precision"),
    [({}, "no"), ({"mixed_precision": "fp16"}, "fp16"), ({"full_bf16": True}, "bf16"), ({"full_fp16": True}, "fp16")],
)
def test_precision(settings, precision):
    assert RunSettings(**settings).precision == precision
