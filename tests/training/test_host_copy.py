"""Copies in main memory that training does not change."""

from __future__ import annotations

from types import MappingProxyType

import torch

from library.training.host_copy import HostCopy, _pieces, bytes_of, reserve_host_memory


def test_tensors_are_copied_wherever_they_stand_and_the_rest_stays_what_it_is():
    tensor = torch.ones(2)
    value = {"a": [tensor, (tensor, 3)], "b": {"c": "text"}, 4: None}
    coming = HostCopy(value)
    tensor.fill_(5)
    copied = coming.wait()
    assert copied["b"] == {"c": "text"} and copied[4] is None
    assert isinstance(copied["a"], list) and isinstance(copied["a"][1], tuple)
    for found in (copied["a"][0], copied["a"][1][0]):
        assert torch.equal(found, torch.ones(2))
    assert copied["a"][1][1] == 3


def test_any_mapping_comes_as_a_dict_with_its_own_tensors():
    value = [MappingProxyType({"a": torch.ones(2)}), torch.zeros(3)]
    first, second = HostCopy(value).wait()
    assert torch.equal(first["a"], torch.ones(2)) and torch.equal(second, torch.zeros(3))


def test_copies_are_not_part_of_the_graph():
    weight = torch.nn.Parameter(torch.ones(2))
    assert not HostCopy([weight * 2]).wait()[0].requires_grad


def test_nothing_is_pinned_without_a_gpu():
    assert reserve_host_memory([torch.ones(2)], copies=4) is None


def test_bytes_are_counted_wherever_tensors_stand():
    assert bytes_of({"a": [torch.ones(3), (torch.ones(2, dtype=torch.bfloat16), "text")], "b": 7}) == 16


def test_pieces_hold_tensors_of_one_type_and_no_more_than_fits(monkeypatch):
    monkeypatch.setattr("library.training.host_copy._PIECE_BYTES", 40)
    forms = [(4, torch.float32), (4, torch.float32), (4, torch.float32), (3, torch.int64), (99, torch.int64)]
    tensors = [torch.ones(size, dtype=dtype) for size, dtype in forms]
    assert [len(piece) for piece in _pieces(tensors)] == [2, 1, 1, 1]
    assert [tensor for piece in _pieces(tensors) for tensor in piece] == tensors
