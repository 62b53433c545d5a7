"""The pages of all options say what is declared, in both languages."""

import re

import pytest

from library.errors import UserError
from library.settings.reference import option_groups
from tools.write_option_docs import chinese_texts, main, pages


@pytest.mark.parametrize("path", list(pages()), ids=lambda path: path.name)
def test_the_page_is_in_step(path):
    assert path.read_text(encoding="utf-8") == pages()[path], "run python tools/write_option_docs.py"


def test_every_option_has_a_row_with_its_default_on_both_pages():
    declared = [option for group in option_groups().values() for option in group.options]
    for text in pages().values():
        rows = re.findall(
            r"^\| `(\w+)`[^|]*\| (?:[^|\\]|\\.)*\| ([^|]*) \|", text.partition("## Kohya")[0], re.MULTILINE
        )
        assert [name for name, _ in rows] == [option.name for option in declared]
        for (name, default), option in zip(rows, declared, strict=True):
            if isinstance(option.default, bool):
                assert default == f"`{str(option.default).lower()}`", name
            elif isinstance(option.default, int | float):
                assert float(default.strip("`")) == option.default, name
            elif option.default is None:
                assert default in ("unset", "不设置"), name


def test_chinese_texts_are_chinese_and_name_the_same_settings():
    groups = option_groups()
    texts = chinese_texts(groups)
    for name, group in groups.items():
        for option in group.options:
            text = texts[name][option.name]
            assert re.search("[\u4e00-\u9fff]", text), option.name
            assert not re.search("(,|[;:?!] ?)[\u4e00-\u9fff]", text), f"{option.name}: half-width punctuation"
            mentioned = set(re.findall(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b", option.help))
            assert mentioned <= set(re.findall(r"[a-z0-9]+(?:_[a-z0-9]+)+", text)), option.name


def test_missing_and_left_over_texts_are_named():
    groups = option_groups()
    with pytest.raises(UserError, match=r"help_zh.toml: of no option: network.adapter_format, .*, and 9 more"):
        chinese_texts({name: group for name, group in groups.items() if name != "network"})
    group = groups["run"]
    wider = {**groups, "run": type(group)("run", "", (*group.options, *groups["logging"].options[:1]))}
    with pytest.raises(UserError, match=r"missing: run.log_with"):
        chinese_texts(wider)


def test_check_finds_a_page_out_of_step(tmp_path, monkeypatch, capsys):
    import tools.write_option_docs as tool

    monkeypatch.setattr(tool, "pages", lambda: {tool.ROOT / "docs" / "no_such_page.md": "x"})
    assert main(["--check"]) == 1
    assert "docs/no_such_page.md is out of step" in capsys.readouterr().err
