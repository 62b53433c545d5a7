"""What a failed recording leaves and tells, without a GPU: what records is replaced."""

from contextlib import contextmanager
from unittest.mock import MagicMock

import pytest
import torch

from library import cuda_graphs
from library.cuda_graphs import recording


@pytest.fixture
def streams(monkeypatch):
    """[the current stream], which a recording changes; it goes back only where ending the recording succeeds."""
    current = ["own"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))

    @contextmanager
    def graph(failing: bool, capture_error_mode: str):
        current[0] = "recording"
        try:
            yield
        finally:
            if failing:
                raise RuntimeError("capturing stream has unjoined work")
            current[0] = "own"

    monkeypatch.setattr(torch.cuda, "graph", graph)
    return current


def fail(error: Exception, failing: bool) -> None:
    with recording(failing):
        raise error


@pytest.mark.parametrize("failing", [False, True])
def test_a_lack_of_memory_is_told_as_one(streams, failing):
    lack = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fail(lack, failing)
    assert caught.value is lack
    assert streams == ["own"]


def test_other_errors_are_told_as_torch_tells_them(streams):
    with pytest.raises(RuntimeError, match="not permitted"):
        fail(RuntimeError("operation not permitted"), False)
    with pytest.raises(RuntimeError, match="unjoined work"):
        fail(RuntimeError("operation not permitted"), True)
    assert streams == ["own"]


def test_work_is_recorded_when_it_has_run_before(streams, monkeypatch):
    runs, stream = [], MagicMock()

    @contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        runs.append("records")
        yield

    for name in ("CUDAGraph", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", graph)

    def work():
        runs.append("runs")
        return len(runs)

    assert cuda_graphs.recorded(work, stream)[1] == 4
    assert runs == ["runs", "runs", "records", "runs"]


def test_what_succeeds_is_left_alone(streams):
    with recording(False):
        assert streams == ["recording"]
    assert streams == ["own"]
