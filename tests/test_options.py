"""Settings that are lists of key=value."""

from library.options import split_arguments


def test_values_keep_further_equal_signs():
    assert split_arguments("network_args", ["pattern=a=b", " x = 1 "]) == {"pattern": "a=b", "x": "1"}
