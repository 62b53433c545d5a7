"""Which steps are recorded, and what happens to the others, without a GPU: what records is replaced."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from library.training import captured
from library.training.captured import CapturedBackward


class Inputs(NamedTuple):
    x_BD: torch.Tensor


@pytest.fixture
def weight():
    return nn.Parameter(torch.tensor([2.0, 3.0]))


@pytest.fixture
def backward(monkeypatch, weight):
    """Its loss is the weight times each sample; recording must be replaced too."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    return CapturedBackward(lambda inputs: inputs.x_BD @ weight, [weight])


def samples(count: int) -> Inputs:
    return Inputs(torch.ones(count, 2))


class Replayed:
    """In place of a graph: counts its replays."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


def record(inputs: Inputs) -> captured._Captured:
    return captured._Captured(
        Replayed(), Inputs(inputs.x_BD.clone()), torch.zeros(()), torch.full((len(inputs[0]),), 7.0)
    )


def test_steps_that_cannot_be_recorded_add_their_gradients_in_place(backward, weight, monkeypatch, caplog):
    tries = []

    def fail(inputs):
        tries.append(inputs)
        raise RuntimeError("operation not permitted\nmore")

    monkeypatch.setattr(backward, "_capture", fail)
    place = weight.grad
    assert backward(samples(3), 0.5).tolist() == [5.0, 5.0, 5.0]
    assert not backward(samples(2), 0.5).requires_grad
    assert weight.grad is place and weight.grad.tolist() == [2.5, 2.5]
    assert len(tries) == 1
    assert caplog.messages == [
        "cuda_graphs: this step cannot be recorded, so steps run without: operation not permitted"
    ]


def test_a_lack_of_memory_is_no_reason_to_record_no_more(backward, monkeypatch):
    def out_of_memory(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backward, "_capture", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        backward(samples(1), 1.0)
    monkeypatch.setattr(backward, "_capture", record)
    assert backward(samples(1), 1.0).tolist() == [7.0]


def test_each_shape_is_recorded_once_up_to_a_number_that_is_told(backward, weight, monkeypatch, caplog):
    recorded = []

    def recording(inputs):
        recorded.append(record(inputs))
        return recorded[-1]

    monkeypatch.setattr(backward, "_capture", recording)
    monkeypatch.setattr(captured, "MOST_GRAPHS", 2)
    for count in (1, 2, 1):
        assert backward(Inputs(torch.full((count, 2), 9.0)), 0.25).tolist() == [7.0] * count
    assert [own.graph.replays for own in recorded] == [2, 1]
    assert recorded[0].inputs.x_BD.tolist() == [[9.0, 9.0]] and recorded[0].share.item() == 0.25
    assert not weight.grad.any()
    (message,) = caplog.messages
    assert message.startswith("cuda_graphs: 2 shapes of batches are recorded, and no more will be")
    assert backward(samples(3), 1.0).tolist() == [5.0] * 3
    assert weight.grad.tolist() == [3.0, 3.0]
    assert backward(samples(2), 1.0).tolist() == [7.0] * 2
    assert len(caplog.messages) == 1


def test_after_a_release_shapes_are_recorded_again(backward, monkeypatch):
    monkeypatch.setattr(backward, "_capture", record)
    backward(samples(1), 1.0)
    (first,) = backward._graphs.values()
    backward.release()
    backward(samples(1), 1.0)
    (second,) = backward._graphs.values()
    assert first is not second and (first.graph.replays, second.graph.replays) == (1, 1)
