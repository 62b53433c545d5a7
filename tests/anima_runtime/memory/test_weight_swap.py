"""Blocks' weights come in time, two blocks' at once."""

import pytest
import torch

from library.anima_runtime.memory.weight_swap import SwappedBlock, WeightSwap

CPU = torch.device("cpu")


def swap_of(blocks: int) -> tuple[WeightSwap, list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """A swap, its weights, and where it says that they come: two a block, all of other numbers."""
    swap = WeightSwap(blocks, CPU)
    weights = [[torch.full((2, 3), 10.0 * number), torch.full((4,), 10.0 * number + 1)] for number in range(blocks)]
    places = [[SwappedBlock(swap, number).add(weight) for weight in own] for number, own in enumerate(weights)]
    return swap, weights, places


def are_there(weights, places) -> bool:
    return all(torch.equal(weight, place) for weight, place in zip(weights, places, strict=True))


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_weights_are_there_from_first_to_last_and_back(blocks):
    swap, weights, places = swap_of(blocks)
    order = range(blocks)
    for _ in range(2):
        swap.begin()
        for backward, numbers in ((False, order), (True, reversed(order))):
            for number in numbers:
                SwappedBlock(swap, number).enter(backward)
                assert are_there(weights[number], places[number])
                following = number + (-1 if backward else 1)
                if following in order:  # is on its way while this block runs
                    assert are_there(weights[following], places[following])


def test_two_blocks_have_room():
    _, _, places = swap_of(5)
    assert len({place.data_ptr() for own in places for place in own}) == 4
    assert places[0][0] is places[2][0] is places[4][0]


def test_a_pass_relies_on_nothing_of_the_one_before():
    """As a recorded pass may follow any other."""
    swap, weights, places = swap_of(2)
    swap.begin()
    swap.enter(0, backward=False)
    for own in places:
        for place in own:
            place.fill_(-1.0)
    swap.begin()
    for number in range(2):
        swap.enter(number, backward=False)
        assert are_there(weights[number], places[number])


def test_weights_are_copies():
    swap = WeightSwap(1, CPU)
    weight = torch.ones(3)
    place = swap.add(0, weight)
    weight.zero_()
    swap.begin()
    assert torch.equal(place, torch.ones(3))
