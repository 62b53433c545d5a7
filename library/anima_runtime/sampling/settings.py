"""Which pictures are rendered during training, and by which samplers they may be: names, as settings use them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options import option

# The names that settings may use, ComfyUI's and Kohya's, and ComfyUI's name of each. Of a flow, ddim is euler.
SAMPLERS = {
    "euler": "euler",
    "k_euler": "euler",
    "ddim": "euler",
    "euler_ancestral": "euler_ancestral",
    "euler_a": "euler_ancestral",
    "k_euler_a": "euler_ancestral",
    "heun": "heun",
    "dpmpp_2m": "dpmpp_2m",
    "dpmsolver++": "dpmpp_2m",
    "uni_pc": "uni_pc",
}


@dataclass(frozen=True)
class SampleSettings:
    """Pictures rendered during training."""

    sample_prompts: Path | None = option(
        None,
        "File of prompts: text with one a line, 'prompt --w 1024 --h 1024 --d seed --s steps --l cfg --n negative', or "
        ".toml or .json; see docs/samples.md.",
    )
    sample_every_n_steps: int | None = option(
        None, "Render the prompts every so many optimizer steps.", zero_is_unset=True
    )
    sample_every_n_epochs: int | None = option(None, "Render the prompts every so many epochs.", zero_is_unset=True)
    sample_at_first: bool = option(False, "Render the prompts before the first step as well, to compare with.")
    sample_sampler: str = option(
        "euler",
        "Sampler of prompts that name none, as ComfyUI calls it, or Kohya. euler shows best what was "
        "learned; the others need fewer steps or vary more.",
        choices=tuple(SAMPLERS),
    )
