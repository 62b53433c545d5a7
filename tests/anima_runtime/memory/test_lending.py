"""Lent weights are copies on the device, and the module gets its own back."""

from __future__ import annotations

import pytest
import torch

from library.anima_runtime.memory.lending import lent_to


@pytest.fixture
def module():
    """Has parameters, a buffer that is saved and one that is not."""
    module = torch.nn.BatchNorm1d(4).requires_grad_(False).eval()
    module.register_buffer("frequencies", torch.arange(4.0), persistent=False)
    return module


def places(module):
    return [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]


def test_nothing_moves_where_the_module_lies_already(module):
    home = places(module)
    with lent_to(module, "cpu"):
        assert places(module) == home


def test_copies_serve_meanwhile_and_the_own_tensors_come_back(module, monkeypatch):
    """`to` that always copies stands for another device."""
    home, devices = places(module), []

    def copied(tensor, device, non_blocking):
        devices.append(device)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "to", copied)
    x = torch.randn(3, 4)
    expected = module(x)
    with pytest.raises(ValueError, match="inside"), lent_to(module, "cuda:1"):
        assert not set(places(module)) & set(home)
        assert torch.equal(module(x), expected)
        raise ValueError("inside")
    assert places(module) == home and devices == ["cuda:1"] * len(home)
    assert torch.equal(module(x), expected)
