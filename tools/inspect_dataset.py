"""Shows what a run would train, with its own settings, and what would be lost. Trains nothing.

    python tools/inspect_dataset.py --config_file my.toml [--dataset_config data.toml] [other settings]
    python tools/inspect_dataset.py --train_data_dir train --resolution 1024 --enable_bucket --contact_sheet sheet.png

Every picture is read whole, and neither pictures nor captions are changed; with cache_latents_to_disk, what was found
out about pictures is kept in the cache folder (pictures.json), as a run keeps it. With t5_tokenizer_dir, captions are
counted in tokens. The exit code is 1 where files would not be trained, or trained without a caption, or after an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.console import show, show_error, show_log_messages
from library.data.epochs import bucket_table, filled_datasets
from library.errors import SettingError, UserError, first_ten
from library.settings import Settings
from library.settings.collect import resolve_settings
from library.settings.file_rules import picture_folders
from library.settings.rules import data, wrong_numbers
from tools.contact_sheet import save_contact_sheet
from tools.dataset_report import LONG_CAPTION, DatasetReport, Fit, readable_pictures, report_dataset

_TAGS_SHOWN = 30


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 where something would be lost or an error was shown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.add_argument("--contact_sheet", type=Path, metavar="FILE", help="draw crops, masks and captions (.png)")
    parser.add_argument("--draws", type=int, default=3, help="epochs that the contact sheet shows of each picture")
    parser.add_argument("--sheet_pictures", type=int, default=40, help="most pictures on the contact sheet")
    own, words = parser.parse_known_args(argv)
    show_log_messages()
    try:
        settings = _settings(words)
        pictures = readable_pictures(settings)
        report = report_dataset(settings, pictures)
        batch_sizes = [dataset.batch_size for dataset in settings.datasets]
        if own.json:
            show(json.dumps(asdict(report), indent=2, ensure_ascii=False))
        else:
            show(bucket_table(pictures, batch_sizes, filled_datasets(settings.datasets)))
            show("\n".join(_lines(report)))
        if own.contact_sheet is not None:
            most, draws = max(1, own.sheet_pictures), max(1, own.draws)
            save_contact_sheet(own.contact_sheet, pictures, batch_sizes, settings.run.seed, draws, most)
    except UserError as error:
        show_error(error)
        return 1
    return 1 if report.lost or report.without_caption else 0


def _settings(words: Sequence[str]) -> Settings:
    """The settings, of which only those of the data must be right. SettingError: they are not."""
    problems: list[str] = []
    settings = resolve_settings(words, problems)
    if not settings.datasets:
        raise SettingError("\n".join(problems))
    if wrong := [*wrong_numbers(settings), *data(settings), *picture_folders(settings)]:
        raise SettingError("\n".join(wrong))
    return settings


def _lines(report: DatasetReport) -> Iterator[str]:
    yield f"{report.pictures} pictures, used {report.uses} times in an epoch"
    yield from _section("lost, not trained", [f"{path}: {why}" for path, why in report.lost.items()])
    yield from _section("without a caption", report.without_caption)
    yield from _section("enlarged", [f"{_shape(fit)}, {fit.scale:.2f} times" for fit in report.enlarged])
    yield from _section("cropped by a tenth or more", [f"{_shape(fit)}, {fit.cut:.0%} cut" for fit in report.cropped])
    yield from _section("groups with the same content", [first_ten(group, " = ") for group in report.same_content])
    yield from _section("groups that look alike", [first_ten(group, " ~ ") for group in report.similar])
    if report.long_captions is None:
        yield "tokens: not counted, as there is no T5 tokenizer yet; a run downloads it, or set t5_tokenizer_dir to one"
    else:
        long = [f"{path}: {tokens}" for path, tokens in report.long_captions.items()]
        yield from _section(f"captions of more than {LONG_CAPTION} tokens", long)
    yield f"tags: {len(report.tags)}, each with the pictures that have it"
    shown = [f"{count} {tag}" for tag, count in list(report.tags.items())[:_TAGS_SHOWN]]
    yield "  " + (", ".join(shown) or "none") + (", …" if len(report.tags) > len(shown) else "")


def _section(title: str, entries: Iterable[str]) -> Iterator[str]:
    listed = list(entries)
    yield f"{title}: {len(listed) or 'none'}"
    if listed:
        yield "  " + first_ten(listed, "\n  ")


def _shape(fit: Fit) -> str:
    return f"{fit.path}: {fit.size} to {fit.bucket}"


if __name__ == "__main__":
    sys.exit(main())
