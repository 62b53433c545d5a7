"""Main memory for tensors that a GPU needs again later: they go there and come back while it computes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

# Smaller tensors stay: a copy of its own takes 10 µs.
_LEAST_BYTES = 2**20
# Pinned memory is taken so many bytes at a time, or as many as fit several rooms: powers of two, to which torch rounds
# what it pins. For a room alone that may be nearly twice its size.
_CHUNK_BYTES, _ROOMS_OF_A_CHUNK = 2**28, 8
_ALIGNED = 256


class Parked:
    """A tensor that `Parking.leave` took, for `Parking.take`. room: where it goes, if it goes."""

    def __init__(self, tensor: Tensor, room: Tensor | None = None) -> None:
        self.tensor: Tensor | None = tensor
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        self.room = room
        self.moving: _Move | None = None
        self.give_room_back: weakref.finalize | None = None


class _Move:
    """Copies that are on their way; `event` is None once the device's work waits for them."""

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self.event = event


class Parking:
    """Copies tensors to main memory and back on streams of their own; CUDA graphs can record both.

    Of the tensors that leave, no more than `behind` are on the device as well, which need not wait for their copies.
    Those that left last are thought to be wanted first; see `expect`. Rooms in main memory are used again for tensors
    of about the same size, and stay, as recorded graphs know their addresses.
    """

    def __init__(self, device: torch.device, behind: int = 5, least_bytes: int = _LEAST_BYTES) -> None:
        self._device, self._behind, self._least_bytes = device, behind, least_bytes
        is_cuda = device.type == "cuda"
        self._leaving, self._coming = (torch.cuda.Stream(device) if is_cuda else None for _ in range(2))
        self._rooms: list[Tensor] = []
        # Weak, so that a pass that failed leaves nothing behind.
        self._still_here: list[weakref.ref[Parked]] = []
        self._order: list[weakref.ref[Parked]] = []

    def leave(self, tensors: Sequence[Tensor]) -> list[Parked]:
        """Copies dense tensors, which must not be written to any more; memory is free once the caller lets go of it."""
        found = [self._new(tensor) for tensor in tensors]
        going = [parked for parked in found if parked.room is not None]
        self._move(self._leaving, [(_typed(parked), _flat(parked.tensor)) for parked in going], going)
        self._still_here += map(weakref.ref, going)
        if len(self._still_here) > self._behind:
            # About half of them at once: each wait costs the device some microseconds, and covers all earlier copies.
            self._let_go(len(self._still_here) - (self._behind + 1) // 2)
        return found

    def settle(self) -> None:
        """Frees what is still on the device."""
        self._let_go(len(self._still_here))

    def expect(self, count: int) -> None:
        """Has so many tensors that left last, and were not taken, on their way back."""
        self._fetch([other() for other in self._order[-count:]] if count else [])

    def take(self, wanted: Sequence[Parked]) -> list[Tensor]:
        """The tensors, on the device. They can be taken once."""
        self._fetch(wanted)
        found = []
        for parked in wanted:
            if parked.room is not None:
                reference = weakref.ref(parked)
                if reference in self._still_here:
                    self._still_here.remove(reference)
                self._order.remove(reference)
                self._wait(parked)
                parked.give_room_back()
            found.append(parked.tensor)
            parked.tensor = None
        return found

    def _new(self, tensor: Tensor) -> Parked:
        if tensor.nbytes < self._least_bytes:
            return Parked(tensor)
        parked = Parked(tensor, self._room(tensor.nbytes))
        parked.give_room_back = weakref.finalize(parked, self._rooms.append, parked.room)
        self._order.append(weakref.ref(parked, self._order.remove))
        return parked

    def _let_go(self, count: int) -> None:
        gone = [parked for parked in (other() for other in self._still_here[:count]) if parked is not None]
        del self._still_here[:count]
        if gone:
            self._wait(gone[-1])
        for parked in gone:
            parked.tensor = None

    def _fetch(self, wanted: Sequence[Parked]) -> None:
        """Has tensors on their way back, but for those that are, or are still here."""
        away = [parked for parked in wanted if parked.tensor is None]
        for parked in away:
            parked.tensor = torch.empty_strided(parked.shape, parked.stride, dtype=parked.dtype, device=self._device)
        self._move(self._coming, [(_flat(parked.tensor), _typed(parked)) for parked in away], away)

    def _move(
        self, stream: torch.cuda.Stream | None, copies: Sequence[tuple[Tensor, Tensor]], moved: Sequence[Parked]
    ) -> None:
        """Copies (target, source) once all is done that was asked of the device so far; `_wait` waits for it."""
        if not copies:
            return
        if stream is None:
            for target, source in copies:
                target.copy_(source)
            return
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            move = _Move(stream.record_event())
        for parked in moved:
            parked.moving = move

    def _wait(self, parked: Parked) -> None:
        """Has the device's work, not the host, wait for a tensor's latest copy, and all before it."""
        if parked.moving is not None and parked.moving.event is not None:
            torch.cuda.current_stream(self._device).wait_event(parked.moving.event)
            parked.moving.event = None

    def _room(self, nbytes: int) -> Tensor:
        """The smallest free room of so many bytes, but of fewer than twice as many."""
        nbytes = -(-nbytes // _ALIGNED) * _ALIGNED
        fitting = [number for number, room in enumerate(self._rooms) if nbytes <= len(room) < 2 * nbytes]
        if not fitting:
            self._rooms += self._new_rooms(nbytes)
            return self._rooms.pop()
        return self._rooms.pop(min(fitting, key=lambda number: len(self._rooms[number])))

    def _new_rooms(self, nbytes: int) -> list[Tensor]:
        if self._device.type != "cuda":
            return [torch.empty(nbytes, dtype=torch.uint8)]
        chunk = torch.empty(_chunk_bytes(nbytes), dtype=torch.uint8, pin_memory=True)
        count = len(chunk) // nbytes
        return list(chunk.split(len(chunk) // count // _ALIGNED * _ALIGNED))[:count]


def _chunk_bytes(room_bytes: int) -> int:
    """How much to pin for rooms of so many bytes."""
    return max(_CHUNK_BYTES, 1 << (_ROOMS_OF_A_CHUNK * room_bytes - 1).bit_length() - 1)


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor's numbers as they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _typed(parked: Parked) -> Tensor:
    """The part of a tensor's room that it takes."""
    return parked.room[: parked.shape.numel() * parked.dtype.itemsize].view(parked.dtype)
