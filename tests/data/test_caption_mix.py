"""Reading caption_mix."""

from __future__ import annotations

import pytest

from library.data.caption_mix import mix_weights, parse_caption_mix


def test_weights():
    assert mix_weights("tags=0.4, nl = 3,tags + nl=0") == {"tags": 0.4, "nl": 3.0, "tags+nl": 0.0}
    assert parse_caption_mix("nl=1") == "nl=1"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("tag=1", "'tag' is none of the forms tags, nl, tags\\+nl, nl\\+tags"),
        ("tags=1,", "'' is none of the forms"),
        ("tags=1, tags=2", "tags is there twice"),
        ("tags=-1, nl=2", "another weight of 0 or more, not '-1'"),
        ("tags", "expected tags=0.5 or another weight"),
        ("tags=inf", "not 'inf'"),
        ("tags=nan", "not 'nan'"),
        ("tags=0, nl=0", "at least one weight must be above 0"),
        (0.5, 'expected a text such as "tags=0.4'),
        (["tags=1", "nl=1"], "expected a text"),
    ],
)
def test_what_is_wrong_is_said(value, message):
    with pytest.raises(ValueError, match=message):
        parse_caption_mix(value)
