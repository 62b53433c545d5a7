"""Rendering pictures as ComfyUI would: Euler steps, shift 3.0, classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options import option


@dataclass(frozen=True)
class SampleSettings:
    """Pictures rendered during training."""

    sample_prompts: Path | None = option(
        None, "Text file of prompts, one a line: 'prompt --w 1024 --h 1024 --d seed --s steps --l cfg --n negative'."
    )
    sample_every_n_steps: int | None = option(None, "Render the prompts every so many optimizer steps.")
    sample_every_n_epochs: int | None = option(None, "Render the prompts every so many epochs.")
    sample_at_first: bool = option(False, "Render the prompts before the first step as well.")
