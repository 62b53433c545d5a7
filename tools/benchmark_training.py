"""Times the trainer's own step on random weights:  python tools/benchmark_training.py [CASE ...] [--steps 30]

Prints one JSON line a case: ms a step (median, min, max), images a second, peak memory, and the share of a measured
matrix product's speed that the step reaches. Without cases, all of CASES run in turn. --tiny runs on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import Accelerator
from torch import nn

from anima_train_network import AnimaNetworkTrainer
from library.anima_runtime.attention_backends import choose_attention
from library.anima_runtime.config import AnimaConfig
from library.anima_runtime.text_encoding import CaptionStates
from library.anima_runtime.transformer import AnimaTransformer
from library.console import show
from library.data.dataset import Batch
from library.settings import Settings
from library.settings.groups import run_groups
from library.training.run import RunSettings
from library.training.speed import SpeedSettings
from networks.settings import NetworkSettings
from networks.setup import create_network, import_network_module, network_arguments
from tools.make_tiny_anima import REAL, TINY, transformer_shapes

# A bf16 product of two matrices of this side measures what the card can do.
CEILING_SIDE = 8192


@dataclass(frozen=True)
class Case:
    """One row of the table. sides: (width, height) of each bucket, taken in turn."""

    network: Mapping[str, Any] = field(default_factory=lambda: LORA)
    sides: tuple[tuple[int, int], ...] = ((1024, 1024),)
    batch_size: int = 1
    checkpointing: bool = False
    attention: str = "auto"
    speed: SpeedSettings = SpeedSettings(torch_compile=True, cuda_graphs=True)


LORA = {"network_dim": 16, "network_alpha": 16.0}
LOKR = {"network_module": "networks.lokr_anima", "network_dim": 100000}
EAGER = SpeedSettings(torch_compile=False, cuda_graphs=False)
COMPILED = SpeedSettings(torch_compile=True, cuda_graphs=False)
# Buckets of about 1024² pixels as folders of real pictures give them.
MIXED = tuple((side, 1024 * 1024 // side // 64 * 64) for side in range(704, 1472, 64))

CASES = {
    "lora": Case(),
    "lora_512": Case(sides=((512, 512),)),
    "lora_batch4": Case(batch_size=4),
    "lokr": Case(network=LOKR),
    "lora_checkpointing": Case(checkpointing=True),
    "lora_mixed": Case(sides=MIXED, batch_size=2),
    "lora_eager": Case(speed=EAGER),
    "lokr_eager": Case(network=LOKR, speed=EAGER),
    "lora_512_eager": Case(sides=((512, 512),), speed=EAGER),
    "lora_cudnn": Case(attention="cudnn"),
    "lora_compiled": Case(speed=COMPILED),
    "lora_checkpointing_eager": Case(checkpointing=True, speed=EAGER),
}


class BenchmarkTrainer(AnimaNetworkTrainer):
    """The trainer with random weights made in place, and captions' states made up."""

    def __init__(self, settings: Settings, accelerator: Accelerator, config: AnimaConfig) -> None:
        super().__init__(settings, accelerator)
        self.config = config
        backend = settings.model.attention_backend
        self.attention = choose_attention(backend, config.head_size, self.dtype, self.device)

    def load_models(self) -> tuple[nn.Module, nn.Module]:
        with torch.device("meta"):
            transformer = AnimaTransformer(self.config)
        transformer = transformer.to(self.dtype).to_empty(device=self.device).requires_grad_(False)
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in transformer.parameters():
                weight.normal_(std=weight.shape[-1] ** -0.5) if weight.ndim > 1 else weight.fill_(1.0)
        transformer.gradient_checkpointing = bool(self.settings.run.gradient_checkpointing)
        transformer.use_attention(self.attention[1])
        self.transformer = transformer
        self.captions = SimpleNamespace(encode=self._made_up_states)
        return transformer, nn.Identity()

    def _made_up_states(self, captions: list[str]) -> list[CaptionStates]:
        """120 tokens a caption: a long list of tags."""
        generator = torch.Generator().manual_seed(len(captions))
        width = self.config.llm_adapter.source_width
        states = torch.randn(120, width, generator=generator).to(self.dtype)
        return [CaptionStates(states, torch.arange(1, 121)) for _ in captions]


def ready_trainer(case: Case, device: torch.device, config: AnimaConfig) -> BenchmarkTrainer:
    """A trainer with model, network and optimizer in place."""
    settings = case_settings(case, device)
    accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")
    trainer = BenchmarkTrainer(settings, accelerator, config)
    models = trainer.load_models()
    module = import_network_module(settings.network.network_module)
    trainer.network = create_network(settings.network, module, network_arguments(settings.network, {}), *models)
    trainer.network.to(device).apply_to(None, models[0], False, True)
    trainer.network.train()
    trainer.make_parts(total_steps=1000, buckets=len(case.sides))
    return trainer


