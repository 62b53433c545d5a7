"""Times how pictures become cached latents, with a random VAE of the real size:  python tools/benchmark_latents.py

Prints JSON lines: pictures a second from files to files, by the trainer and by a plain loop over diffusers' VAE, which
computes convolutions over time; and what the VAE alone takes for a picture. --tiny runs on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import save_file

from library.anima_runtime.vae import AnimaVAE
from library.console import show
from library.data.augment import Variant, load_variant
from library.data.latent_files import LatentFiles
from library.data.latents import cache_latents_to_disk
from tools.anima_shapes import REAL, TINY, Sizes
from tools.benchmark_pictures import drawn_pictures
from tools.gpu_measures import synchronize, used_memory


def measure_latents(folder: Path, count: int, side: int, sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    """Lines for the plain loop, for the trainer at several batch sizes, and for the encodings alone."""
    pictures = drawn_pictures(folder / "pictures", count, side)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    plain = random_vae(sizes, dtype, device)
    flat = AnimaVAE(deepcopy(plain))
    lines = vae_lines(plain, flat, load_variant(pictures[0], Variant())[None].to(device), device)

    def loop() -> None:
        for number, picture in enumerate(pictures):
            moments = encode_plainly(plain, load_variant(picture, Variant())[None])
            save_file({"latents": moments[0].cpu()}, folder / f"{number}.safetensors")

    plain_loop = speed_of(loop, count, device)
    lines.append({"case": "plain_loop", **plain_loop})
    for batch_size in (1, 4):
        files = LatentFiles("benchmark", folder / f"cache{batch_size}")

        def cached(files: LatentFiles = files, batch_size: int = batch_size) -> None:
            cache_latents_to_disk(pictures, flat.encode, batch_size, files, show_progress=False)

        line = {"case": f"trainer_batch{batch_size}", **speed_of(cached, count, device)}
        line["times_plain"] = round(line["pictures_per_second"] / plain_loop["pictures_per_second"], 2)
        lines.append(line)
    return lines


def vae_lines(
    plain: AutoencoderKLQwenImage, flat: AnimaVAE, pixels_BCHW: torch.Tensor, device: torch.device
) -> list[dict[str, Any]]:
    """ms of a picture that is on the device already, by diffusers and by the trainer; and how far their latents are."""
    expected, latents = normalised(encode_plainly(plain, pixels_BCHW)), flat.encode(pixels_BCHW)
    four_BCHW = pixels_BCHW.expand(4, -1, -1, -1)

    def tuned() -> torch.Tensor:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            return flat.encode(pixels_BCHW)

    lines = [
        {"case": "encode_unfolded", "ms": milliseconds(lambda: encode_plainly(plain, pixels_BCHW), device)},
        {"case": "encode", "ms": milliseconds(lambda: flat.encode(pixels_BCHW), device)},
        {"case": "encode_batch4", "ms": milliseconds(lambda: flat.encode(four_BCHW), device) / 4},
        {"case": "decode", "ms": milliseconds(lambda: flat.decode(latents), device)},
    ]
    if device.type == "cuda":
        lines.append({"case": "encode_cudnn_benchmark", "ms": milliseconds(tuned, device)})
    lines[1]["distance"] = float((latents - expected).norm() / expected.norm())
    return lines


def encode_plainly(vae: AutoencoderKLQwenImage, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """The mode of the posterior, as diffusers computes it: by convolutions over time, of one frame."""
    with torch.no_grad():
        return vae.encode(pixels_BCHW[:, :, None].to(vae.device, vae.dtype)).latent_dist.mode()


def normalised(mode_BCTHW: torch.Tensor) -> torch.Tensor:
    """As `AnimaVAE.encode` gives it."""
    mean, std = AnimaVAE.statistics(mode_BCTHW.device)
    return (mode_BCTHW.float() - mean) / std


def random_vae(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> AutoencoderKLQwenImage:
    """Of the width of `sizes`."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoencoderKLQwenImage(base_dim=sizes.vae_width).to(dtype).eval().requires_grad_(False)


def milliseconds(work: Callable[[], object], device: torch.device, runs: int = 10) -> float:
    """Of one run, on average, with no wait between them."""
    for _ in range(2):
        work()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(runs):
        work()
    synchronize(device)
    return round(1000 * (time.perf_counter() - started) / runs, 2)


def speed_of(work: Callable[[], object], count: int, device: torch.device) -> dict[str, Any]:
    """Seconds and pictures a second of work on `count` pictures, and the memory it takes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    work()
    synchronize(device)
    seconds = time.perf_counter() - started
    return {
        "pictures_per_second": round(count / seconds, 2), "seconds": round(seconds, 2), **used_memory(device)
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--pictures", type=int, default=200, help="How many.")
    parser.add_argument("--side", type=int, default=1024, help="Their width and height, in pixels.")
    parser.add_argument("--tiny", action="store_true", help="The tiny VAE on the CPU.")
    arguments = parser.parse_args(argv)
    device, sizes = torch.device("cpu" if arguments.tiny else "cuda"), TINY if arguments.tiny else REAL
    gpu = {} if arguments.tiny else {"gpu": torch.cuda.get_device_name()}
    with tempfile.TemporaryDirectory() as folder:
        for line in measure_latents(Path(folder), arguments.pictures, arguments.side, sizes, device):
            show(json.dumps({**line, **gpu}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
