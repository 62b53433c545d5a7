"""What `NetworkTrainer` asks of the model that it trains an adapter for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.data.dataset import Batch
from library.data.pictures import Picture
from library.errors import Problems
from library.training.choices import Choice
from library.training.watching.samples import SamplePicture
from networks.setup import Network


class ModelHooks(ABC):
    """Filled in by the trainer of each model; the training loop knows of the model what is told here.

    Those without a body must be; the others say what holds where nothing else is known.
    """

    @abstractmethod
    def plan_models(self, problems: Problems) -> tuple[nn.Module, nn.Module] | None:
        """What `load_models` will return, on the meta device, or None where the files do not tell.

        All that is wrong with the model's files by their headers goes to `problems`; that a file is missing is known.
        """

    @abstractmethod
    def load_models(self) -> tuple[nn.Module, nn.Module]:
        """Loads all models, frozen, and returns the two that adapters may change: the model and its text encoder.

        Any module stands for a text encoder that stays as it is (`may_change_text_encoder`).
        """

    @abstractmethod
    def encode_pixels(self, pixels_BCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1] -> latents."""

    @abstractmethod
    def latent_identity(self) -> str:
        """What latents depend on beside the picture, as text: two encoders that differ have different ones."""

    @abstractmethod
    def latents_are_cached(self) -> None:
        """Called when no picture will be encoded any more: frees what only that needed."""

    @abstractmethod
    def place_models(self) -> None:
        """Called when the network is attached: brings to the device what `load_models` left in main memory."""

    @abstractmethod
    def prepare_text(self, folder: Path) -> None:
        """Called when the network is attached: what it leaves untrained may be cached, between runs in `folder`."""

    @abstractmethod
    def encode_ahead(self, captions: Sequence[str]) -> None:
        """Called, where captions are cached, some time before the steps that use these."""

    @abstractmethod
    def prepare(self, batch: Batch) -> Sequence[Any]:
        """A batch as what `losses` takes: one or more NamedTuples of tensors on the device, random draws among them.

        Each has rows_B, its samples' places in the batch, and timesteps_B in [0, 1].
        """

    @abstractmethod
    def prepare_at(self, batch: Batch, share: float) -> Sequence[Any]:
        """Like `prepare`, at the timestep that this share of all draws lies below; the same inputs in every run."""

    @abstractmethod
    def timestep_at(self, share: float, picture: Picture) -> float:
        """That timestep: 0 is the picture, 1 is noise."""

    @abstractmethod
    def losses(self, inputs: Any) -> Tensor:
        """The loss of each sample of one of `prepare`'s results: float32 [B]. Tensor work only: it may be captured."""

    @abstractmethod
    def fuse_obstacle(self) -> str | None:
        """Why the model's blocks cannot be computed by own kernels; None where nothing is known against it."""

    @abstractmethod
    def choose_memory(self, fuses: bool, network: Network | None) -> list[Choice]:
        """What of a forward pass is kept for the backward pass, and where. fuses: whether own kernels compute blocks.

        network: what is trained, on the meta device in a dry run; None where that is not known.
        """

    @abstractmethod
    def fuse_blocks(self, buckets: int) -> None:
        """Has the blocks computed by own kernels, for pictures of that many shapes."""

    @abstractmethod
    def keep_modules(self) -> None:
        """Has the blocks computed module by module."""

    def compile_obstacle(self) -> str | None:
        """Why the blocks cannot be compiled; None where nothing is known against it."""
        return None

    @abstractmethod
    def compile_blocks(self, buckets: int) -> None:
        """Has what a step spends its time in compiled, for pictures of that many shapes."""

    @abstractmethod
    def render_samples(self) -> Sequence[SamplePicture]:
        """Renders the sample prompts with the adapter as it is."""

    @abstractmethod
    def model_files(self) -> Mapping[str, Path]:
        """The files that an adapter's metadata names and hashes, by Kohya's names: sd_model and vae."""

    @abstractmethod
    def model_facts(self) -> Mapping[str, Any]:
        """What else an adapter's metadata says of the model and its objective, by its keys."""

    def model_identity(self) -> Mapping[str, Mapping[str, Any]]:
        """What a resumed run must find the same of the model ("topology"), and what it should ("model")."""
        return {}

    def memory_savers(self) -> list[str]:
        """Settings that are not in force and would save GPU memory, those that cost least first."""
        return []
