"""What runs were measured to take (docs/performance.md) against what is told of them before."""

import pytest
import torch

from library.anima_runtime.config import AnimaConfig
from library.anima_runtime.memory.step_memory import AlsoThere, needed_memory
from networks import lora_anima
from tools.anima_shapes import REAL, transformer_shapes

GIB = 2**30
CONFIG = AnimaConfig.from_shapes(transformer_shapes(REAL, 32128))
ALONE = AlsoThere(qwen=False, vae=False, samples=False)


@pytest.fixture(scope="module")
def network():
    """The LoRA of rank 16 that was measured."""
    from library.anima_runtime.transformer import AnimaTransformer

    with torch.device("meta"):
        model = AnimaTransformer(CONFIG)
        return lora_anima.create_network(1.0, 16, 16.0, None, None, model)


# Peak of what PyTorch had in use on an H100, and what of the card was in use: both measured.
@pytest.mark.parametrize(
    ("tokens", "peak", "in_use"), [(1024, 7.28, 9.23), (4096, 16.04, 18.02), (4 * 4096, 51.0, 53.36)]
)
def test_it_is_what_was_measured_and_some_to_spare(network, tokens, peak, in_use):
    kept, _ = needed_memory(CONFIG, tokens, torch.bfloat16, False, True, network, ALONE)
    assert in_use + 0.5 < kept / GIB < in_use + 2.5
    assert peak + 2.5 < kept / GIB


def test_each_saver_and_each_other_part_counts(network):
    def needed(tokens=4096, eight_bits=False, fuses=True, also=ALONE):
        return needed_memory(CONFIG, tokens, torch.bfloat16, eight_bits, fuses, network, also)

    kept, selective = needed()
    assert selective < kept - 4 * GIB
    assert needed(fuses=False)[0] > kept + 1.5 * GIB
    assert kept - needed(eight_bits=True)[0] == pytest.approx(1.95 * GIB, rel=0.05)
    for name, size in (("qwen", 1.25), ("vae", 1.0), ("samples", 1.0)):
        assert needed(also=ALONE._replace(**{name: True})) == (kept + size * GIB, selective + size * GIB)


def test_a_network_that_is_not_known_counts_as_none(network):
    with_it, without = (
        needed_memory(CONFIG, 1024, torch.bfloat16, False, True, each, ALONE)[0] for each in (network, None)
    )
    assert with_it - without == 20 * sum(parameter.numel() for parameter in network.parameters())
