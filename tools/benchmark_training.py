"""Times the trainer's own step on random weights:  python tools/benchmark_training.py [CASE ...] [--steps 30]

Prints one JSON line a case: ms a step (median, min, max, mean), images a second, peak memory, and the share of a
measured matrix product's speed that the step reaches. Without cases, all run in turn. --tiny runs on a CPU.

    --start             the time from a process's start to its first step, with nothing compiled before and again
    --memory_gib 8      as on a card of that size
    --profile FILE      what kernels a step spends its time in, as JSON
    --against FILE      how many times as fast as in the lines of an earlier call, which went to FILE

Several GPUs:  torchrun --nproc_per_node 2 tools/benchmark_training.py lora --against one.jsonl
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch
from accelerate import PartialState
from torch import distributed

from library.anima_runtime.config import AnimaConfig
from library.console import show
from library.plots import save_line_plot
from library.training.processes import join_group
from library.training.speed import MOST_FIXED_SHAPES
from tools.anima_shapes import REAL, TINY, transformer_shapes
from tools.benchmark_cases import (
    CASES,
    EAGER,
    BenchmarkTrainer,
    Case,
    endless_batches,
    image_tokens,
    ready_trainer,
    step_teraflops,
)
from tools.gpu_measures import ceilings, milliseconds_between, synchronize, time_mark, used_memory
from tools.kernel_profile import profile_step


def benchmark(
    case: Case, steps: int, warm_up: int, device: torch.device, config: AnimaConfig, profile: bool = False
) -> dict[str, Any]:
    """Runs one case; ms are of whole steps, from a batch in main memory to the optimizer, as the GPU ends them in turn.

    As in a training, nobody waits between them. Of several buckets each is run equally often, at least once before the
    time is taken.
    """
    gc.collect()  # the last case's trainer refers to itself
    world = PartialState()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = ready_trainer(case, device, config)
    batches = endless_batches(case, config, world.process_index)
    steps = -(-steps // len(case.sides)) * len(case.sides)

    def step() -> torch.Tensor:
        return trainer.step([next(batches)], case.batch_size * world.num_processes)

    started = time.perf_counter()
    losses = [step()]
    synchronize(device)
    first_step = time.perf_counter() - started
    losses += [step() for _ in range(max(warm_up, len(case.sides)) - 1)]
    marks = [time_mark(device)]
    for _ in range(steps):
        losses.append(step())
        marks.append(time_mark(device))
    synchronize(device)
    milliseconds = [milliseconds_between(*pair) for pair in pairwise(marks)]
    mean = milliseconds_between(marks[0], marks[-1]) / steps
    result = {
        "ms_median": round(statistics.median(milliseconds), 2),
        "ms_min": round(min(milliseconds), 2),
        "ms_max": round(max(milliseconds), 2),
        "ms_mean": round(mean, 2),
        "images_per_second": round(1000 * case.batch_size * world.num_processes / mean, 2),
        "first_step_s": round(first_step, 1),
        **used_memory(device),
        "loss_first": losses[0].item(),
        "loss_last": losses[-1].item(),
        "losses": torch.stack(losses).tolist(),
    }
    if profile:
        result["profile"] = profile_step(step, without_recording(trainer, step) if trainer.captured else None)
    return result


def without_recording(trainer: BenchmarkTrainer, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """`step` as it runs when it is not recorded; from its first call on the trainer records nothing more."""

    def plain() -> torch.Tensor:
        if trainer.captured is not None:
            trainer.captured.release()
            trainer.captured = None
        return step()

    return plain


def fixed_shape_ms(
    case: Case, shapes: int, steps: int, warm_up: int, device: torch.device, config: AnimaConfig
) -> float:
    """What the case's buckets would take on average, if each were the only one of its run.

    Only `shapes` of them are run so, each compiled for its own shape, evenly chosen by area from the least to the
    greatest; the others' times lie on straight lines between these, by their number of tokens. The buckets of a run
    differ little in area (6 % in lora_mixed). What this cannot see is a number of tokens that suits kernels worse than
    its neighbours do: the mixed case pays for that, the comparison may not.
    """
    by_area = {image_tokens(side, config): side for side in case.sides}
    areas = sorted(by_area)
    places = sorted({round(number * (len(areas) - 1) / max(shapes - 1, 1)) for number in range(shapes)})
    times = {}
    for tokens in (areas[place] for place in places):
        alone = replace(case, sides=(by_area[tokens],))
        times[tokens] = benchmark(alone, steps, warm_up, device, config)["ms_mean"]
        torch._dynamo.reset()
    return statistics.fmean(interpolated(times, image_tokens(side, config)) for side in case.sides)


def interpolated(times: dict[int, float], tokens: int) -> float:
    """A time between those of the nearest numbers of tokens; beyond the outermost, in proportion."""
    below, above = ([each for each in times if each <= tokens], [each for each in times if each >= tokens])
    if not below or not above:
        nearest = min(times, key=lambda each: abs(each - tokens))
        return times[nearest] * tokens / nearest
    low, high = max(below), min(above)
    if low == high:
        return times[low]
    return times[low] + (times[high] - times[low]) * (tokens - low) / (high - low)


def first_step_of_process(case: Case, device: torch.device, config: AnimaConfig) -> dict[str, Any]:
    """Seconds since this process began: until now, until models are there, and until the first step is done."""
    born = psutil.Process().create_time()
    imported = time.time() - born
    trainer = ready_trainer(case, device, config)
    synchronize(device)
    ready = time.time() - born
    trainer.step([next(endless_batches(case, config))], case.batch_size)
    synchronize(device)
    done = time.time() - born
    counters = torch._dynamo.utils.counters
    found = {name: dict(counters[name]) for name in ("inductor", "aot_autograd")}
    hits = {name: count for group in found.values() for name, count in group.items() if "cache" in name}
    return {
        "imported_s": round(imported, 1), "models_ready_s": round(ready, 1), "first_step_done_s": round(done, 1),
        "first_step_s": round(done - ready, 1), "compile_caches": hits,
    }  # fmt: skip


def show_starts(name: str, tiny: bool) -> None:
    """Starts a process with empty compile caches, and one that finds what the first left there; a line for each."""
    words = [sys.executable, __file__, name, "--until_first_step", *(["--tiny"] if tiny else [])]
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        for compiled in ("nothing", "everything"):
            child = subprocess.run(words, env={**os.environ, **caches}, check=True, stdout=subprocess.PIPE, text=True)
            (line,) = (line for line in child.stdout.splitlines() if line.startswith("{"))
            show(json.dumps({"case": name, "compiled_before": compiled, **json.loads(line)}))


def tiny_case(case: Case) -> Case:
    """The case on a CPU: sides of a quarter, nothing compiled, no memory limits."""
    return replace(case, sides=tuple((width // 4, height // 4) for width, height in case.sides), speed=EAGER)


def compared(result: dict[str, Any], earlier: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How many times as many images a second as in the earlier line of the same case, if there is one."""
    same = [line for line in earlier if line.get("case") == result["case"] and "images_per_second" in line]
    return {"times_as_fast": round(result["images_per_second"] / same[-1]["images_per_second"], 3)} if same else {}


