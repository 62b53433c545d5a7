"""Gradients are added to what is there, in place, as many at a time as shall be."""

import pytest
import torch
from torch import nn

from library.training.optimization.gradient_sums import add_gradients


def parameters_and_loss():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, width)) for width in (3, 5, 7, 9)]
    unused = nn.Parameter(torch.randn(2))
    for parameter in (*parameters, unused):
        parameter.grad = torch.randn_like(parameter)
    x = torch.randn(6, 4)
    loss = sum((x @ parameter).tanh().square().sum() for parameter in (*parameters, parameters[0]))
    return [*parameters, unused], loss


@pytest.mark.parametrize("at_a_time", [1, 100, 2**24])
def test_sums_are_torchs_and_stay_where_they_are(at_a_time):
    parameters, loss = parameters_and_loss()
    loss.backward()
    expected = [parameter.grad.clone() for parameter in parameters]
    parameters, loss = parameters_and_loss()
    places = [parameter.grad for parameter in parameters]
    add_gradients(loss, parameters, at_a_time)
    for parameter, place, gradient in zip(parameters, places, expected, strict=True):
        assert parameter.grad is place and torch.equal(place, gradient)


def test_few_gradients_are_there_beside_the_sums():
    parameters, loss = parameters_and_loss()
    most = []

    def count(_):
        others = [parameter.grad for parameter in parameters if parameter.grad is not None]
        most.append(sum(gradient.nbytes for gradient in others))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(count)
    add_gradients(loss, parameters, at_a_time=100)
    largest = max(parameter.nbytes for parameter in parameters)
    assert 0 < max(most) <= 100 + largest


def test_an_error_leaves_the_sums_in_place():
    parameters, loss = parameters_and_loss()
    places = [parameter.grad for parameter in parameters]
    loss.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        add_gradients(loss, parameters)
    assert all(parameter.grad is place for parameter, place in zip(parameters, places, strict=True))
    assert not any(parameter._post_accumulate_grad_hooks for parameter in parameters)
