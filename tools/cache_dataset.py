"""Encodes a run's pictures and captions ahead of time, with the run's own settings. Trains nothing.

    python tools/cache_dataset.py --config_file my.toml [--dataset_config data.toml] [--epochs 3] [other settings]

Training then finds them where cache_latents_to_disk and cache_text_encoder_outputs_to_disk are set. `accelerate launch`
before it shares the work among GPUs. Captions that are shuffled or dropped differ from epoch to epoch; --epochs says
of how many epochs they are encoded.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accelerate.utils import set_seed

from anima_train_network import AnimaNetworkTrainer
from library.console import progress_bar, show, show_error, show_log_messages
from library.errors import UserError
from library.planning.plan import RunPlan
from library.settings import Settings, settings_and_problems
from library.training.processes import is_first_to_tell, make_accelerator

# Captions encoded, and written, at once.
_CAPTIONS = 512

logger = logging.getLogger("tools.cache_dataset")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 after an error was shown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--epochs", type=int, default=1, help="epochs whose captions are encoded; 0 for none")
    parser.add_argument("--no_latents", action="store_true", help="encode captions only")
    parser.add_argument(
        "--remove_unused",
        action="store_true",
        help="delete cached latents of these folders that are not of these settings: of changed pictures, other sizes",
    )
    own, words = parser.parse_known_args(argv)
    accelerator = make_accelerator()
    show_log_messages(accelerator.is_main_process)
    try:
        settings, problems = settings_and_problems(words)
        trainer = AnimaNetworkTrainer(_cached_to_disk(settings), accelerator, problems)
        plan = trainer.plan_run()
        set_seed(settings.run.seed)
        trainer.load_and_attach(plan)
        if not own.no_latents:
            _cache_pictures(trainer, plan, own.remove_unused)
        if own.epochs > 0:
            _cache_captions(trainer, plan, own.epochs)
        accelerator.end_training()  # else the threads of a process group may abort a process at its exit
    except UserError as error:
        if is_first_to_tell(str(error)):
            show_error(error)
        return 1
    return 0


def _cached_to_disk(settings: Settings) -> Settings:
    """The settings with both caches on disk; says where a run with these settings would not use them.

    An earlier run's saves are nothing to this tool, which writes none.
    """
    wanted = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
    for name in wanted:
        if not getattr(settings.data, name):
            logger.warning("%s is off in these settings: set it for the run, or it will not use what is made now", name)
    saving = replace(settings.saving, overwrite_output=True)
    return replace(settings, data=replace(settings.data, **wanted), saving=saving)


def _cache_pictures(trainer: AnimaNetworkTrainer, plan: RunPlan, remove_unused: bool) -> None:
    started = time.perf_counter()
    latents = trainer.cached_latents(plan.all_pictures)
    if trainer.accelerator.is_main_process:
        show(f"pictures: {len(latents)} latents ready in {time.perf_counter() - started:.1f} s")
        if remove_unused:
            show(f"pictures: {latents.remove_others()} unused files deleted")


def _cache_captions(trainer: AnimaNetworkTrainer, plan: RunPlan, epochs: int) -> None:
    accelerator, batches = trainer.accelerator, trainer.training_batches(plan, None)
    captions = list(dict.fromkeys(caption for epoch in range(epochs) for caption in batches.captions(epoch)))
    started = time.perf_counter()
    with progress_bar(len(captions), "caching captions", shown=accelerator.is_main_process) as bar:
        for start in range(0, len(captions), _CAPTIONS):
            some = captions[start : start + _CAPTIONS]
            trainer.encode_ahead(some)
            bar.update(len(some))
    trainer.captions.finish_writing()
    count, seconds = sum(trainer.team.gather([len(captions)])), time.perf_counter() - started
    if accelerator.is_main_process:
        show(f"captions: {count} ready in {seconds:.1f} s, {count / seconds:.1f} a second")


if __name__ == "__main__":
    sys.exit(main())
