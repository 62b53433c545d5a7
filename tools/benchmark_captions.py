"""Times a training step with captions drawn anew at each use:  python tools/benchmark_captions.py

Captions are encoded on the way, by a random Qwen3 of the real size, and cached, as with cache_text_encoder_outputs.
Prints JSON lines: one caption for each picture, 8 of which one is drawn at each use, and the ratio. --tiny runs on a
CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import Qwen3Model
from transformers.utils import logging as transformers_logging

from library.anima_runtime.config import AnimaConfig
from library.anima_runtime.text.encoding import TextEncoder
from library.anima_runtime.text.tokenizers import load_qwen_tokenizer, load_t5_tokenizer
from library.console import show
from library.data.dataset import TrainingBatches
from library.data.pictures import Picture
from tools.anima_shapes import REAL, TINY, Sizes, transformer_shapes
from tools.benchmark_cases import EAGER, RECORDED, BenchmarkTrainer, Case, ready_trainer
from tools.benchmark_pictures import drawn_pictures
from tools.gpu_measures import synchronize
from tools.make_tiny_anima import qwen3_config
from tools.tiny_tokenizers import write_qwen_tokenizer, write_t5_tokenizer

VARIANTS = 8


def measure_captions(
    folder: Path, count: int, side: int, epochs: int, sizes: Sizes, device: torch.device
) -> list[dict[str, Any]]:
    """A line for fixed captions and one for live ones, each run twice in turn with an empty cache, and their ratios.

    An epoch shows each picture ten times. ms_in_a_row: all of a run over its steps, with the encoding ahead among them;
    ms_without_encoding: less what that took, which in a longer run weighs little, as a caption is encoded once.
    """
    trainer = captioned_trainer(folder, side, sizes, device)
    kinds = {"fixed": 1, "live": VARIANTS}
    pictures = {kind: drawn_pictures(folder / kind, count, side, lines) for kind, lines in kinds.items()}
    run_epochs(trainer, pictures["fixed"][:1], 1, folder)  # compiled and recorded here
    runs = {kind: [] for kind in kinds}
    for _ in range(2):
        for kind in kinds:
            runs[kind].append(run_epochs(trainer, pictures[kind], epochs, folder))
    lines = [{"case": f"captions_{kind}", **summed(found)} for kind, found in runs.items()]
    ratios = {name: round(lines[1][name] / lines[0][name], 4) for name in ("ms_in_a_row", "ms_without_encoding")}
    return [*lines, {"case": "captions_live_over_fixed", **ratios}]


def run_epochs(trainer: BenchmarkTrainer, pictures: Sequence[Picture], epochs: int, folder: Path) -> dict[str, Any]:
    """Trains on the pictures as a run does; what it took, in seconds, and how many captions were encoded."""
    trainer.prepare_text(folder)  # an empty cache
    encoded, spent, steps = [], [], 0

    def announce(captions: list[str]) -> None:
        synchronize(trainer.device)
        started = time.perf_counter()
        trainer.encode_ahead(captions)
        synchronize(trainer.device)
        spent.append(time.perf_counter() - started)
        encoded.extend(captions)

    latents = {(picture.key, False): made_up_latents(picture, trainer.config) for picture in pictures}
    total = epochs * sum(picture.repeats for picture in pictures)
    batches = TrainingBatches(pictures, [1], seed=0, latents=latents, total_steps=total, announce=announce)
    synchronize(trainer.device)
    started = time.perf_counter()
    for epoch in range(epochs):
        for window in batches.epoch(epoch):
            trainer.step(window.batches, window.sample_count)
            steps += 1
    synchronize(trainer.device)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "steps": steps, "encoding": sum(spent), "captions": len(set(encoded))}


def summed(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line for several runs."""
    steps, seconds = (sum(run[name] for run in runs) for name in ("steps", "seconds"))
    return {
        "ms_in_a_row": round(1000 * seconds / steps, 2),
        "ms_without_encoding": round(1000 * (seconds - sum(run["encoding"] for run in runs)) / steps, 2),
        "ms_of_each_run": [round(1000 * run["seconds"] / run["steps"], 2) for run in runs],
        "steps": steps,
        "encoding_s": [round(run["encoding"], 2) for run in runs],
        "captions": [run["captions"] for run in runs],
    }


def captioned_trainer(folder: Path, side: int, sizes: Sizes, device: torch.device) -> BenchmarkTrainer:
    """A trainer whose captions go through Qwen3 of the given sizes, with small tokenizers, and the text cache."""
    config = AnimaConfig.from_shapes(transformer_shapes(sizes, 32128))
    speed = RECORDED if device.type == "cuda" else EAGER
    trainer = ready_trainer(Case(sides=((side, side),), speed=speed), device, config)
    data = replace(trainer.settings.data, cache_latents=True, cache_text_encoder_outputs=True)
    trainer.settings = replace(trainer.settings, data=data)
    qwen_tokenizer = write_qwen_tokenizer(folder / "qwen3")
    write_t5_tokenizer(folder / "t5")
    with torch.device(trainer.device):
        qwen = Qwen3Model(qwen3_config(sizes, qwen_tokenizer)).to(trainer.dtype).eval().requires_grad_(False)
    tokenizers = load_qwen_tokenizer(folder / "qwen3"), load_t5_tokenizer(folder / "t5")
    trainer.text_encoder = TextEncoder(qwen, *tokenizers)
    return trainer


def made_up_latents(picture: Picture, config: AnimaConfig) -> torch.Tensor:
    width, height = picture.bucket
    return torch.randn(config.latent_channels, 1, height // 8, width // 8)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--pictures", type=int, default=20, help="Pictures that are trained.")
    parser.add_argument("--epochs", type=int, default=1, help="Epochs of ten times each, in each of four runs.")
    parser.add_argument("--side", type=int, default=1024, help="Of all pictures, in pixels.")
    parser.add_argument("--tiny", action="store_true", help="Tiny models on the CPU.")
    arguments = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    device, sizes = torch.device("cpu" if arguments.tiny else "cuda"), TINY if arguments.tiny else REAL
    gpu = {} if arguments.tiny else {"gpu": torch.cuda.get_device_name()}
    with tempfile.TemporaryDirectory() as folder:
        own = (arguments.pictures, arguments.side, arguments.epochs, sizes, device)
        for line in measure_captions(Path(folder), *own):
            show(json.dumps({**line, **gpu}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
