import pytest

from library.errors import DataError, Problems, SettingError, UserError


def fails(text, kind):
    raise kind(text)


def test_problems_are_gathered_in_order_and_raised_together():
    problems = Problems(["first"])
    assert problems.attempt(lambda a, b: a + b, 1, 2) == 3
    assert problems.attempt(fails, "second", DataError) is None
    problems.attempt(fails, "third", SettingError)
    with pytest.raises(UserError) as caught:
        problems.raise_found()
    assert str(caught.value) == "first\nsecond\nthird"


def test_without_problems_nothing_is_raised():
    Problems().raise_found()


def test_errors_of_the_program_are_not_kept():
    problems = Problems()
    with pytest.raises(KeyError):
        problems.attempt(fails, "a bug", KeyError)
    assert problems.found == []
