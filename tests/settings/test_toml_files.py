from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.errors import SettingError
from library.settings.toml_files import read_toml

TEXT = '''\
seed = 1  # comment
note = """
vae = "not a key"
"""
[training]
"learning_rate" = 1e-4
list = [
  "a=1",
  "b = 2",
]
  [[datasets]]
resolution = 512
  [[ datasets . subsets ]]
image_dir = "a"
[[datasets.subsets]]
image_dir = "b"
[[datasets]]
[[datasets.subsets]]
image_dir = "c"
inline = {x = 1}
'''


def test_lines_of_keys(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(TEXT)
    file = read_toml(path)
    expected = {
        ("seed",): 1,
        ("note",): 2,
        ("training",): 5,
        ("training", "learning_rate"): 6,
        ("training", "list"): 7,
        ("datasets", 0): 11,
        ("datasets", 0, "resolution"): 12,
        ("datasets", 0, "subsets", 0, "image_dir"): 14,
        ("datasets", 0, "subsets", 1, "image_dir"): 16,
        ("datasets", 1): 17,
        ("datasets", 1, "subsets", 0, "image_dir"): 19,
        ("datasets", 1, "subsets", 0, "inline", "x"): 20,
    }
    assert {key: file.source(*key) for key in expected} == {key: f"{path}:{line}" for key, line in expected.items()}
    assert ("vae",) not in file.lines


def test_unknown_place_falls_back_to_the_file_alone(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("seed = 1")
    assert read_toml(path).source("other") == str(path)


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 1\r\nvae = 'x'\r\n")
    file = read_toml(path)
    assert file.tables == {"seed": 1, "vae": "x"}
    assert file.source("vae") == f"{path}:2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed = 1\nvae = \n", r"broken\.toml:2: is not valid TOML: .* in column 7$"),
        (b"seed = 1\nseed = 2\n", r"broken\.toml:2: is not valid TOML: .* in column 9$"),
        (b'seed = 1\nvae = "a\nqwen = 2\n', r"broken\.toml:2: is not valid TOML: .*; close the quotes before the line"),
        (b'vae = "a', r"broken\.toml: is not valid TOML: .*end of document"),
        (b"vae = '\xff'", "UTF-8"),
        (rb'vae = "C:\models\vae"', r"toml:1: .*write / instead of"),
        (rb'vae = "C:\Users\me\vae"', r"toml:1: .*write / instead of"),
        (b"seed = " + b"9" * 5000, "not valid TOML"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "not valid TOML"),
    ],
)
def test_broken_file_is_named(tmp_path, content, message):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(SettingError, match=message) as caught:
        read_toml(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(SettingError, match=r"none\.toml: cannot be read"):
        read_toml(tmp_path / "none.toml")


FRAGMENTS = st.sampled_from(
    ["[", "]", "[[", "]]", "=", '"', "'''", '"""', ".", "\n", "a", "datasets", "1", "{", "}", " "]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(), st.lists(FRAGMENTS, max_size=30).map(lambda parts: "".join(parts).encode())))
def test_any_bytes_are_read_or_refused_cleanly(tmp_path: Path, content: bytes):
    path = tmp_path / "any.toml"
    path.write_bytes(content)
    try:
        file = read_toml(path)
    except SettingError as error:
        assert str(path) in str(error)
    else:
        assert all(entry.source.startswith(str(path)) for entry in file.flat_entries())
