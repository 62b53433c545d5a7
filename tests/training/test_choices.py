"""What is chosen where nothing is set, why, and that a resumed run repeats it where it can."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from library.training.choices import (
    AS_BEFORE,
    AS_SET,
    Choice,
    StepMemory,
    attention_choice,
    attention_wanted,
    choose_checkpointing,
    choose_compiling,
    choose_fusing,
    choose_graphs,
    choose_parking,
    choose_selecting,
    recorded,
    told,
)
from library.training.run import RunSettings
from library.training.speed import STEPS_WORTH_COMPILING, SpeedSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16
NO_CUDA = "there is no CUDA device"


@pytest.fixture
def card(monkeypatch):
    """card(12): the CUDA device has so many GiB."""

    def put_in(gib, name="NVIDIA H200"):
        properties = type("Card", (), {"total_memory": gib * 2**30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)

    put_in(140)
    return put_in


@pytest.fixture
def trial(monkeypatch):
    """trial(reason): lets the trials of compiling and of own kernels find that obstacle, or none; counts them."""
    calls = []

    def set_obstacle(reason):
        for name in ("compile_obstacle", "fuse_obstacle"):
            monkeypatch.setattr(f"library.training.choices.{name}", lambda *where: calls.append(where) or reason)
        return calls

    return set_obstacle


@pytest.mark.parametrize(
    ("setting", "steps", "obstacle", "expected", "reason"),
    [
        (None, STEPS_WORTH_COMPILING, None, True, "300 steps are 300 or more"),
        (None, STEPS_WORTH_COMPILING - 1, None, False, "299 steps are fewer than 300"),
        (None, 10_000, "Triton is missing", False, "Triton is missing"),
        (True, 1, None, True, AS_SET),
        (True, 10_000, "Triton is missing", False, "Triton is missing"),
        (False, 10_000, None, False, AS_SET),
    ],
)
def test_compiling_is_as_set_or_where_it_pays(trial, caplog, setting, steps, obstacle, expected, reason):
    calls = trial(obstacle)
    found = choose_compiling(SpeedSettings(torch_compile=setting), {}, CUDA, steps, False, None)
    assert found == Choice("torch_compile", expected, reason)
    assert ("Triton is missing" in caplog.text) == (obstacle is not None)
    assert len(calls) == (expected or obstacle is not None)  # compiling is tried only where it is wanted


@pytest.mark.parametrize(
    ("setting", "before", "warned"),
    [
        (None, {}, []),
        (True, {}, ["torch_compile is off, and not on (as set): it swaps"]),
        (None, {"torch_compile": True}, ["torch_compile is off, and not on (as in the resumed run): it swaps"]),
    ],
)
def test_what_a_run_itself_has_against_compiling_is_told_where_it_was_asked_for(trial, caplog, setting, before, warned):
    calls = trial(None)
    found = choose_compiling(SpeedSettings(torch_compile=setting), before, CUDA, 1000, False, "it swaps")
    assert found == Choice("torch_compile", False, "it swaps")
    assert caplog.messages == warned
    assert not calls


@pytest.mark.parametrize(
    ("fused_then", "fuses", "expected"), [(True, True, False), (True, False, True), (False, False, False)]
)
def test_blocks_that_are_no_longer_fused_may_be_compiled(trial, fused_then, fuses, expected):
    trial(None)
    before = {"fused_blocks": fused_then, "torch_compile": False}
    assert choose_compiling(SpeedSettings(), before, CUDA, 1000, fuses, None).value is expected


def on_a_cpu(settings, before):
    return [
        choose_fusing(settings, before, CPU, torch.float32, lambda: pytest.fail("a kernel was tried")),
        choose_compiling(settings, before, CPU, 10_000, False, None),
        choose_graphs(settings, before, CPU, None),
    ]


def test_a_cpu_does_nothing_of_it_and_warns_only_when_asked_to(caplog):
    off = [Choice(name, False, NO_CUDA) for name in ("fused_blocks", "torch_compile", "cuda_graphs")]
    assert on_a_cpu(SpeedSettings(), {}) == off
    assert not caplog.text
    assert on_a_cpu(SpeedSettings(True, True, True), {}) == off
    assert caplog.messages == [f"{each.name} is off, and not on (as set): {NO_CUDA}" for each in off]


@pytest.mark.parametrize(
    ("setting", "obstacle", "expected"),
    [(None, None, True), (True, None, True), (False, None, False), (None, "fp16", False), (True, "fp16", False)],
)
def test_steps_are_recorded_on_cuda_unless_something_forbids_it(caplog, setting, obstacle, expected):
    assert choose_graphs(SpeedSettings(cuda_graphs=setting), {}, CUDA, obstacle).value is expected
    assert ("fp16" in caplog.text) == (setting is True and obstacle is not None)


@pytest.mark.parametrize(
    ("setting", "machine", "run", "expected", "reason"),
    [
        (None, None, None, True, "bfloat16 on NVIDIA H200"),
        (True, None, None, True, AS_SET),
        (False, None, None, False, AS_SET),
        (None, "Triton is not installed", "it has dropout", False, "Triton is not installed"),
        (True, None, "it has dropout", False, "it has dropout"),
    ],
)
def test_blocks_are_fused_unless_the_machine_or_else_the_run_forbids_it(
    trial, card, caplog, setting, machine, run, expected, reason
):
    trial(machine)
    found = choose_fusing(SpeedSettings(fused_blocks=setting), {}, CUDA, BF16, lambda: run)
    assert found == Choice("fused_blocks", expected, reason)
    wanted = "as set" if setting else "bfloat16 on NVIDIA H200"
    warned = [f"fused_blocks is off, and not on ({wanted}): {reason}"] if machine or run else []
    assert caplog.messages == warned


@pytest.mark.parametrize("then", [True, False])
def test_a_resumed_run_repeats_what_was_chosen_and_a_setting_wins(trial, card, caplog, then):
    """Though this run alone would be too short to be compiled."""
    trial(None)
    before = {"fused_blocks": then, "torch_compile": then, "cuda_graphs": then, "gradient_checkpointing": then}

    def values(speed, run):
        return [
            choose_fusing(speed, before, CUDA, BF16, lambda: None),
            choose_compiling(speed, before, CUDA, 10, then, None),
            choose_graphs(speed, before, CUDA, None),
            choose_checkpointing(run, before, CPU, swaps_blocks=False, fuses=False, memory=None),
        ]

    for choice in values(SpeedSettings(), RunSettings()):
        assert (choice.value, choice.reason) == (then, AS_BEFORE)
    other = not then
    for choice in values(SpeedSettings(other, other, other), RunSettings(gradient_checkpointing=other)):
        assert (choice.value, choice.reason) == (other, AS_SET)
    assert not caplog.text


def test_what_cannot_be_repeated_is_chosen_anew_with_a_warning(caplog):
    before = {"fused_blocks": True, "torch_compile": True, "cuda_graphs": True}
    assert [choice.value for choice in on_a_cpu(SpeedSettings(), before)] == [False] * 3
    assert caplog.messages == [f"{name} is off, and not on (as in the resumed run): {NO_CUDA}" for name in before]


def test_values_that_no_setting_has_are_not_repeated(caplog):
    assert on_a_cpu(SpeedSettings(), {"torch_compile": "on", "fused_blocks": None}) == on_a_cpu(SpeedSettings(), {})
    assert attention_wanted("auto", {"anima_attention_backend": True}) == "auto"


GIB = 2**30
# The run takes 18 GiB, 11 selectively, of so many.
WITHOUT = "without it, the run takes about 18.0 GiB of the"
ROOMY, TIGHT, SMALL = (StepMemory(18 * GIB, 11 * GIB, limit * GIB) for limit in (22, 15, 10))


def checkpointing(memory, fuses=True, before=(), swaps_blocks=False, device=CUDA, **settings):
    return choose_checkpointing(RunSettings(**settings), dict(before), device, swaps_blocks, fuses, memory)


@pytest.mark.parametrize(
    ("memory", "fuses", "settings", "chosen", "needed", "limit"),
    [
        (ROOMY, True, {}, False, 11, 22),
        (TIGHT, True, {}, False, 11, 15),
        (SMALL, True, {}, True, 11, 10),
        (TIGHT, False, {}, True, 18, 15),
        (TIGHT, True, {"selective_checkpointing": False}, True, 18, 15),
        (ROOMY, False, {}, False, 18, 22),
    ],
)
def test_gradient_checkpointing_follows_the_memory_that_the_run_takes(memory, fuses, settings, chosen, needed, limit):
    reason = f"without it, the run takes about {needed}.0 GiB of the {limit}.0 GiB that the card has for it"
    assert checkpointing(memory, fuses, **settings) == Choice("gradient_checkpointing", chosen, reason)
    for asked in (True, False):
        found = checkpointing(memory, fuses, gradient_checkpointing=asked, **settings)
        assert found == Choice("gradient_checkpointing", asked, AS_SET)


def test_nothing_is_computed_again_on_a_cpu():
    assert checkpointing(None, device=CPU) == Choice("gradient_checkpointing", False, NO_CUDA)


def test_without_checkpointing_a_small_card_goes_on_only_where_the_run_began_on_its_like(card, caplog):
    card(12, "a small card")
    here = recorded([Choice("gradient_checkpointing", False, AS_SET)], CUDA)
    found = checkpointing(SMALL, before=here)
    assert (found.value, found.reason) == (False, AS_BEFORE)
    assert not caplog.text
    elsewhere = {**here, "device": "NVIDIA H200 (140.0 GiB)"}
    assert checkpointing(SMALL, before=elsewhere).value is True
    assert caplog.messages == [
        "gradient_checkpointing is on, and not off (as in the resumed run): without it, the run takes about 11.0 GiB "
        "of the 10.0 GiB that the card has for it"
    ]
    assert checkpointing(ROOMY, before=elsewhere).value is False


def test_swapped_blocks_are_computed_again_whatever_the_resumed_run_did(caplog):
    chosen = Choice("gradient_checkpointing", True, "blocks_to_swap needs it")
    assert checkpointing(None, swaps_blocks=True, device=CPU) == chosen
    before = recorded([Choice("gradient_checkpointing", False, AS_SET)], CPU)
    assert checkpointing(None, before=before, swaps_blocks=True, device=CPU) == chosen
    assert "is on, and not off (as in the resumed run): blocks_to_swap needs it" in caplog.text


@pytest.mark.parametrize(
    ("memory", "checkpoints", "fuses", "chosen", "reason"),
    [
        (
            ROOMY,
            False,
            True,
            False,
            "without it, the run takes about 18.0 GiB of the 22.0 GiB that the card has for it",
        ),
        (TIGHT, False, True, True, f"{WITHOUT} 15.0 GiB that the card has for it"),
        (TIGHT, True, True, False, "gradient_checkpointing is on"),
        (TIGHT, False, False, False, "fused_blocks is off"),
        (None, False, False, False, NO_CUDA),
    ],
)
def test_less_is_kept_selectively_where_memory_asks_for_it(caplog, memory, checkpoints, fuses, chosen, reason):
    def choose(asked):
        return choose_selecting(RunSettings(selective_checkpointing=asked), checkpoints, fuses, memory)

    assert choose(None) == Choice("selective_checkpointing", chosen, reason)
    assert choose(False) == Choice("selective_checkpointing", False, AS_SET)
    assert not caplog.messages
    can = reason.startswith("without")
    assert choose(True) == Choice("selective_checkpointing", can, AS_SET if can else reason)
    assert caplog.messages == ([] if can else [f"selective_checkpointing is off, and not on (as set): {reason}"])


@pytest.mark.parametrize(
    ("asked", "then", "works", "wanted", "reason"),
    [
        ("auto", None, True, "auto", "auto, which leaves the kernel to PyTorch"),
        ("auto", "xformers", True, "xformers", AS_BEFORE),
        ("auto", "xformers", False, "xformers", "xformers, as in the resumed run, does not work here"),
        ("flash", "xformers", True, "flash", AS_SET),
        ("flash", None, False, "flash", "flash, as set, does not work here"),
    ],
)
def test_attention_is_as_set_or_as_it_was(asked, then, works, wanted, reason):
    before = {"anima_attention_backend": then}
    assert attention_wanted(asked, before) == wanted
    found = wanted if works and wanted != "auto" else "torch"
    assert attention_choice(asked, before, found) == Choice("anima_attention_backend", found, reason)


def test_they_are_told_a_line_each_and_recorded_by_name():
    choices = [Choice("anima_attention_backend", "torch", AS_SET), Choice("cuda_graphs", False, NO_CUDA)]
    assert told(choices).splitlines() == [
        "how steps are computed:", "  anima_attention_backend torch: as set", f"  cuda_graphs off: {NO_CUDA}",
    ]  # fmt: skip
    assert recorded(choices, CPU) == {"anima_attention_backend": "torch", "cuda_graphs": False, "device": "CPU"}


@pytest.mark.parametrize(
    ("device", "checkpoints", "fuses", "free_gib", "chosen", "reason"),
    [
        (CUDA, True, True, 8, True, "it takes 4.0 GiB of the 8.0 GiB of main memory that are free"),
        (CUDA, True, True, 7, False, "it takes 4.0 GiB of the 7.0 GiB of main memory that are free"),
        (CUDA, False, True, 99, False, "gradient_checkpointing is off"),
        (CUDA, True, False, 99, False, "fused_blocks is off"),
        (CPU, True, True, 99, False, NO_CUDA),
    ],
)
def test_checkpoints_wait_in_main_memory_where_that_has_room(
    monkeypatch, caplog, device, checkpoints, fuses, free_gib, chosen, reason
):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free_gib * 2**30))

    def choose(asked):
        settings = RunSettings(cpu_offload_checkpointing=asked)
        return choose_parking(settings, device, checkpoints, fuses, 4 * 2**30)

    assert choose(None) == Choice("cpu_offload_checkpointing", chosen, reason)
    assert choose(False) == Choice("cpu_offload_checkpointing", False, AS_SET)
    assert not caplog.messages
    can = device == CUDA and checkpoints and fuses
    assert choose(True) == Choice("cpu_offload_checkpointing", can, AS_SET if can else reason)
    assert caplog.messages == ([] if can else [f"cpu_offload_checkpointing is off, and not on (as set): {reason}"])
