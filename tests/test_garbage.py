"""The collector pauses, and goes on as it was."""

from __future__ import annotations

import gc
import weakref

import pytest

from library.garbage import kept_as_is, uncollected


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


def test_the_search_passes_over_what_was_there_before():
    class Node:
        """Refers to itself, so that only the search frees it."""

        def __init__(self):
            self.own = self

    before = Node()
    found = weakref.ref(before)
    with pytest.raises(ValueError), kept_as_is():
        later = Node()
        of_later = weakref.ref(later)
        del before, later
        gc.collect()
        assert found() is not None and of_later() is None
        raise ValueError
    gc.collect()
    assert found() is None
