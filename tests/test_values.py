import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.options import Secret, option, options_of
from library.settings.groups import run_options, shared_dataset_options, subset_options
from library.values import convert, is_path, says_nothing, takes_several


@dataclass(frozen=True)
class Sample:
    switch: bool = option(False, "")
    automatic: bool | None = option(None, "")
    count: int = option(0, "")
    count_or_unset: int | None = option(None, "")
    every: int | None = option(None, "", zero_is_unset=True)
    rate_or_unset: float | None = option(None, "")
    key: Secret | None = option(None, "")
    rate: float = option(0.0, "")
    steps_or_fraction: int | float = option(0, "")
    text: str = option("", "")
    text_or_unset: str | None = option(None, "")
    file: Path = option(Path("x"), "")
    texts: tuple[str, ...] = option((), "")
    files: tuple[Path, ...] = option((), "")
    precision: str = option("no", "", choices=("no", "bf16"))


OPTIONS = {declared.name: declared for declared in options_of(Sample)}
EVERY_OPTION = [*run_options().values(), *shared_dataset_options().values(), subset_options()["image_dir"]]

CONVERSIONS = [
    ("switch", True, True),
    ("switch", "false", False),
    ("switch", "False", False),
    ("switch", "true", True),
    ("switch", 0, False),
    ("switch", 1, True),
    ("automatic", False, False),
    ("automatic", "", None),
    ("count", 4, 4),
    ("count", 4.0, 4),
    ("count", "16", 16),
    ("count", "1e3", 1000),
    ("count", "-3", -3),
    ("count_or_unset", "", None),
    ("count_or_unset", 0, 0),
    ("every", 0, None),
    ("every", "0", None),
    ("every", 3, 3),
    ("rate_or_unset", [], None),
    ("rate_or_unset", 0, 0.0),
    ("key", "abc", Secret("abc")),
    ("key", "", None),
    ("rate", 1, 1.0),
    ("rate", [0.5], 0.5),
    ("rate", "1e-4", 1e-4),
    ("steps_or_fraction", 100, 100),
    ("steps_or_fraction", 0.1, 0.1),
    ("steps_or_fraction", "0.05", 0.05),
    ("steps_or_fraction", 100.0, 100),
    ("text", "a b", "a b"),
    ("text", "", ""),
    ("text_or_unset", "", None),
    ("file", "models/x y.safetensors", Path("models/x y.safetensors")),
    ("texts", ["a=1", "b=2"], ("a=1", "b=2")),
    ("texts", "a=1", ("a=1",)),
    ("texts", [], ()),
    ("texts", "", ()),
    ("files", ["a.safetensors", "b/c.safetensors"], (Path("a.safetensors"), Path("b/c.safetensors"))),
    ("files", "a.safetensors", (Path("a.safetensors"),)),
    ("files", [], ()),
    ("files", "", ()),
    ("precision", "bf16", "bf16"),
]


@pytest.mark.parametrize(("name", "raw", "expected"), CONVERSIONS)
def test_value_becomes_the_declared_type(name, raw, expected):
    value = convert(OPTIONS[name], raw)
    assert value == expected
    assert type(value) is type(expected)


REFUSALS = [
    ("switch", "yes", "true or false"),
    ("switch", 2, "true or false"),
    ("count", 4.5, "whole number"),
    ("count", True, "whole number"),
    ("count", "four", "whole number"),
    ("count", "", "whole number"),
    ("rate", "1e-4x", "a number"),
    ("rate", float("nan"), "a number"),
    ("rate", float("inf"), "a number"),
    ("rate", "1e999", "a number"),
    ("rate", False, "a number"),
    ("rate", [1, 2], "a number"),
    ("steps_or_fraction", "10%", "a number"),
    ("text", 5, "a text"),
    ("file", "", "a path"),
    ("file", "a\0b", "a path"),
    ("file", "C:\train", "expected a path; in paths write /"),
    ("texts", ["a=1", 2], "list of texts"),
    ("texts", 3, "list of texts"),
    ("files", ["a", ""], "a path"),
    ("files", ["C:\train"], "expected a path; in paths write /"),
    ("files", [3], "list of texts"),
    ("precision", "BF16", "did you mean bf16"),
    ("precision", "fp8", "one of no, bf16"),
]


@pytest.mark.parametrize(("name", "raw", "expected"), REFUSALS)
def test_refusal_says_what_was_expected(name, raw, expected):
    with pytest.raises(ValueError, match=expected):
        convert(OPTIONS[name], raw)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.just(10**1000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=5,
)


def test_what_guis_write_for_an_empty_field_says_nothing_where_it_is_no_value():
    assert {name for name, declared in OPTIONS.items() if says_nothing(declared, "")} == {
        "switch", "count", "rate", "steps_or_fraction", "file", "precision",
    }  # fmt: skip
    zero = option_like("count", zero_is_unset=True)
    assert says_nothing(zero, 0) and says_nothing(zero, "0") and not says_nothing(zero, 1)
    assert not says_nothing(OPTIONS["count"], 0)


def test_files_are_known_as_paths_and_lists_as_such():
    assert {name for name, declared in OPTIONS.items() if is_path(declared)} == {"file", "files"}
    assert {name for name, declared in OPTIONS.items() if takes_several(declared)} == {"texts", "files"}


def option_like(name: str, **changes):
    return dataclasses.replace(OPTIONS[name], **changes)


@settings(max_examples=60, deadline=None)
@given(ANYTHING)
def test_any_value_is_converted_or_refused_cleanly(raw):
    for declared in EVERY_OPTION:
        try:
            convert(declared, raw)
        except ValueError as error:
            assert any(word in str(error) for word in ("expected", "give ", "none of"))
