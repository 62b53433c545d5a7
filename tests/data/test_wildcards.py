"""Wildcards: what can come of them, and how often."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.wildcards import draw_line, draw_wildcards, text_lines


@pytest.mark.parametrize(
    ("text", "outcomes"),
    [
        ("a {red|blue} cat", {"a red cat", "a blue cat"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{a|{b|c} d}", {"a", "b d", "c d"}),
        ("{c|{a|b}}", {"a", "b", "c"}),
        ("{{a|b}|c}", {"a", "b", "c"}),
        ("{big, |}cat", {"big, cat", "cat"}),
        ("{{a|b}}", {"{a|b}"}),
        ("{{ {a|b} }}", {"{ a }", "{ b }"}),
        ("{a}", {"a"}),
        ("{} } { :{ a|b", {"{} } { :{ a|b"}),
        ("no braces", {"no braces"}),
        ("", {""}),
    ],
)
def test_outcomes(text, outcomes):
    assert {draw_wildcards(text, Random(seed)) for seed in range(200)} == outcomes


def test_choices_are_equally_likely():
    counts = Counter(draw_wildcards("{a|b|c|d}", Random(seed)) for seed in range(4000))
    assert all(890 <= count <= 1110 for count in counts.values())  # 1000 expected, 4 standard deviations are 110


@given(st.text("{}|ab ", max_size=30), st.integers(0, 100))
def test_any_text_comes_to_an_end_and_gains_nothing(text, seed):
    result = draw_wildcards(text, Random(seed))
    assert result == draw_wildcards(text, Random(seed))
    assert not Counter(result) - Counter(text)


def test_lines():
    assert text_lines(" a \r\n\n b\n") == ["a", "b"]
    assert {draw_line("a\n{b|c}", Random(seed)) for seed in range(50)} == {"a", "b", "c"}
