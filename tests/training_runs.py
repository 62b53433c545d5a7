"""Runs of the trainer in processes of their own, for tests that harm them or need several at once.

They are forked from a server that has imported the trainer already: one starts in milliseconds instead of 10 seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed import TCPStore

from anima_train_network import main

_CONTEXT = multiprocessing.get_context("forkserver")
# The trainer imports these when it needs them, which takes seconds.
_LATE = (
    "torch._dynamo", "transformers.optimization", "library.anima_runtime.text.qwen3",
    "library.anima_runtime.text.tokenizers", "library.anima_runtime.vae", "library.anima_runtime.sampling.samplers",
)  # fmt: skip
# Some of them initialise CUDA where there is a card, which a fork cannot take over.
_CONTEXT.set_forkserver_preload([__name__, *(() if torch.cuda.is_available() else _LATE)])
# Seconds until a test gives up; a run takes 2 to 10 on two cores that do nothing else.
_PATIENCE = 240


def read_records(trainer, step: int) -> list:
    """What the trainer's steps up to `step` gave, as a log point reads it."""
    trainer.records.start(step, torch.zeros((), device=trainer.device))
    return trainer.records.finish()[0]


class TrainingRun:
    """A started run: `words` as on its command line, its output in the file `log`, to which runs append.

    prepare: called in the process before the trainer, to put faults into it; of a module's top level.
    store: what the processes of a group share, kept for as long as this is.
    """

    def __init__(
        self,
        words: Sequence[str],
        log: Path,
        prepare: Callable[[], None] | None = None,
        environment: Mapping[str, str] | None = None,
        store: TCPStore | None = None,
    ) -> None:
        self._log = log
        self._store = store
        self._start = log.stat().st_size if log.exists() else 0
        self._process = _CONTEXT.Process(target=_train, args=(list(words), log, prepare, dict(environment or {})))
        self._process.start()
        self.pid = self._process.pid

    @property
    def output(self) -> str:
        """What this run has said so far."""
        return self._log.read_bytes()[self._start :].decode(errors="replace") if self._log.exists() else ""

    def wait_for(self, text: str) -> None:
        """Returns as soon as the run has said `text`. AssertionError where it ends without."""
        deadline = time.monotonic() + _PATIENCE
        while text not in self.output:
            alive = self._process.is_alive()
            assert alive or text in self.output, f"the run ended without saying {text!r}:\n{self.output}"
            assert time.monotonic() < deadline, f"the run did not say {text!r} in time:\n{self.output}"
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def end(self, timeout: float = _PATIENCE) -> int:
        """Waits for the end: the exit code, or minus the number of the signal that killed it."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"the run goes on:\n{self.output}"
        return self._process.exitcode

    def end_within(self, seconds: float) -> bool:
        """Whether the run ends by itself in that time; else it is killed."""
        self._process.join(seconds)
        if ended := self._process.exitcode is not None:
            return ended
        self._process.kill()
        self._process.join()
        return False


def run_group(
    words: Sequence[str], folder: Path, processes: int, prepare: Callable[[], None] | None = None
) -> list[TrainingRun]:
    """The processes of one run, as a launcher starts them; their outputs go to folder/0.log, folder/1.log, …

    Each has a GPU of its own where there are so many. As with a launcher, the store they share outlives them.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        "ACCELERATE_USE_CPU": str(int(torch.cuda.device_count() < processes)),
        "OMP_NUM_THREADS": "1",  # else accelerate gives each as many threads as there are cores
    }  # fmt: skip
    runs = []
    for rank in range(processes):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        runs.append(TrainingRun(words, folder / f"{rank}.log", prepare, environment, store))
    return runs


def tensor_bytes(path: Path) -> bytes:
    """The tensors of a safetensors file, without the header, whose metadata names times."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def _train(words: list[str], log: Path, prepare: Callable[[], None] | None, environment: Mapping[str, str]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    sys.exit(main(words))
