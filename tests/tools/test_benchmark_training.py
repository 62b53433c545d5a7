"""The benchmark runs its cases through the trainer's own step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tools.benchmark_training as benchmark_training
from library.anima_runtime.config import AnimaConfig
from tools.anima_shapes import REAL, transformer_shapes
from tools.benchmark_cases import CASES, MIXED, forward_teraflops, step_teraflops
from tools.benchmark_training import against_ceiling, interpolated, main
from tools.gpu_measures import used_memory

SHORT = ["--tiny", "--steps", "2", "--warm_up", "1"]


def lines_of(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_each_case_gives_a_line_of_numbers(capsys):
    cases = ["lora", "lokr", "lora_checkpointing", "lora_swap", "lora_fp8_swap"]
    assert main([*cases, *SHORT]) == 0
    lines = lines_of(capsys.readouterr().out)
    assert [line["case"] for line in lines] == cases
    for line in lines:
        assert 0 < line["ms_min"] <= line["ms_median"] <= line["ms_max"]
        assert line["loss_last"] < line["loss_first"] * 1.5
    plain, _, checkpointing, swapped, rounded = (line["loss_first"] for line in lines)
    assert plain == pytest.approx(checkpointing, rel=1e-5) == pytest.approx(swapped, rel=1e-5)
    assert plain != rounded == pytest.approx(plain, rel=0.1)


def test_a_steps_work_is_counted_as_the_peers_was():
    """By hand, at 1024² and the real size: 17.9 TFLOP forward, 40.2 a step; four pictures are four times as many."""
    config = AnimaConfig.from_shapes(transformer_shapes(REAL, 32128))
    assert sum(forward_teraflops((1024, 1024), config)) == pytest.approx(17.9, abs=0.05)
    assert sum(forward_teraflops((512, 512), config)) == pytest.approx(3.85, abs=0.01)
    assert step_teraflops(CASES["lora"], config) == pytest.approx(40.2, abs=0.05)
    assert step_teraflops(CASES["lora_batch4"], config) == pytest.approx(4 * step_teraflops(CASES["lora"], config))


def test_the_share_of_the_ceiling_is_of_what_the_work_takes_at_it():
    assert against_ceiling(40.0, 800.0, 100.0) == {"floor_ms": 50.0, "share_of_ceiling": 0.5}


def test_a_cards_memory_is_told_in_gib(monkeypatch):
    for name, value in (("max_memory_allocated", 5), ("max_memory_reserved", 6), ("mem_get_info", (70, 80))):
        of = lambda value=value: tuple(v * 2**30 for v in value) if isinstance(value, tuple) else value * 2**30  # noqa: E731
        monkeypatch.setattr(torch.cuda, name, of)
    assert used_memory(torch.device("cuda")) == {"peak_gib": 5, "reserved_gib": 6, "device_gib": 10}


def test_mixed_buckets_are_compared_with_some_of_them_run_alone(monkeypatch, capsys):
    asked = []
    original = benchmark_training.benchmark

    def recorded(case, *arguments, **options):
        asked.append(case.sides)
        return original(case, *arguments, **options)

    monkeypatch.setattr(benchmark_training, "benchmark", recorded)
    assert main(["lora_mixed", *SHORT]) == 0
    (line,) = lines_of(capsys.readouterr().out)
    assert asked == [tuple((w // 4, h // 4) for w, h in MIXED), ((320, 192),), ((256, 256),)]
    assert line["times_fixed_shape"] == pytest.approx(line["ms_mean"] / line["fixed_shape_ms"], abs=2e-3)


@pytest.mark.parametrize(("tokens", "expected"), [(100, 10), (150, 15), (200, 20), (250, 40), (300, 60), (50, 5)])
def test_times_between_shapes_lie_on_lines(tokens, expected):
    assert interpolated({200: 20.0, 100: 10.0, 300: 60.0}, tokens) == pytest.approx(expected)


def test_a_process_tells_how_long_it_took_to_its_first_step(capsys):
    assert main(["lora", "--tiny", "--until_first_step"]) == 0
    (line,) = lines_of(capsys.readouterr().out)
    assert 0 < line["imported_s"] <= line["models_ready_s"] <= line["first_step_done_s"]


def test_two_starts_share_the_compile_caches_of_a_new_folder(monkeypatch, capsys):
    folders = []

    def run(words, env, **options):
        folder = Path(env["TORCHINDUCTOR_CACHE_DIR"])
        folders.append((folder, list(folder.iterdir())))
        (folder / "kernel").touch()
        assert "--until_first_step" in words
        return subprocess.CompletedProcess(words, 0, 'loading\n{"first_step_done_s": 9.0}\n')

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["lora", "--tiny", "--start"]) == 0
    (cold, nothing), (warm, kernels) = folders
    assert cold == warm and nothing == [] and kernels == [cold / "kernel"]
    lines = lines_of(capsys.readouterr().out)
    assert [line["compiled_before"] for line in lines] == ["nothing", "everything"]


def test_a_profile_is_written_and_an_earlier_call_compared_with(tmp_path, capsys):
    earlier = tmp_path / "one.jsonl"
    earlier.write_text('loading\n{"case": "lora", "images_per_second": 0.5}\n{"case": "lokr"}\n', encoding="utf-8")
    assert main(["lora", *SHORT, "--against", str(earlier), "--profile", str(tmp_path / "profile.json")]) == 0
    (line,) = lines_of(capsys.readouterr().out)
    assert line["times_as_fast"] == pytest.approx(line["images_per_second"] / 0.5, rel=1e-2)
    profile = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))
    assert {"large products", "attention"} & {entry["kind"] for entry in profile["lora"]["kinds"]}


def test_losses_are_drawn_and_compared(tmp_path, capsys):
    picture = tmp_path / "losses.png"
    assert main(["lora", "lora_eager", "--tiny", "--steps", "1", "--warm_up", "1", "--losses", str(picture)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"losses"')]
    assert [(line["losses"], line["against"], line["steps"]) for line in lines] == [
        ("lora", "lora", 2), ("lora_eager", "lora", 2),
    ]  # fmt: skip
    assert lines[1]["difference_max"] == 0.0 and picture.read_bytes().startswith(b"\x89PNG")


def test_two_processes_count_the_images_of_both():
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    run = subprocess.run(
        [sys.executable, *launcher, benchmark_training.__file__, "lora", *SHORT],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}, check=True, stdout=subprocess.PIPE,
        text=True, timeout=120,
    )  # fmt: skip
    (line,) = lines_of(run.stdout)
    assert line["processes"] == 2
    assert line["images_per_second"] == pytest.approx(2000 / line["ms_mean"], rel=1e-2)


def test_an_unknown_case_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["lora_2048"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "lora_2048" in message and all(name in message for name in CASES)
