"""Writes docs/options.md and docs/options.zh.md from the declared options.

    python tools/write_option_docs.py

With --check it writes nothing, and ends with exit code 1 where a page or a Chinese text is out of step.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from library.console import show_error, show_log_messages
from library.errors import UserError, first_ten
from library.files import write_atomically
from library.options import Option
from library.settings.kohya_only import FIXED, NO_EFFECT, REFUSED
from library.settings.reference import OptionGroup, default_text, option_groups, type_words
from library.settings.toml_files import read_toml, toml_value

logger = logging.getLogger("tools.write_option_docs")

ROOT = Path(__file__).parents[1]
CHINESE_TEXTS = ROOT / "library" / "settings" / "help_zh.toml"


@dataclass(frozen=True)
class Wording:
    """What a page says around the options, in its language.

    head: the lines before the first group. types: words of `type_words`, where they differ.
    """

    head: str
    columns: str
    unset: str
    also: str
    no_effect: str
    fixed: str
    refused: str
    one_of: str
    types: Mapping[str, str]
    separator: str


ENGLISH = Wording(
    head="""# Every setting

[中文](options.zh.md)

Each can stand in the settings file, under any heading or none, or on the command line as `--name value`; switches are
`--name` and `--no-name`. The command line wins over the file, the file over the default. Lists are `["a=1", "b=2"]` in
a file, and `--name a=1 b=2` on the command line. What a dataset TOML says of its own pictures wins over all of these.
`--explain` shows what a run would use, and where each value comes from.
""",
    columns="| setting | value | default | what it does |",
    unset="unset",
    also="also",
    no_effect="Settings of Kohya's scripts that do nothing here. They are accepted, with a warning that says why.",
    fixed="Settings of Kohya's scripts that are accepted at one value only, which is what happens anyway.",
    refused="Settings of Kohya's scripts that are refused unless off (false, 0, empty), and what to do instead.",
    one_of="one of ",
    types={},
    separator=", ",
)
CHINESE = Wording(
    head="""# 全部设置

[English](options.md)

每一项都可以写在设置文件里（放在任何标题之下，或不放标题），也可以在命令行写成 `--name value`；
开关写成 `--name` 和 `--no-name`。命令行优先于文件，文件优先于默认值。列表在文件里写成 `["a=1", "b=2"]`，
在命令行写成 `--name a=1 b=2`。数据集 TOML 对自己的图片所作的设置优先于以上全部。
`--explain` 显示一次训练会用到的每个值及其来源。
""",
    columns="| 设置 | 值 | 默认 | 作用 |",
    unset="不设置",
    also="也写作",
    no_effect="Kohya 脚本的这些设置在这里不起作用：可以保留，会有一条警告说明原因（英文）。",
    fixed="Kohya 脚本的这些设置只接受一个值，也就是这里本来的做法。",
    refused="Kohya 脚本的这些设置除非关闭（false、0、空），否则会被拒绝；右边是替代办法（英文）。",
    one_of="其中之一：",
    types={
        "true or false": "true 或 false",
        "whole number": "整数",
        "number": "数",
        "text": "文字",
        "path": "路径",
        "list": "列表",
        "secret text": "保密的文字",
        " or ": " 或 ",
    },
    separator="、",
)


def pages() -> dict[Path, str]:
    """The text of each page by its path. Raises UserError for Chinese texts that are missing or left over."""
    groups = option_groups()
    return {
        ROOT / "docs" / "options.md": _page(ENGLISH, groups, None),
        ROOT / "docs" / "options.zh.md": _page(CHINESE, groups, chinese_texts(groups)),
    }


def chinese_texts(groups: Mapping[str, OptionGroup]) -> Mapping[str, Mapping[str, str]]:
    """help_zh.toml, checked to say something of every group and option, and of nothing else."""
    texts = read_toml(CHINESE_TEXTS).tables
    declared = {f"{name}.purpose" for name in groups}
    declared |= {f"{name}.{option.name}" for name, group in groups.items() for option in group.options}
    written = {f"{name}.{key}" for name, table in texts.items() for key in table}
    problems = [f"missing: {first_ten(sorted(declared - written))}"] if declared - written else []
    problems += [f"of no option: {first_ten(sorted(written - declared))}"] if written - declared else []
    if problems:
        raise UserError(f"{CHINESE_TEXTS.relative_to(ROOT)}: {'; '.join(problems)}")
    return texts


def _page(wording: Wording, groups: Mapping[str, OptionGroup], texts: Mapping[str, Mapping[str, str]] | None) -> str:
    sections = [wording.head]
    for name, group in groups.items():
        own = texts[name] if texts is not None else {option.name: option.help for option in group.options}
        purpose = texts[name]["purpose"] if texts is not None else group.purpose
        rows = [_row(option, own[option.name], wording) for option in group.options]
        sections.append("\n".join([f"## {name}", "", purpose, "", wording.columns, "|---|---|---|---|", *rows, ""]))
    for title, sentence, table in (
        ("no effect", wording.no_effect, NO_EFFECT),
        ("fixed", wording.fixed, {name: wording.separator.join(map(toml_value, v)) for name, v in FIXED.items()}),
        ("refused", wording.refused, REFUSED),
    ):
        rows = [f"| `{name}` | {_cell(text)} |" for name, text in table.items()]
        sections.append("\n".join([f"## Kohya: {title}", "", sentence, "", "| | |", "|---|---|", *rows, ""]))
    return "\n".join(sections)


def _row(option: Option, text: str, wording: Wording) -> str:
    aliases = wording.separator.join(f"`{alias}`" for alias in option.aliases)
    name = f"`{option.name}`" + (f" ({wording.also} {aliases})" if aliases else "")
    default = wording.unset if option.default is None else f"`{default_text(option)}`"
    return f"| {name} | {_cell(_type(option, wording))} | {default} | {_cell(text)} |"


def _type(option: Option, wording: Wording) -> str:
    if option.choices is not None:
        return wording.one_of + wording.separator.join(map(str, option.choices))
    return wording.types.get(" or ", " or ").join(wording.types.get(word, word) for word in type_words(option))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 out of step."""
    parser = argparse.ArgumentParser(description="Write docs/options.md and docs/options.zh.md.", allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is out of step")
    check = parser.parse_args(arguments).check
    show_log_messages()
    try:
        for path, text in pages().items():
            if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
                raise UserError(f"{path.relative_to(ROOT)} is out of step: run python tools/write_option_docs.py")
            if not check:
                write_atomically(path, lambda file, text=text: file.write_text(text, encoding="utf-8", newline="\n"))
                logger.info("wrote %s", path)
    except UserError as error:
        show_error(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
