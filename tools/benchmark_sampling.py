"""Times the rendering of sample pictures on random weights:  python tools/benchmark_sampling.py [CASE ...]

Prints one JSON line a case: ms of a forward pass of the transformer for one picture, over 30 steps of the trainer's own
sampling at 1024x1024; what the first picture takes, with recording and compiling; and how far the latents are from the
first case's. With guidance both of a step's passes run as one batch, and each counts. --tiny runs on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from library.anima_runtime.config import AnimaConfig
from library.anima_runtime.sampling.prompts import PromptRequest
from library.anima_runtime.sampling.recorded import RecordedForward
from library.anima_runtime.sampling.rendering import denoise
from library.console import show
from library.training.speed import SpeedSettings
from tools.anima_shapes import REAL, TINY, transformer_shapes
from tools.benchmark_cases import COMPILED, EAGER, FUSED, BenchmarkTrainer, Case, forward_teraflops, ready_trainer
from tools.gpu_measures import ceilings, synchronize, used_memory


@dataclass(frozen=True)
class SamplingCase:
    """adapter: whether the LoRA takes part. apart: prompt and negative one after the other, not as a batch."""

    adapter: bool = True
    apart: bool = False
    recorded: bool = False
    speed: SpeedSettings = EAGER


# base: without an adapter, as the first pictures of a run are. lora_fused_recorded: as a run's pictures are by default.
CASES = {
    "base_apart": SamplingCase(adapter=False, apart=True),
    "base": SamplingCase(adapter=False),
    "base_recorded": SamplingCase(adapter=False, recorded=True),
    "lora_apart": SamplingCase(apart=True),
    "lora": SamplingCase(),
    "lora_recorded": SamplingCase(recorded=True),
    "lora_fused": SamplingCase(speed=FUSED),
    "lora_fused_recorded": SamplingCase(recorded=True, speed=FUSED),
    "lora_compiled": SamplingCase(speed=COMPILED),
    "lora_compiled_recorded": SamplingCase(recorded=True, speed=COMPILED),
}


def benchmark(
    case: SamplingCase, trainer: BenchmarkTrainer, request: PromptRequest, pictures: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """One case's numbers, and the latents that it ends with."""
    device, config = trainer.device, trainer.config
    noise, contexts = _inputs(request, config, device)
    forward = RecordedForward(trainer.transformer) if case.recorded else trainer.transformer

    def render() -> torch.Tensor:
        if case.apart:
            return _denoise_apart(forward, noise, contexts, request)
        return denoise(forward, noise, contexts, request)

    seconds = []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad(), nullcontext() if case.adapter else trainer.network.disabled():
        for _ in range(1 + pictures):
            synchronize(device)
            started = time.perf_counter()
            latents = render()
            synchronize(device)
            seconds.append(time.perf_counter() - started)
    found = {
        "ms_per_forward": round(1000 * statistics.median(seconds[1:]) / (2 * request.steps), 2),
        "first_picture_s": round(seconds[0], 2),
        "picture_s": round(statistics.median(seconds[1:]), 2),
        **used_memory(device),
    }
    return found, latents


def _inputs(
    request: PromptRequest, config: AnimaConfig, device: torch.device
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(request.seed)
    sides = request.height // 8, request.width // 8
    noise = torch.randn((1, config.latent_channels, 1, *sides), generator=generator).to(device)
    contexts = [torch.randn(1, 512, config.context_width, generator=generator).to(device) for _ in range(2)]
    return noise, contexts


def _denoise_apart(
    forward: Callable[..., torch.Tensor],
    noise: torch.Tensor,
    contexts: Sequence[torch.Tensor],
    request: PromptRequest,
) -> torch.Tensor:
    """The same picture with a pass for each context."""

    def split(latents: torch.Tensor, sigmas: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        rows = zip(latents.split(1), sigmas.split(1), context.split(1), strict=True)
        return torch.cat([forward(*row) for row in rows])

    return denoise(split, noise, contexts, request)


def prepared(speed: SpeedSettings, device: torch.device, config: AnimaConfig) -> BenchmarkTrainer:
    """A trainer with a LoRA that changes something, ready to render."""
    trainer = ready_trainer(Case(speed=replace(speed, cuda_graphs=False)), device, config)
    generator = torch.Generator(trainer.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainer.network.named_parameters():
            if name.endswith("lora_up.weight"):
                parameter.normal_(std=0.02, generator=generator)
    trainer.network.eval()
    trainer.transformer.eval()
    return trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each case asked for."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"Any of: {', '.join(CASES)}. None: all.")
    parser.add_argument("--pictures", type=int, default=3, help="Timed pictures of each case, after one more.")
    parser.add_argument("--tiny", action="store_true", help="The tiny model on the CPU, 64x64, 4 steps.")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    device = torch.device("cpu" if arguments.tiny else "cuda")
    config = AnimaConfig.from_shapes(transformer_shapes(TINY if arguments.tiny else REAL, 32128))
    side, steps = (64, 4) if arguments.tiny else (1024, 30)
    request = PromptRequest("", width=side, height=side, steps=steps)
    work = sum(forward_teraflops((side, side), config))
    limits = {} if arguments.tiny else {"gpu": torch.cuda.get_device_name(), **ceilings(device)}
    names = arguments.cases or list(CASES)
    first: dict[bool, torch.Tensor] = {}
    trainer, speed = None, None
    for name in names:
        case = CASES[name]
        if trainer is None or case.speed != speed:
            trainer, speed = None, case.speed
            gc.collect()  # the last trainer refers to itself
            trainer = prepared(EAGER if arguments.tiny else speed, device, config)
        found, latents = benchmark(case, trainer, request, arguments.pictures)
        expected = first.setdefault(case.adapter, latents)
        found["distance"] = float((latents - expected).norm() / expected.norm())
        if limits:
            found["share_of_ceiling"] = round(1000 * work / found["ms_per_forward"] / limits["ceiling_tflops"], 3)
        show(json.dumps({"case": name, **found, "teraflop": round(work, 3), **limits}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
