"""A recorded forward pass is the forward pass. What CUDA records is looked at in tests/test_cuda.py."""

import torch

from library.anima_runtime.sampling.recorded import RecordedForward


def test_on_a_cpu_the_function_is_called_without_gradients():
    weight = torch.tensor(3.0, requires_grad=True)
    forward = RecordedForward(lambda x: x * weight)
    result = forward(torch.tensor([1.0, 2.0]))
    assert result.tolist() == [3.0, 6.0] and not result.requires_grad
    with torch.no_grad():
        weight.fill_(2.0)
    assert forward(torch.tensor([5.0])).tolist() == [10.0]
