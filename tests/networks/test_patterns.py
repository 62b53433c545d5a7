"""Patterns for module paths."""

import pytest

from library.errors import SettingError
from networks.patterns import matches, unmatched, value_for


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("mlp.layer1", "blocks.1.mlp.layer1", True),
        ("layer1", "blocks.1.mlp.layer1", True),
        ("ayer1", "blocks.1.mlp.layer1", False),
        ("blocks.1.mlp.layer1", "blocks.1.mlp.layer1", True),
        ("blocks.1", "blocks.1.mlp.layer1", False),
        ("blocks.1.*", "blocks.1.mlp.layer1", True),
        ("blocks.1.*", "blocks.11.mlp.layer1", False),
        ("blocks.1?.mlp.*", "blocks.12.mlp.layer1", True),
        ("blocks.1?.mlp.*", "blocks.1.mlp.layer1", False),
        ("blocks.4-11.mlp.layer1", "blocks.4.mlp.layer1", True),
        ("blocks.4-11.mlp.layer1", "blocks.11.mlp.layer1", True),
        ("blocks.4-11.mlp.layer1", "blocks.12.mlp.layer1", False),
        ("blocks.4-11.mlp.layer1", "blocks.1.mlp.layer1", False),
        ("blocks.4-11.*", "blocks.5.self_attn.q_proj", True),
        ("blocks.4-11.*", "blocks.51.self_attn.q_proj", False),
        (".*mlp.*", "blocks.5.mlp.layer1", True),
        (r"blocks\.5\..*", "blocks.5.mlp.layer1", True),
        (r"blocks\.5\..*", "blocks.55.mlp.layer1", False),
        ("(self|cross)_attn", "self_attn", True),
        ("re:blocks.5.*", "blocks.55.mlp", True),
        ("re:q_proj", "self_attn.q_proj", False),
    ],
)
def test_what_a_pattern_means(pattern, path, expected):
    assert matches(path, pattern) is expected


def test_a_broken_expression_is_an_error():
    with pytest.raises(SettingError, match=r"'re:\(' is not a regular expression"):
        matches("a", "re:(")


def test_the_first_pattern_wins_and_unmatched_ones_are_found():
    values = {"mlp.*": 1, "blocks.0.mlp.layer1": 8, "layer1": 16}
    assert value_for("blocks.0.mlp.layer1", values, 4) == 8
    assert value_for("blocks.1.mlp.layer1", values, 4) == 16
    assert value_for("blocks.1.mlp.layer2", values, 4) == 4
    assert unmatched(values, ["blocks.0.mlp.layer1"]) == ["mlp.*"]
