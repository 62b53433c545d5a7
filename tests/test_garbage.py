"""The collector pauses, and goes on as it was."""

from __future__ import annotations

import gc

import pytest

from library.garbage import uncollected


def test_it_goes_on_also_after_an_error():
    with pytest.raises(ValueError), uncollected():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()


def test_inside_another_and_where_it_was_off_it_stays_off():
    @uncollected()
    def work():
        return gc.isenabled()

    with uncollected():
        assert not work() and not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        assert not work() and not gc.isenabled()
    finally:
        gc.enable()
    assert not work() and gc.isenabled()
