"""Declaring settings: lists of key=value, and texts that are not shown."""

import dataclasses
import json
import pickle

import pytest

from library.errors import SettingError
from library.options import Secret, split_arguments


def test_values_keep_further_equal_signs():
    assert split_arguments("network_args", ["pattern=a=b", " x = 1 "]) == {"pattern": "a=b", "x": "1"}


def test_every_entry_of_another_form_is_told():
    with pytest.raises(SettingError, match=r"(?s)x: 'a' is not .* key=value\nx: '=b' is not"):
        split_arguments("x", ["a", "c=1", "=b"])


def test_a_secret_is_shown_by_nothing_but_reveal():
    @dataclasses.dataclass(frozen=True)
    class Settings:
        key: Secret

    settings = Settings(Secret("abc123"))
    for text in (f"{settings}", str(dataclasses.asdict(settings)), str(settings.key), repr([settings.key])):
        assert "abc123" not in text
        assert "(hidden)" in text
    with pytest.raises(TypeError):
        json.dumps(settings.key)
    assert pickle.loads(pickle.dumps(settings.key)).reveal() == "abc123"
    assert (settings.key == Secret("abc123"), settings.key == Secret("abc124"), settings.key == "abc123") == (
        True,
        False,
        False,
    )
