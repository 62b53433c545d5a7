"""Whatever a settings or dataset file says, it is read or refused with a message for the user."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.errors import SettingError
from library.settings import read_settings
from library.settings.groups import by_spelling, top_level_options
from library.settings.kohya_only import FIXED, NO_EFFECT
from library.settings.root_style_keys import ARGUMENTS, COMPUTED, SAME_VALUE, WITHOUT_COUNTERPART

ROOT_KEYS = [*SAME_VALUE, *ARGUMENTS, *COMPUTED, *WITHOUT_COUNTERPART, "optimizer.prodigy_x"]
OTHER_KEYS = [
    *by_spelling(top_level_options()),
    *NO_EFFECT,
    *FIXED,
    "image_dir",
    "typo",
    "subsets",
    "general",
    "datasets",
]
VALUES = ["true", "1", "0", "-2.5", "nan", "1e-4", '""', '"x"', '"cosine"', "[]", "[1, 2]", '["a=1"]', "{}", "{a = 1}"]
VALUES += ["[{}]", "[[]]", "1979-05-27", '"lokr"', "100000000000000000000000"]

key_lines = st.tuples(st.sampled_from(OTHER_KEYS), st.sampled_from(VALUES)).map(" = ".join)
root_lines = st.tuples(st.sampled_from(ROOT_KEYS), st.sampled_from(VALUES)).map(" = ".join)
headings = st.sampled_from(["[training]", "[general]", "[[datasets]]", "[[datasets.subsets]]", "[lora.x]", "[[a]]"])
texts = st.lists(st.one_of(key_lines, root_lines, headings), max_size=8, unique=True).map("\n".join)


@pytest.mark.parametrize("flag", ["--config_file", "--dataset_config"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
def test_any_file_is_read_or_refused_cleanly(workplace, model_flags, flag, text):
    (workplace / "any.toml").write_text(text)
    try:
        read_settings([*model_flags, flag, "any.toml"])
    except SettingError as error:
        assert str(error)
