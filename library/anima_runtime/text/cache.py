"""What captions become, remembered by their text: whatever a shuffle or dropout makes of a caption is encoded once."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

import torch

from library.tensor_cache import TensorCache, cache_key

logger = logging.getLogger(__name__)

# To be raised when captions are encoded, or kept, in another form.
_VERSION = "text 1"
# Threads that write, each waiting for the disk most of the time.
_WRITERS = 4

# A frozen dataclass of tensors: CaptionStates or CaptionContext.
Encoded = TypeVar("Encoded")


class Encoder(Protocol[Encoded]):
    """TextEncoder or ContextEncoder."""

    def encode(self, captions: Sequence[str]) -> list[Encoded]: ...


class TextCache(Generic[Encoded]):
    """Encodes each caption once, and keeps the result in main memory and, given `files`, on disk.

    Wherever a caption comes from, its tensors are those that the encoder gave, bit for bit.
    """

    def __init__(
        self,
        encoder: Encoder[Encoded],
        kind: type[Encoded],
        memory: int,
        files: TensorCache | None = None,
        identity: str = "",
    ) -> None:
        """kind: what the encoder gives. memory: bytes to keep there; what is unused for longest goes first.

        identity: what the results depend on beside the captions; files of another identity are not found.
        """
        self._encoder = encoder
        self._kind = kind
        self._memory = memory
        self._files = files
        self._identity = identity
        self._kept: OrderedDict[str, Encoded] = OrderedDict()
        self._size = 0
        self._writers = None if files is None else ThreadPoolExecutor(_WRITERS)
        self._writing: list[Future[None]] = []

    def encode(self, captions: Sequence[str]) -> list[Encoded]:
        """What each caption becomes, on the CPU; the unknown ones are encoded together."""
        results: dict[str, Encoded] = {}
        for caption in dict.fromkeys(captions):
            known = self._kept.get(caption) or self._read(caption)
            if known is not None:
                results[caption] = known
        unknown = [caption for caption in dict.fromkeys(captions) if caption not in results]
        if unknown:
            for caption, encoded in zip(unknown, self._encoder.encode(unknown), strict=True):
                results[caption] = self._kind(**{name: tensor.cpu() for name, tensor in vars(encoded).items()})
            self._write({caption: results[caption] for caption in unknown})
        for caption, encoded in results.items():
            self._keep(caption, encoded)
        return [results[caption] for caption in captions]

    def _keep(self, caption: str, encoded: Encoded) -> None:
        if caption not in self._kept:
            self._size += _bytes(encoded)
        self._kept[caption] = encoded
        self._kept.move_to_end(caption)
        while self._size > self._memory:
            _, dropped = self._kept.popitem(last=False)
            self._size -= _bytes(dropped)

    def _read(self, caption: str) -> Encoded | None:
        tensors = None if self._files is None else self._files.read(self._key(caption))
        return None if tensors is None else self._kind(**tensors)

    def _write(self, results: Mapping[str, Encoded]) -> None:
        """Begins to write; waits only for what an earlier call began, so that memory holds no more than that."""
        self.finish_writing()
        if self._writers is not None:
            self._writing = [
                self._writers.submit(self._files.write, self._key(caption), vars(encoded))
                for caption, encoded in results.items()
            ]

    def finish_writing(self) -> None:
        """Waits until what was encoded is on disk. A disk that is full or gone ends the writing, not the run."""
        writing, self._writing = self._writing, []
        try:
            for written in writing:
                written.result()
        except OSError as error:
            self._writers = None
            logger.warning(
                "no more encoded captions are kept in %s (%s); this run goes on with those in memory",
                self._files.folder, error.strerror,
            )  # fmt: skip

    def _key(self, caption: str) -> str:
        return cache_key(_VERSION, self._kind.__name__, self._identity, caption)


def _bytes(encoded: object) -> int:
    return sum(tensor.nbytes for tensor in vars(encoded).values() if isinstance(tensor, torch.Tensor))
