"""Tensors that wait in main memory come back as they were, in any order, and leave no trace in between."""

import gc
import weakref

import pytest
import torch

from library.anima_runtime.memory.parking import Parking, _chunk_bytes

DEVICES = [
    torch.device("cpu"),
    pytest.param(
        torch.device("cuda"), marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")]
    ),
]


@pytest.fixture(params=DEVICES, ids=str)
def device(request):
    return request.param


def drawn(count, device, shape=(64, 48)):
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device) for _ in range(count)]


@pytest.mark.parametrize("expected", [0, 1, 3, 9])
@pytest.mark.parametrize("behind", [0, 1, 4, 99])
@pytest.mark.parametrize("order", [(4, 3, 2, 1, 0), (0, 1, 2, 3, 4), (2, 4, 0, 1, 3)])
def test_tensors_come_back_as_they_were(device, behind, expected, order):
    parking = Parking(device, behind, least_bytes=0)
    for _ in range(3):
        tensors = drawn(5, device)
        left = [*parking.leave([tensor.clone() for tensor in tensors[:2]]), *one_by_one(parking, tensors[2:])]
        for number in order:
            parking.expect(expected)
            (back,) = parking.take([left[number]])
            assert torch.equal(back, tensors[number])


def one_by_one(parking, tensors):
    return [parked for tensor in tensors for parked in parking.leave([tensor.clone()])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_shape_order_in_memory_and_type_are_kept(device, dtype):
    parking = Parking(device, behind=0, least_bytes=0)
    tensor = torch.arange(2 * 3 * 5 * 7, device=device).view(2, 3, 5, 7).to(dtype).transpose(1, 2)
    (back,) = parking.take(parking.leave([tensor]))
    assert torch.equal(back, tensor) and back.stride() == tensor.stride() and back.dtype == dtype
    assert back.data_ptr() != tensor.data_ptr()


def test_the_device_keeps_the_latest_and_what_is_expected(device):
    parking = Parking(device, behind=3, least_bytes=0)
    tensors = drawn(5, device)
    alive = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
    left = []
    while tensors:
        left += parking.leave([tensors.pop(0)])
    gc.collect()
    there = lambda: [parked.tensor is not None for parked in left]  # noqa: E731
    assert there() == [storage() is not None for storage in alive] == [False, False, True, True, True]
    parking.take([left.pop()])
    parking.expect(2)
    assert there() == [False, False, True, True]
    parking.expect(3)
    assert there() == [False, True, True, True]
    parking.settle()  # which does not mean what came back
    assert there() == [False, True, False, False]
    parking.take([left.pop(), left.pop()])
    assert there() == [False, True]


def test_what_is_still_there_can_be_let_go(device):
    parking = Parking(device, behind=9, least_bytes=0)
    tensors = drawn(3, device)
    left = parking.leave([tensor.clone() for tensor in tensors])
    parking.settle()
    assert [parked.tensor for parked in left] == [None] * 3
    for tensor, back in zip(tensors, parking.take(left), strict=True):
        assert torch.equal(back, tensor)


def test_rooms_are_used_again(device):
    parking = Parking(device, behind=0, least_bytes=0)

    def rooms_of(count, side):
        left = parking.leave(drawn(count, device, (64, side)))
        rooms = {parked.room.data_ptr() for parked in left}
        parking.take(left[::-1])
        return rooms

    first = rooms_of(4, side=48)
    assert len(first) == 4
    if device.type == "cpu":
        assert rooms_of(4, side=48) == first
        assert rooms_of(4, side=40) == first  # of another bucket
        assert not rooms_of(4, side=20) & first  # of another resolution
        assert not rooms_of(4, side=96) & first


def test_what_is_left_for_good_gives_its_room_back(device):
    parking = Parking(device, behind=0, least_bytes=0)
    left = parking.leave(drawn(3, device))
    rooms = {parked.room.data_ptr() for parked in left[:2]}
    del left[:2]
    again = parking.leave(drawn(2, device))
    if device.type == "cpu":
        assert {parked.room.data_ptr() for parked in again} == rooms
    for tensor, back in zip([*drawn(2, device), drawn(3, device)[2]], parking.take([*again, *left]), strict=True):
        assert torch.equal(back, tensor)


@pytest.mark.parametrize("mebibytes", [4, 60, 64, 65, 129, 302, 576, 1024, 3000])
def test_pinned_memory_is_not_lost_to_rounding(mebibytes):
    """Torch pins powers of two."""
    room = mebibytes * 2**20
    taken = _chunk_bytes(room)
    assert taken.bit_count() == 1
    assert taken // room * room > 0.8 * taken
    assert taken <= max(2**28, 8 * room)


def test_small_tensors_stay(device):
    parking = Parking(device, behind=0, least_bytes=1024)
    small, large = torch.zeros(255, device=device), torch.zeros(256, device=device)
    first, second = parking.take(parking.leave([small, large]))
    assert first is small and second is not large


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_recorded_graph_leaves_and_takes_at_each_replay():
    device = torch.device("cuda")
    parking = Parking(device, behind=2, least_bytes=0)
    x = torch.zeros(1024, 1024, device=device)

    def work():
        left, y = [], x
        for _ in range(6):
            y = y * 2 + 1
            left += parking.leave([y])
        total = 0
        for number in reversed(range(6)):
            parking.expect(2)
            (y,) = parking.take([left[number]])
            total = total + y * (number + 1)
        return total

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = work()
    for value in (1.0, -3.0):
        x.fill_(value)
        graph.replay()
        expected, y = 0.0, value
        for number in range(6):
            y = y * 2 + 1
            expected += y * (number + 1)
        assert (total == expected).all()