def against_ceiling(work: float, ceiling: float, milliseconds: float) -> dict[str, float]:
    """What so many TFLOP take at so many TFLOP/s, and what share of a step's time that is."""
    floor = 1000 * work / ceiling
    return {"floor_ms": round(floor, 2), "share_of_ceiling": round(floor / milliseconds, 3)}


def measured(name: str, case: Case, arguments: argparse.Namespace, config: AnimaConfig) -> dict[str, Any]:
    """A case's line."""
    device, limits = torch.device("cpu" if arguments.tiny else "cuda"), {}
    if not arguments.tiny:
        limits = ceilings(device)
    own = (arguments.steps, arguments.warm_up, device, config)
    result = {"case": name, **benchmark(case, *own, profile=arguments.profile is not None)}
    work = step_teraflops(case, config)
    result["teraflop"] = round(work, 2)
    if limits:
        result |= {"gpu": torch.cuda.get_device_name(), **limits}
        result |= against_ceiling(work, limits["ceiling_tflops"], result["ms_median"])
        torch._dynamo.reset()
    if len(case.sides) > MOST_FIXED_SHAPES and arguments.fixed_shapes > 0:
        fixed = fixed_shape_ms(case, arguments.fixed_shapes, *own)
        result |= {"fixed_shape_ms": round(fixed, 2), "times_fixed_shape": round(result["ms_mean"] / fixed, 3)}
    return result


