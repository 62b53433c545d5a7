"""Keys and values of several blocks by one product: the gradients of the modules, and nothing run for nothing."""

from dataclasses import replace

import pytest

from networks import lokr_anima, lora_anima
from networks.fused.blocks import fuse_blocks
from networks.fused.context import ContextProducts
from tests.networks.fused.test_blocks import CONFIG, WHOLE, check_equal, inputs, loss_and_gradients, model_and_network


@pytest.fixture(autouse=True)
def six_blocks(monkeypatch):
    """More than one product serves."""
    monkeypatch.setattr("tests.networks.fused.test_blocks.CONFIG", replace(CONFIG, depth=6))


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (lora_anima, {}),
        (lora_anima, {"network_reg_dims": r"blocks\.1\..*k_proj=20"}),
        (lora_anima, {"target_modules": "blocks.[1345].cross_attn.k_proj,blocks.2.cross_attn.v_proj"}),
        (lokr_anima, WHOLE),
        (lokr_anima, {**WHOLE, "target_modules": "blocks.[45].cross_attn.*_proj"}),
    ],
)
@pytest.mark.parametrize("eight_bits", [False, True])
def test_losses_and_gradients_are_those_of_the_modules(module, arguments, eight_bits):
    check_equal(
        *(
            loss_and_gradients(*model_and_network(module, arguments, fuses, eight_bits=eight_bits))
            for fuses in (False, True)
        )
    )


def test_a_product_is_of_neighbours_that_all_have_adapters_or_none():
    model, network = model_and_network(lora_anima, {"target_modules": "blocks.[12345].cross_attn.k_proj"}, fuses=False)
    joints = ContextProducts(model, network.adapters).joints
    context_NC = inputs()[2].flatten(0, 1)
    assert [len(joint.forward_any(context_NC)[0]) for joint in joints] == [2, 8, 2]
    assert [len(joint.parameters()) for joint in joints] == [0, 8, 2]


def test_blocks_before_the_first_that_is_trained_have_no_backward_pass():
    model, network = model_and_network(lora_anima, {"target_modules": "blocks.[345].cross_attn.*_proj"}, fuses=False)
    network.requires_grad_(False)
    for path, adapter in network.adapters.items():
        adapter.requires_grad_(path.endswith("_proj"))
    fuse_blocks(model, network)
    latents, timesteps, context = inputs()
    x = model(latents, timesteps, context.detach())
    assert len({step for step in _steps(x.grad_fn) if type(step).__name__ == "_RunBlockBackward"}) == 3


def _steps(node):
    """All steps of autograd before one, and itself."""
    if node is not None:
        yield node
        for before, _ in node.next_functions:
            yield from _steps(before)


def test_gradients_of_a_product_share_memory_that_is_taken_when_they_are_asked_for():
    model, network = model_and_network(lora_anima, {}, fuses=False)
    found = ContextProducts(model, network.adapters)(inputs()[2])
    assert len(found) == 6
    assert len({id(heads.room) for heads in found}) == 2
    assert not any(heads.room._gradients for heads in found)
    first, second = found[0].gradients(), found[1].gradients()
    assert first[0].untyped_storage().data_ptr() == second[1].untyped_storage().data_ptr()
    assert first[0].shape == found[0].k_NE.shape
