"""Every declared option, by its name and aliases, from every place that may set it."""

from pathlib import Path

import pytest

from library.errors import SettingError
from library.options import Secret
from library.settings.command_line import parse_command_line
from library.settings.dataset_toml import datasets_from_tables, read_dataset_tables
from library.settings.groups import by_spelling, shared_dataset_options, subset_options, top_level_options
from library.settings.kohya_only import FIXED, NO_EFFECT, REFUSED
from library.settings.resolve import resolve
from library.settings.root_style_keys import ARGUMENTS, COMPUTED, DEFAULTS, SAME_VALUE, WITHOUT_COUNTERPART
from library.settings.toml_files import read_toml
from library.values import convert, is_bool

SPELLINGS = sorted(by_spelling(top_level_options()))


def toml_and_words(spelling):
    """A value other than the default, as TOML text, as command-line words, and converted."""
    declared = by_spelling(top_level_options())[spelling]
    if is_bool(declared):
        value = not declared.default
        return str(value).lower(), [f"--{spelling}" if value else f"--no-{spelling}"], value
    if declared.name == "resolution":
        return "[832, 1216]", [f"--{spelling}", "832", "1216"], (832, 1216)
    if declared.name == "resolutions":
        return "[768, [832, 1216]]", [f"--{spelling}", "768", "832,1216"], ((768, 768), (832, 1216))
    if declared.name == "face_crop_aug_range":
        return '"2.0,4.0"', [f"--{spelling}", "2.0,4.0"], (2.0, 4.0)
    if declared.name == "adapter_format":
        return '["kohya", "comfy"]', [f"--{spelling}", "kohya", "comfy"], ("kohya", "comfy")
    if declared.name == "base_weights_multiplier":
        return "[0.5, 1]", [f"--{spelling}", "0.5", "1"], (0.5, 1.0)
    if declared.name == "caption_mix":
        return '"tags=1, nl=2"', [f"--{spelling}", "tags=1, nl=2"], "tags=1, nl=2"
    if declared.choices:
        value = next(choice for choice in declared.choices if choice != declared.default)
        return f'"{value}"', [f"--{spelling}", value], value
    annotation = str(declared.type)
    if "tuple" in annotation and "Path" in annotation:
        return '["a", "b/c"]', [f"--{spelling}", "a", "b/c"], (Path("a"), Path("b/c"))
    if "tuple" in annotation:
        return '["a=1", "b=2"]', [f"--{spelling}", "a=1", "b=2"], ("a=1", "b=2")
    if "Path" in annotation:
        return '"some/where"', [f"--{spelling}", "some/where"], Path("some/where")
    if declared.name.endswith("_tokenizer_repo_id") or declared.name.endswith("_modelscope_repo_id"):
        return '"owner/name"', [f"--{spelling}", "owner/name"], "owner/name"
    if "Secret" in annotation:
        return '"some key"', [f"--{spelling}", "some key"], Secret("some key")
    if "str" in annotation:
        return '"some text"', [f"--{spelling}", "some text"], "some text"
    if "int" in annotation:
        return "7", [f"--{spelling}", "7"], 7
    assert "float" in annotation
    return "0.25", [f"--{spelling}", "0.25"], 0.25


def resolved(entries):
    problems = []
    given = resolve(entries, top_level_options(), problems)
    assert problems == []
    return given


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_accepted_everywhere_with_the_same_result(spelling, tmp_path):
    toml, words, expected = toml_and_words(spelling)
    name = by_spelling(top_level_options())[spelling].name
    path = tmp_path / "a.toml"

    typed = resolved(parse_command_line(words).entries)
    path.write_text(f"{spelling} = {toml}")
    flat = resolved(read_toml(path).flat_entries())
    path.write_text(f"[any heading]\n{spelling} = {toml}".replace("any heading", '"any heading"'))
    headed = resolved(read_toml(path).flat_entries())

    for given in (typed, flat, headed):
        assert list(given) == [name]
        assert given[name].value == expected
        assert type(given[name].value) is type(expected)
    assert typed[name].source == "command line"
    assert flat[name].source == f"{path}:1"
    assert headed[name].source == f"{path}:2"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_wrong_type_names_key_file_and_line(spelling, tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(f"\n\n{spelling} = 1979-05-27")
    problems = []
    resolve(read_toml(path).flat_entries(), top_level_options(), problems)
    assert len(problems) == 1
    is_secret = "Secret" in str(by_spelling(top_level_options())[spelling].type)
    shown = "(hidden)" if is_secret else "datetime.date(1979, 5, 27)"
    assert problems[0].startswith(f"{path}:3: {spelling} = {shown}: expected ")


@pytest.mark.parametrize("spelling", sorted(by_spelling({**shared_dataset_options(), **subset_options()})))
def test_dataset_option_reaches_the_dataset(spelling, tmp_path):
    declared = by_spelling({**shared_dataset_options(), **subset_options()})[spelling]
    names_pictures = spelling in ("image_dir", "metadata_file")
    toml, expected = ('"x"', Path("x")) if names_pictures else toml_and_words(spelling)[::2]
    image_dir = "" if names_pictures else 'image_dir = "a"\n'
    is_subset = declared.name in subset_options()
    levels = (f"{spelling} = {toml}", "") if not is_subset else ("", f"{spelling} = {toml}")
    path = tmp_path / "d.toml"
    path.write_text(f"[[datasets]]\n{levels[0]}\n[[datasets.subsets]]\n{image_dir}{levels[1]}\n")
    problems = []
    (dataset,) = datasets_from_tables(read_dataset_tables(read_toml(path), problems), {})
    assert problems == []
    assert getattr(dataset.subsets[0] if is_subset else dataset, declared.name) == expected


def test_declared_defaults_are_valid_values():
    for declared in top_level_options().values():
        if declared.default is not None and not isinstance(declared.default, Path | tuple):
            assert convert(declared, declared.default) == declared.default


def test_no_name_is_declared_twice_or_listed_as_kohya_only():
    names = [spelling for declared in top_level_options().values() for spelling in (declared.name, *declared.aliases)]
    assert len(names) == len(set(names))
    elsewhere = [*NO_EFFECT, *FIXED, *REFUSED]
    assert len(elsewhere) == len({*elsewhere})
    assert not {*names} & {*elsewhere}


def test_root_style_tables_point_at_settings_that_exist():
    known = {*SPELLINGS, *NO_EFFECT, *FIXED, *REFUSED}
    assert {*SAME_VALUE.values(), *DEFAULTS, *(setting for setting, _ in ARGUMENTS.values())} <= known
    tables = [*SAME_VALUE, *ARGUMENTS, *COMPUTED, *WITHOUT_COUNTERPART]
    assert len(tables) == len(set(tables))


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if name[:-1] not in SPELLINGS])
def test_abbreviations_are_refused(spelling):
    with pytest.raises(SettingError, match=rf"unknown option --{spelling[:-1]}\b"):
        parse_command_line([f"--{spelling[:-1]}", "1"])