def read_lines(path: Path | None) -> list[dict[str, Any]]:
    """The JSON lines of a file; other lines are left out."""
    lines = [] if path is None else path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def show_losses(losses: Mapping[str, Sequence[float]], picture: Path) -> None:
    """Draws each case's losses, and prints how far they are from the first case's: all met the same inputs."""
    save_line_plot(picture, "Loss of each step", "step", {name: list(enumerate(own)) for name, own in losses.items()})
    first = next(iter(losses))
    for name, own in losses.items():
        pairs = list(zip(own, losses[first], strict=False))
        differences = [abs(a - b) / b for a, b in pairs]
        line = {"losses": name, "against": first, "steps": len(pairs), "mean": statistics.fmean(own[: len(pairs)])}
        line |= {"difference_mean": statistics.fmean(differences), "difference_max": max(differences)}
        show(json.dumps({key: round(value, 7) if isinstance(value, float) else value for key, value in line.items()}))


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; SystemExit for cases that there are not."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"Any of: {', '.join(CASES)}. None: all.")
    parser.add_argument("--steps", type=int, default=30, help="Timed steps of each case.")
    parser.add_argument("--warm_up", type=int, default=5, help="Steps before them; at least one a bucket.")
    parser.add_argument("--tiny", action="store_true", help="The tiny model on the CPU.")
    parser.add_argument(
        "--fixed_shapes", type=int, default=2, help="Buckets of a mixed case that are timed alone to compare with."
    )
    parser.add_argument("--start", action="store_true", help="Time processes until their first step instead.")
    parser.add_argument("--until_first_step", action="store_true", help="Time this process until its first step.")
    parser.add_argument("--memory_gib", type=float, help="Let PyTorch take no more than so much of the card.")
    parser.add_argument("--profile", type=Path, help="File for the kernels of 3 steps of each case.")
    parser.add_argument(
        "--losses", type=Path, help="Picture of all steps' losses; a line compares each case's with the first's."
    )
    parser.add_argument("--against", type=Path, help="JSON lines of an earlier call to compare with.")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each case asked for."""
    arguments = parsed(argv)
    config = AnimaConfig.from_shapes(transformer_shapes(TINY if arguments.tiny else REAL, 32128))
    join_group()
    world = PartialState(cpu=arguments.tiny)
    if arguments.memory_gib is not None and not arguments.tiny:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.memory_gib * 2**30 / total))
    profiles, losses, earlier = {}, {}, read_lines(arguments.against)
    for name in arguments.cases or CASES:
        case = tiny_case(CASES[name]) if arguments.tiny else CASES[name]
        if arguments.start:
            show_starts(name, arguments.tiny)
            continue
        if arguments.until_first_step:
            device = torch.device("cpu" if arguments.tiny else "cuda")
            show(json.dumps(first_step_of_process(case, device, config)))
            continue
        result = measured(name, case, arguments, config)
        profiles[name], losses[name] = result.pop("profile", None), result.pop("losses")
        if world.is_main_process:
            show(json.dumps({**result, "processes": world.num_processes, **compared(result, earlier)}))
            if arguments.profile is not None:
                arguments.profile.write_text(json.dumps(profiles, indent=1), encoding="utf-8")
    if arguments.losses is not None and world.is_main_process:
        show_losses(losses, arguments.losses)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
