"""Rules of the optimizer and its learning rate."""

import logging

import pytest

from library.errors import SettingError
from library.settings import read_settings


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer_type", "AdamX"], "command line: --optimizer_type: 'AdamX' is not known"),
        (["--optimizer_args", "momentum=1"], "command line: --optimizer_args: AdamW takes no 'momentum'"),
        (["--lr_scheduler", "adafactor"], "command line: --lr_scheduler: adafactor is for optimizer_type = AdaFactor"),
        (["--lr_scheduler_args", "a=1"], "command line: --lr_scheduler_args: constant takes no 'a'"),
        (
            ["--optimizer_type", "AdaFactor", "--show_lr_schedule", "a.png"],
            "command line: --show_lr_schedule: AdaFactor takes its rate from the weights",
        ),
        (
            ["--optimizer_type", "AdaFactor", "--on_nonfinite", "rollback"],
            "command line: --on_nonfinite: rollback lowers the rate, and AdaFactor takes its own",
        ),
        (
            ["--lr_scheduler", "polynomial", "--learning_rate", "1e-8"],
            "command line: --lr_scheduler: polynomial cannot be used with learning_rate 1e-08",
        ),
    ],
)
def test_problems_name_the_setting_and_its_source(needed_flags, words, message):
    with pytest.raises(SettingError) as error:
        read_settings([*needed_flags, *words])
    assert message in str(error.value)


def test_all_problems_of_a_schedule_free_optimizer_name_both_settings(needed_flags):
    pytest.importorskip("schedulefree")
    words = ["--optimizer_type", "radam_schedulefree", "--lr_scheduler", "cosine", "--scale_weight_norms", "1"]
    with pytest.raises(SettingError) as error:
        read_settings([*needed_flags, *words])
    norms, schedule = str(error.value).splitlines()
    assert norms.startswith("command line: --scale_weight_norms: optimizer_type radam_schedulefree saves other weights")
    assert schedule.startswith("command line: --lr_scheduler: optimizer_type radam_schedulefree averages weights")


def test_a_low_rate_for_an_optimizer_that_finds_its_own_is_warned_of(needed_flags, caplog):
    pytest.importorskip("prodigyopt")
    read_settings([*needed_flags, "--optimizer_type", "Prodigy", "--unet_lr", "1"])
    (message,) = warnings(caplog)
    assert message == (
        "learning_rate: Prodigy finds the learning rate itself and multiplies it by this, which is 0.0001: give 1"
    )
    caplog.clear()
    read_settings([*needed_flags, "--optimizer_type", "Prodigy", "--learning_rate", "1"])
    assert warnings(caplog) == []


@pytest.mark.parametrize(("waves", "warns"), [("1", False), ("10", True), ("0.5", False), ("1.5", False)])
@pytest.mark.parametrize("schedule", ["cosine", "cosine_with_min_lr", "warmup_stable_decay"])
def test_a_cosine_that_ends_above_its_lowest_rate_is_warned_of(needed_flags, caplog, schedule, waves, warns):
    read_settings([*needed_flags, "--lr_scheduler", schedule, "--lr_scheduler_num_cycles", waves])
    expected = [f"command line: --lr_scheduler_num_cycles: after {waves} waves"] if warns else []
    assert [message.partition(" the")[0] for message in warnings(caplog)] == expected


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--lr_decay_steps", "5"], "lr_decay_steps"),
        (["--lr_scheduler_timescale", "5", "--lr_scheduler", "linear"], "lr_scheduler_timescale"),
        (["--lr_scheduler_min_lr_ratio", "0.1", "--lr_scheduler", "cosine"], "lr_scheduler_min_lr_ratio"),
        (
            ["--lr_warmup_steps", "5", "--lr_scheduler_type", "StepLR", "--lr_scheduler_args", "step_size=3"],
            "lr_warmup_steps",
        ),
        (["--learning_rate", "1e-5", "--optimizer_type", "AdaFactor"], "learning_rate"),
        (["--lr_scheduler", "cosine", "--optimizer_type", "AdaFactor"], "lr_scheduler"),
    ],
)
def test_what_does_nothing_is_named_once(needed_flags, caplog, words, name):
    read_settings([*needed_flags, *words])
    (message,) = warnings(caplog)
    assert message.startswith(f"command line: --{name} does nothing: ")


@pytest.mark.parametrize(
    "words",
    [
        ["--lr_scheduler", "warmup_stable_decay", "--lr_decay_steps", "5", "--lr_scheduler_min_lr_ratio", "0.1"],
        ["--lr_scheduler", "inverse_sqrt", "--lr_scheduler_timescale", "5"],
        ["--optimizer_type", "AdaFactor", "--lr_scheduler", "adafactor"],
        [
            "--optimizer_type",
            "AdaFactor",
            "--optimizer_args",
            "relative_step=False",
            "--learning_rate",
            "1e-5",
            "--on_nonfinite",
            "rollback",
        ],
    ],
)
def test_what_acts_is_not_warned_of(needed_flags, caplog, words):
    read_settings([*needed_flags, *words])
    assert warnings(caplog) == []
