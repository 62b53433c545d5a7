"""What is computed again in the backward pass gives the same bits, and what is kept for it is little."""

import gc
import weakref
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from library.anima_runtime.memory.parking import Parking
from networks.fused.blocks import fuse_blocks
from networks.fused.checkpoint import parked_bytes
from tests.networks.fused.test_blocks import CASES, CONFIG, inputs, model_and_network

KINDS = ["kept", "selective", "computed again", "parked"]


def fused(case, kind, dtype=torch.float64, behind=0):
    """A model with fused blocks, its network, and its parking."""
    model, network = model_and_network(*CASES[case], fuses=False)
    model.to(dtype)
    network.float() if dtype == torch.bfloat16 else network.to(dtype)
    parking = Parking(torch.device("cpu"), behind=behind, least_bytes=0) if kind == "parked" else None
    fuse_blocks(model, network, parking, selective=kind == "selective")
    model.gradient_checkpointing = kind in ("computed again", "parked")
    return model, network, parking


def gradients(model, network, passes=1):
    """Of each of the blocks' adapters."""
    losses = [model(*inputs(8), zero_rows=40).square().mean() for _ in range(passes)]
    parameters = dict(network.named_parameters())
    found = torch.autograd.grad(sum(losses), list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_all_gradients_are_the_same_bits(case, dtype):
    expected = gradients(*fused(case, "kept", dtype)[:2])
    for kind in KINDS[1:]:
        found = gradients(*fused(case, kind, dtype)[:2])
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), (kind, name)


@pytest.mark.parametrize("behind", [0, 3, 99])
def test_several_forward_passes_may_come_before_their_backward_passes(behind):
    expected = gradients(*fused("lora", "kept")[:2], passes=3)
    found = gradients(*fused("lora", "parked", behind=behind)[:2], passes=3)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_parked_tensors_take_what_is_told():
    """But for those of the last block, which are wanted at once, and for ranks and heads, which are few."""
    model, _, parking = fused("lora of the modulations too", "parked")
    taken = []
    leave = parking.leave
    parking.leave = lambda tensors: taken.extend(tensor.nbytes for tensor in tensors) or leave(tensors)
    latents, timesteps, context = inputs(8)
    model(latents, timesteps, context)
    tokens = 2 * 6 * 8
    large = [size for size in taken if size >= tokens * CONFIG.width * 8]
    told = parked_bytes(CONFIG, tokens, torch.float64) * (CONFIG.depth - 1) / CONFIG.depth
    assert sum(large) == pytest.approx(told, rel=0.2)


def test_nothing_is_parked_where_no_gradients_are_wanted():
    model, network, parking = fused("lora", "parked")
    parking.leave = Mock(wraps=parking.leave)
    with torch.no_grad():
        model(*inputs(8))
    network.requires_grad_(False)
    latents, timesteps, context = inputs(8)
    model(latents, timesteps, context.detach())
    parking.leave.assert_not_called()
    model(latents, timesteps, context)
    assert parking.leave.called


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside it and still there. peak: the most there were at once."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.see, results)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return results

    def see(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, storage._cdata)

    def leave_out(self, tensor):
        self.sizes[tensor.untyped_storage()._cdata] = 0


@pytest.mark.parametrize("kind", KINDS)
def test_memory_grows_with_the_blocks_by_what_is_kept_alone(monkeypatch, kind):
    """In tensors of the residual stream's size: 1 for a block's input, less for ranks, sums and gradients."""
    peaks = {}
    for depth in (2, 6):
        monkeypatch.setattr("tests.networks.fused.test_blocks.CONFIG", replace(CONFIG, depth=depth))
        model, network, parking = fused("lora", kind)
        live = Live()
        for parameter in (*model.parameters(), *network.parameters()):
            live.leave_out(parameter)
        if parking is not None:
            take_rooms = parking._new_rooms

            def new_rooms(nbytes, take_rooms=take_rooms, live=live):
                rooms = take_rooms(nbytes)
                for room in rooms:
                    live.leave_out(room)
                return rooms

            parking._new_rooms = new_rooms
        _, timesteps, context = inputs(8)
        latents = torch.randn(2, 16, 1, 32, 64, dtype=torch.float64)
        with live:
            loss = model(latents, timesteps, context).square().mean()
            torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
        peaks[depth] = live.peak
    one = 2 * 16 * 32 * CONFIG.width * 8
    least, most = {"kept": (20, 60), "selective": (12, 17), "computed again": (1, 1.5), "parked": (0, 0.5)}[kind]
    assert least <= (peaks[6] - peaks[2]) / 4 / one <= most


def test_the_backward_pass_frees_each_block_as_it_goes():
    """Whoever holds the loss holds all steps of autograd, also those that are done."""
    model, network, _ = fused("lora", "computed again")
    loss = model(*inputs(8)).square().mean()
    tapes = [step.tape for step in steps(loss.grad_fn)]
    assert len(tapes) == CONFIG.depth
    torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    gc.collect()
    assert [step.tape for step in steps(loss.grad_fn)] == [None] * CONFIG.depth


def steps(node):
    """The blocks' steps of autograd, from the last."""
    found, waiting, seen = [], [node], set()
    while waiting:
        node = waiting.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "tape"):
            found.append(node)
        waiting += [before for before, _ in node.next_functions]
    return found