def benchmark(case: Case, steps: int, warm_up: int, device: torch.device, config: AnimaConfig) -> dict[str, Any]:
    """Runs one case; ms are of whole steps, from a batch in main memory to the optimizer."""
    gc.collect()  # the last case's trainer refers to itself
    trainer = ready_trainer(case, device, config)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    batches = endless_batches(case, config)
    losses = []
    for number in range(max(warm_up, len(case.sides))):
        losses.append(trainer.step([next(batches)], case.batch_size))
        if number == 0:
            synchronize(device)
            first_step = time.perf_counter() - started
    synchronize(device)
    milliseconds = []
    for _ in range(steps):
        batch = next(batches)
        before = time.perf_counter()
        losses.append(trainer.step([batch], case.batch_size))
        synchronize(device)
        milliseconds.append(1000 * (time.perf_counter() - before))
    started = time.perf_counter()
    for _ in range(steps):
        losses.append(trainer.step([next(batches)], case.batch_size))
    synchronize(device)
    unwatched = 1000 * (time.perf_counter() - started) / steps
    return {
        "ms_median": round(statistics.median(milliseconds), 2),
        "ms_min": round(min(milliseconds), 2),
        "ms_max": round(max(milliseconds), 2),
        "ms_in_a_row": round(unwatched, 2),
        "images_per_second": round(1000 * case.batch_size / unwatched, 2),
        "first_step_s": round(first_step, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
        "loss_first": losses[0].item(),
        "loss_last": losses[-1].item(),
    }


def case_settings(case: Case, device: torch.device) -> Settings:
    """The settings that matter to a step; the rest as by default."""
    groups = {name: group() for name, group in run_groups().items()}
    precision = "bf16" if device.type == "cuda" else "no"
    run = RunSettings(mixed_precision=precision, gradient_checkpointing=case.checkpointing)
    optimizer = replace(groups["optimizer"], learning_rate=1e-4)
    network = NetworkSettings(**case.network)
    model = replace(groups["model"], anima_attention_backend=case.attention)
    changed = {"model": model, "run": run, "optimizer": optimizer, "network": network, "speed": case.speed}
    return Settings(**{**groups, **changed}, datasets=(), given={})


def endless_batches(case: Case, config: AnimaConfig) -> Iterator[Batch]:
    """Batches of random latents, bucket after bucket."""
    generator = torch.Generator().manual_seed(0)
    number = 0
    while True:
        width, height = case.sides[number % len(case.sides)]
        shape = (case.batch_size, config.latent_channels, 1, height // 8, width // 8)
        names = [f"{number}_{row}" for row in range(case.batch_size)]
        yield Batch(
            pixels_BCHW=None,
            latents_BCTHW=torch.randn(shape, generator=generator),
            captions=names,
            keys=[(0, name, 0) for name in names],
            paths=[Path(name) for name in names],
            bucket=(width, height),
            counted=True,
            loss_weights=torch.ones(case.batch_size),
            timestep_offsets=[0] * case.batch_size,
        )
        number += 1


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def ceiling(device: torch.device) -> float:
    """TFLOP/s of a large bf16 product: the median of 20."""
    a, b = (torch.randn(CEILING_SIDE, CEILING_SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    events = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return 2 * CEILING_SIDE**3 / statistics.median(s.elapsed_time(e) for s, e in events[5:]) / 1e9


def step_teraflops(case: Case, config: AnimaConfig) -> float:
    """What a step must compute without recomputing: 2 x the forward's products and 3 x (forward, 2 backward) attention.

    The frozen weights need no gradient, so a product costs its forward and one backward product.
    """
    tokens = statistics.fmean(w * h // (8 * config.patch_size) ** 2 for w, h in case.sides)
    width, context = config.width, 512
    linear = 2 * tokens * width * (4 * width + 2 * width + 2 * config.mlp_width)
    linear += 2 * context * 2 * config.context_width * width
    attention = 4 * tokens * width * (tokens + context)
    return case.batch_size * config.depth * (2 * linear + 3 * attention) / 1e12


def main() -> int:
    """Prints a line for each case asked for; a case that fails says so in its line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"Any of: {', '.join(CASES)}. None: all.")
    parser.add_argument("--steps", type=int, default=30, help="Timed steps of each case.")
    parser.add_argument("--warm_up", type=int, default=5, help="Steps before them; at least one a bucket.")
    parser.add_argument("--tiny", action="store_true", help="The tiny model on the CPU.")
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    device = torch.device("cpu" if arguments.tiny else "cuda")
    config = AnimaConfig.from_shapes(transformer_shapes(TINY if arguments.tiny else REAL, 32128))
    speed_of_light = None if arguments.tiny else ceiling(device)
    for name in arguments.cases or CASES:
        case = CASES[name] if not arguments.tiny else replace(CASES[name], sides=((64, 64),), speed=EAGER)
        result = benchmark(case, arguments.steps, arguments.warm_up, device, config)
        work = step_teraflops(case, config)
        result["teraflop"] = round(work, 2)
        if speed_of_light is not None:
            result["share_of_ceiling"] = round(work / result["ms_in_a_row"] * 1000 / speed_of_light, 3)
            torch._dynamo.reset()
        show(json.dumps({"case": name, **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
