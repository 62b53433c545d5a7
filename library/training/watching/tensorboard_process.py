"""TensorBoard as a program of its own, which ends when the trainer does: `TensorBoardServer` starts it.

    python -m library.training.watching.tensorboard_process LOGDIR HOST PORT

It prints its address when it serves. Its standard input is a pipe from the trainer, which the system closes however the
trainer ends, kill -9 included.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tensorboard.program import TensorBoard, TensorBoardPortInUseError

MOST_PORTS = 100


def main(arguments: Sequence[str]) -> int:
    """Serves until standard input ends."""
    folder, host, first_port = arguments
    address = launch(folder, host, int(first_port))
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    return 0


def launch(folder: str, host: str, first_port: int) -> str:
    """Starts serving at the first port that is free, and returns the address."""
    for port in range(first_port, first_port + MOST_PORTS):
        board = TensorBoard()
        # A run's few curves need no fast loading, which is a further process.
        board.configure([None, "--logdir", folder, "--host", host, "--port", str(port), "--load_fast", "false"])
        try:
            return board.launch()
        except TensorBoardPortInUseError:
            continue
    raise TensorBoardPortInUseError(f"ports {first_port} to {port} of {host} are all in use")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
