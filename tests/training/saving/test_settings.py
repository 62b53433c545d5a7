import pytest

from library.training.saving.settings import SavingSettings, planned_files


@pytest.mark.parametrize(
    ("settings", "adapters", "states"),
    [
        (SavingSettings(), 1, 0),
        (SavingSettings(save_state_on_train_end=True), 1, 1),
        # 24 steps, 12 an epoch: after steps 10 and 20, after epoch 1, and at the end.
        (SavingSettings(save_every_n_steps=10, save_every_n_epochs=1), 4, 0),
        (SavingSettings(save_every_n_steps=10, save_every_n_epochs=1, save_state=True), 4, 4),
        # What is due at the last step is the end's own.
        (SavingSettings(save_every_n_steps=24, save_every_n_epochs=2, save_state=True), 1, 1),
        (SavingSettings(save_every_n_steps=1, save_state_on_train_end=True), 24, 1),
        # Saves after steps 2, 4, …, 22; those of the last 5 steps are three at most, and a fourth while it is written.
        (SavingSettings(save_every_n_steps=2, save_last_n_steps=5, save_state=True), 5, 5),
        (SavingSettings(save_every_n_steps=2, save_last_n_steps=5, save_last_n_steps_state=1, save_state=True), 5, 3),
        (SavingSettings(save_every_n_steps=2, save_last_n_steps_state=1, save_state=True), 12, 3),
        (SavingSettings(save_every_n_epochs=1, save_last_n_epochs=1), 2, 0),
    ],
)
def test_numbers_of_files(settings, adapters, states):
    files = planned_files(settings, formats=1, parameters=10, total_steps=24, steps_per_epoch=12)
    assert (files.adapters, files.states) == (adapters, states)
    assert files.total_bytes == 40 * adapters + 120 * states


@pytest.mark.parametrize(("settings", "adapters", "states"), [({}, 2, 0), ({"save_state": True}, 2, 2)])
def test_the_best_lies_beside_the_last(settings, adapters, states):
    files = planned_files(SavingSettings(**settings), 1, 10, total_steps=24, steps_per_epoch=12, saves_best=True)
    assert (files.adapters, files.states) == (adapters, states)


def test_formats_and_precision_count():
    files = planned_files(SavingSettings(save_precision="bf16"), 2, 1000, total_steps=5, steps_per_epoch=5)
    assert (files.adapters, files.adapter_bytes, files.total_bytes) == (2, 2000, 4000)
