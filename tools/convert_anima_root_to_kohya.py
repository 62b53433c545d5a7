"""Writes a root-style settings file as Kohya's two files, train_args.toml and dataset.toml, that train the same.

    python tools/convert_anima_root_to_kohya.py --input OLD.toml [--output_dir DIR] [--overwrite]

Each value has the key it came from beside it. What has no counterpart is listed, with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.console import show, show_error, show_log_messages
from library.errors import SettingError, UserError
from library.files import write_atomically
from library.settings.collect import Gathered, gather, picture_source_problems
from library.settings.kohya_pair import write_pair
from library.settings.root_style import is_root_style
from library.settings.toml_files import read_toml


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 after an error was shown."""
    show_log_messages()
    try:
        convert(_parse(argv))
    except UserError as error:
        show_error(error)
        return 1
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write a root-style settings file as Kohya's train_args.toml and dataset.toml.", allow_abbrev=False
    )
    parser.add_argument("--input", type=Path, required=True, help="root-style settings file (.toml)")
    parser.add_argument("--output_dir", type=Path, help="folder to write to (kohya_converted beside the input)")
    parser.add_argument("--train_args_name", default="train_args", help="name of the settings file (train_args)")
    parser.add_argument("--dataset_name", default="dataset", help="name of the dataset file (dataset)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args(argv)


def convert(arguments: argparse.Namespace) -> None:
    """Reads, maps and writes. Raises UserError before anything is written."""
    gathered = _read(arguments.input)
    folder = arguments.output_dir if arguments.output_dir is not None else arguments.input.parent / "kohya_converted"
    train_args = folder / _file_name("train_args_name", arguments.train_args_name)
    dataset = folder / _file_name("dataset_name", arguments.dataset_name)
    _check_outputs(arguments, train_args, dataset)
    pair = write_pair(gathered, arguments.input)
    for path, text in ((train_args, pair.train_args), (dataset, pair.dataset)):
        write_atomically(path, lambda file, text=text: file.write_text(text, encoding="utf-8"))
        show(f"wrote {path}")
    for entry, reason in gathered.unmapped:
        show(f"not mapped: {entry.source}: {entry.label}: {reason}")
    show(f"train with: accelerate launch anima_train_network.py --config_file {train_args} --dataset_config {dataset}")


def _read(path: Path) -> Gathered:
    if not path.is_file():
        raise SettingError(f"--input: there is no file {path}")
    if not is_root_style(read_toml(path).flat_entries()):
        raise SettingError(
            f"--input: {path} is not a root-style file: it has none of model.transformer_path, lora.lora_rank, "
            "dataset.data_dir and the like; Kohya's files need no conversion"
        )
    problems: list[str] = []
    gathered = gather(["--config_file", str(path)], problems)
    problems += picture_source_problems(gathered)
    if problems:
        raise SettingError("\n".join(problems))
    return gathered


def _file_name(flag: str, name: str) -> str:
    if not name or Path(name).name != name:
        raise SettingError(f"--{flag}: {name!r} is not a file name; the folder is --output_dir")
    return name if name.endswith(".toml") else f"{name}.toml"


def _check_outputs(arguments: argparse.Namespace, train_args: Path, dataset: Path) -> None:
    if train_args == dataset:
        raise SettingError("--train_args_name and --dataset_name are the same; give two names")
    for path in (train_args, dataset):
        if path.resolve() == arguments.input.resolve():
            raise SettingError(f"{path} is the input itself; give another --output_dir or name")
        if path.exists() and not arguments.overwrite:
            raise SettingError(f"{path} exists; choose another --output_dir or add --overwrite")


if __name__ == "__main__":
    sys.exit(main())
