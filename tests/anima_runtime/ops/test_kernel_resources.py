"""Every kernel compiles for the cards it is launched on, and a program of it fits their shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# What a program may take at most: RTX cards have least.
RTX, HOPPER = 99 * 2**10, 227 * 2**10


@pytest.fixture(scope="module")
def needs(tmp_path_factory):
    """{(kernel, capability): bytes}, compiled in a process of its own, as in this one kernels are interpreted."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).with_name("kernel_resources.py")
    child = subprocess.run(
        [sys.executable, str(script), "86", "90"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert child.returncode == 0, child.stderr
    lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    found = {}
    for line in lines:
        place = line["kernel"], line["capability"]
        found[place] = max(line["bytes"], found.get(place, 0))
    return found


def test_all_but_attention_to_few_keys_fit_rtx_cards(needs):
    """Where it does not fit, `few_keys_kernels.attends` finds that out."""
    too_large = {kernel for (kernel, capability), size in needs.items() if capability == 86 and size > RTX}
    assert too_large == {"_attend_few_keys", "_attend_few_keys_backward"}


def test_all_fit_hopper(needs):
    sizes = {kernel: size for (kernel, capability), size in needs.items() if capability == 90}
    assert len(sizes) == 17
    assert max(sizes.values()) <= HOPPER
