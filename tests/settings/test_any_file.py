"""Whatever a settings or dataset file, a command line or an adapter's metadata says, it is read or refused cleanly."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from library.errors import UserError
from library.settings import read_settings
from library.settings.collect import resolve_settings
from library.settings.command_line import program_options
from library.settings.groups import by_spelling, run_options, top_level_options
from library.settings.kohya_only import FIXED, NO_EFFECT, REFUSED
from library.settings.listing import config_text, explanation
from library.settings.root_style_keys import ARGUMENTS, COMPUTED, SAME_VALUE, WITHOUT_COUNTERPART

ROOT_KEYS = [*SAME_VALUE, *ARGUMENTS, *COMPUTED, *WITHOUT_COUNTERPART, "optimizer.prodigy_x"]
SPELLINGS = list(by_spelling(top_level_options()))
OTHER_KEYS = [
    *SPELLINGS,
    *program_options(),
    *NO_EFFECT,
    *FIXED,
    *REFUSED,
    "image_dir",
    "typo",
    "subsets",
    "general",
    "datasets",
    '"two words"',
    '""',
    "a.b.c",
]
VALUES = ["true", "1", "0", "-2.5", "nan", "1e-4", '""', '"x"', '"cosine"', "[]", "[1, 2]", '["a=1"]', "{}", "{a = 1}"]
VALUES += ["[{}]", "[[]]", "1979-05-27", '"lokr"', "100000000000000000000000", '"\\u0000"', '"../\\n"', "-0.0", "inf"]

key_lines = st.tuples(st.sampled_from(OTHER_KEYS), st.sampled_from(VALUES)).map(" = ".join)
root_lines = st.tuples(st.sampled_from(ROOT_KEYS), st.sampled_from(VALUES)).map(" = ".join)
headings = st.sampled_from(["[training]", "[general]", "[[datasets]]", "[[datasets.subsets]]", "[lora.x]", "[[a]]"])
lines = st.one_of(key_lines, root_lines, headings, st.text(max_size=12))
texts = st.lists(lines, max_size=8, unique=True).map("\n".join)

fuzzing = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_and_shown_or_refused(words, read=read_settings):
    """What can be read can be shown and written as well."""
    try:
        resolved = read(words)
    except UserError as error:
        assert str(error)
    else:
        assert explanation(resolved)
        assert config_text(resolved)


@pytest.mark.parametrize("flag", ["--config_file", "--dataset_config"])
@fuzzing
@given(text=texts)
def test_any_file_is_read_or_refused_cleanly(workplace, model_flags, flag, text):
    (workplace / "any.toml").write_text(text, encoding="utf-8", errors="replace")
    read_and_shown_or_refused([*model_flags, flag, "any.toml"])


@fuzzing
@given(content=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_cleanly(workplace, needed_flags, content):
    (workplace / "any.toml").write_bytes(content)
    read_and_shown_or_refused([*needed_flags, "--config_file", "any.toml"])


words = st.one_of(
    st.sampled_from([f"--{name}" for name in OTHER_KEYS if name not in ("explain", "print_options", "output_config")]),
    st.sampled_from(["--no-cache_latents", "--", "-x", "--=", "--seed=", "--seed=1", "1", "", "x=y", "-1", "None"]),
    st.text(max_size=6),
)


@fuzzing
@given(typed=st.lists(words, max_size=6))
def test_any_command_line_is_read_or_refused_cleanly(workplace, needed_flags, typed):
    if "-h" not in typed:
        read_and_shown_or_refused([*needed_flags, *typed], lambda all_words: resolve_settings(all_words, []))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
own_metadata = st.one_of(
    json_values,
    st.fixed_dictionaries(
        {"datasets": st.one_of(json_values, st.lists(st.fixed_dictionaries({"subsets": json_values}), max_size=2))},
        optional=dict.fromkeys(list(run_options())[::12], json_values),
    ),
)
kohya_metadata = st.dictionaries(
    st.sampled_from([f"ss_{name}" for name in (*SPELLINGS, *NO_EFFECT, *FIXED, "optimizer", "typo")]),
    st.one_of(st.sampled_from(["None", "True", "(1, 2)", "{}", "[1]", "A(b=1)", "1e-4"]), st.text(max_size=8)),
    max_size=5,
)


@fuzzing
@given(metadata=st.one_of(own_metadata.map(lambda value: {"ss_anima_settings": json.dumps(value)}), kohya_metadata))
def test_any_metadata_is_read_or_refused_cleanly(workplace, needed_flags, metadata):
    encodable = {key: text.encode("utf-8", "replace").decode() for key, text in metadata.items()}
    save_file({"x": torch.zeros(1)}, workplace / "a.safetensors", encodable)
    read_and_shown_or_refused(
        [*needed_flags, "--from_adapter", "a.safetensors"], lambda all_words: resolve_settings(all_words, [])
    )
