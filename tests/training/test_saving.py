import pytest

from library.training.saving import SavingSettings, planned_files


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
    ],
)
def test_numbers_of_files(settings, adapters, states):
    files = planned_files(settings, formats=1, parameters=10, total_steps=24, steps_per_epoch=12)
    assert (files.adapters, files.states) == (adapters, states)
    assert files.total_bytes == 40 * adapters + 120 * states


def test_formats_and_precision_count():
    files = planned_files(SavingSettings(save_precision="bf16"), 2, 1000, total_steps=5, steps_per_epoch=5)
    assert (files.adapters, files.adapter_bytes, files.total_bytes) == (2, 2000, 4000)
