"""Memory of the tools that read whole files: a few times the largest tensor, however many there are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

WIDE, LONG, MODULES = 512, 8192, 8
LARGEST_MB = WIDE * LONG * 4 / 2**20  # 16 MB in float32; all modules are eight times that
ROOT = Path(__file__).resolve().parents[2]

# A small call goes first, so that libraries and their buffers are there before memory is looked at.
MEASURED = """
import sys
from pathlib import Path
import torch
from tools.adapter_output import AdapterWriter
from tools import convert_adapter, extract_adapter, resize_adapter

def peak_mb():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

def convert(source, target):
    convert_adapter.main(["--input", source, "--output", target, "--format", "kohya"]) and sys.exit("failed")

def resize(source, target, *more):
    resize_adapter.main(["--input", source, "--output", target, "--rank", "8", *more]) and sys.exit("failed")

def extract(source, target, *more):
    files = [f"{source}-base", f"{source}-tuned"]
    arguments = extract_adapter._parse(["--base", files[0], "--tuned", files[1], "--output", target, *more])
    make = extract_adapter._maker(arguments)
    with AdapterWriter(arguments) as writer:
        extract_adapter.extract(*map(Path, files), make, torch.device("cpu"), writer, with_norms=True)
        writer.write({})

tool, folder, *more = sys.argv[1:]
globals()[tool](f"{folder}/small", f"{folder}/small-out", *more)
Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is in use now
before = peak_mb()
globals()[tool](f"{folder}/large", f"{folder}/large-out", *more)
print(peak_mb() - before)
"""


def names():
    return [f"blocks.{block}.mlp.layer1" for block in range(MODULES)]


def write_lokr(file, out_features, in_features):
    """Whole matrices: w2 has half of the weight's numbers."""
    own = {"lokr_w1": torch.randn(1, 2), "lokr_w2": torch.randn(out_features, in_features // 2)}
    save_file({f"diffusion_model.{name}.{key}": own[key].clone() for name in names() for key in own}, file)


def write_checkpoint(file, out_features, in_features):
    save_file({f"net.{name}.weight": torch.randn(out_features, in_features) for name in names()}, file)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells and resets the peak")
@pytest.mark.parametrize(
    ("call", "times"),
    [
        # w2 is half of the largest tensor. It is mapped from its file and read again from the scratch file.
        (["convert"], 1.5),
        # w2, and mapped from its file; its Gram matrix, eigenvectors and eigh's workspace in float64; the factors.
        (["resize"], 3),
        # Two tensors in float32, one of them still mapped from its file; later their difference and its factors.
        (["extract", "--type", "lora", "--rank", "8"], 4),
        # Then the difference, and it again with its blocks as rows.
        (["extract", "--type", "lokr"], 4),
    ],
)
def test_memory_follows_the_largest_tensor(tmp_path, call, times):
    for size, sides in (("small", (64, 32)), ("large", (LONG, WIDE))):
        write_lokr(tmp_path / size, *sides)
        write_checkpoint(tmp_path / f"{size}-base", *sides)
        write_checkpoint(tmp_path / f"{size}-tuned", *sides)
    words = [sys.executable, "-c", MEASURED, call[0], str(tmp_path), *call[1:]]
    # What is freed goes back to the system at once, as it does by itself from 32 MB on, which real tensors have.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert LARGEST_MB / 4 < float(done.stdout.split()[-1]) < times * LARGEST_MB
