"""Which signals stop a run, and which end it at once."""

import os
import signal

import pytest

from library.training import interrupts
from library.training.interrupts import stop_requests

POSIX = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has fewer signals")


@pytest.fixture(autouse=True)
def handlers():
    """Puts back what signals did before."""
    numbers = [signal.SIGINT, signal.SIGTERM, *interrupts._LASTING]
    before = {number: signal.getsignal(number) for number in numbers}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_asks_for_a_stop_and_a_later_one_ends_at_once(number, handlers, monkeypatch, caplog):
    now = 100.0
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now)
    with pytest.raises(KeyboardInterrupt), stop_requests() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and "stopping after this step" in caplog.text
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher's echo
        now = 101.5
        os.kill(os.getpid(), signal.SIGINT)
        now = 102.5
        os.kill(os.getpid(), number)
    assert len(caplog.records) == 1
    assert all(signal.getsignal(each) == handlers[each] for each in (signal.SIGINT, signal.SIGTERM))


@POSIX
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP"])
def test_the_end_of_a_launcher_or_a_terminal_asks_for_a_stop_however_often_it_comes(name, monkeypatch):
    number = getattr(signal, name)
    signal.signal(number, signal.SIG_DFL)  # ignored where the tests themselves run under nohup
    monkeypatch.setattr(interrupts, "_ECHO_SECONDS", 0.0)
    with stop_requests() as stop:
        os.kill(os.getpid(), number)
        assert stop.requested
        os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # ignored until the run has ended


@POSIX
def test_a_run_that_was_not_stopped_leaves_all_handlers_as_they_were(handlers):
    with stop_requests() as stop:
        pass
    assert not stop.requested
    assert {number: signal.getsignal(number) for number in handlers} == handlers


@POSIX
def test_a_hang_up_that_is_ignored_stays_so():
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.requested and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
