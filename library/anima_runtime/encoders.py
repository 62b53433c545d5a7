"""The frozen encoders of pictures and captions, each loaded when it is first used.

A run whose latents and captions lie in caches on disk uses neither. It then spares reading them, and the import of
diffusers and transformers, which takes longer than all else in its start: they are imported here, where an encoder is
checked or loaded, and nowhere else on the way to the first step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from library.anima_runtime.known_models import FileStamps, KnownModels
from library.anima_runtime.text.encoding import CaptionStates, TextEncoder
from library.anima_runtime.text.tokenizer_plans import TokenizerPlan
from library.errors import ModelFileError
from library.tensor_cache import identity_of

if TYPE_CHECKING:
    from transformers import Qwen3Model

    from library.anima_runtime.vae import AnimaVAE

# The kinds of files that a tokenizer may be made of.
_TOKENIZER_FILES = (".json", ".txt", ".model")


T = TypeVar("T")


class _Once(Generic[T]):
    """A value that is made when it is first asked for, by one thread while others wait."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._made: T | None = None

    def value(self) -> T:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made

    def if_made(self) -> T | None:
        with self._lock:
            return self._made


class LazyVAE:
    """The VAE of a file or folder.

    known: what is remembered of models that earlier runs loaded. is_known: whether these very files are among them, so
    that nothing can be wrong with them.
    """

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device, known: KnownModels) -> None:
        self._path, self._dtype, self._device, self._known = path, dtype, device, known
        self._name = f"VAE, {dtype}, diffusers {version('diffusers')}"
        self._stamps = _stamps_of(path)
        self._identity = known.identity(self._name, self._stamps)
        self.is_known = self._identity is not None
        self._once, self._stays = _Once(self._load), True

    def check(self) -> None:
        """Raises what loading it would, from the file's header alone."""
        from library.anima_runtime.vae import check_vae_file

        check_vae_file(self._path)

    @property
    def loaded(self) -> AnimaVAE:
        """The VAE, on the device until it is moved. Raises ModelFileError for a wrong file."""
        return self._once.value()

    def load(self) -> None:
        """Has it loaded, if it is not yet."""
        self._once.value()

    def identity(self) -> str:
        """32 hex digits that latents depend on, beside the picture."""
        if self._identity is None:
            self._identity = identity_of(self.loaded.model)
            self._known.remember(self._name, self._stamps, self._identity)
        return self._identity

    def leave_device(self) -> None:
        """Moves it to main memory; if it is not loaded yet, once it is."""
        self._stays = False
        vae = self._once.if_made()
        if vae is not None:
            vae.to("cpu")

    def _load(self) -> AnimaVAE:
        from library.anima_runtime.vae import load_vae

        vae = load_vae(self._path, self._dtype, self._device)
        return vae if self._stays else vae.to("cpu")


class LazyTextEncoder:
    """Qwen3 of a file or folder, with both tokenizers: a TextEncoder, once something is encoded.

    t5_is_strict: see `load_t5_tokenizer`. known, is_known: see LazyVAE.
    """

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype,
        device: torch.device,
        qwen_plan: TokenizerPlan,
        t5_plan: TokenizerPlan,
        t5_is_strict: bool,
        known: KnownModels,
    ) -> None:
        self._path, self._dtype, self._device, self._known = path, dtype, device, known
        self._qwen_plan, self._t5_plan, self._t5_is_strict = qwen_plan, t5_plan, t5_is_strict
        versions = ", ".join(f"{package} {version(package)}" for package in ("transformers", "tokenizers"))
        self._name = f"text encoder, {dtype}, T5's tokenizer strict: {t5_is_strict}, {versions}"
        self._stamps = _stamps_of(path, qwen_plan.folder, t5_plan.folder)
        self._identity = known.identity(self._name, self._stamps)
        self.is_known = self._identity is not None
        self._once, self._stays = _Once(self._load), True

    def plan_qwen(self) -> Qwen3Model:
        """Qwen3 without weights, on the meta device; raises what loading it would, from the files' headers alone."""
        from library.anima_runtime.text.qwen3 import plan_qwen3

        return plan_qwen3(self._path)

    @property
    def loaded(self) -> TextEncoder:
        """Raises ModelFileError for wrong files, and for tokenizers that cannot be downloaded."""
        return self._once.value()

    def load(self) -> None:
        """Has it loaded, if it is not yet."""
        self._once.value()

    def identity(self) -> str:
        """See TextEncoder."""
        if self._identity is None:
            self._identity = self.loaded.identity()
            self._known.remember(self._name, self._stamps, self._identity)
        return self._identity

    def leave_device(self) -> None:
        """See TextEncoder."""
        self._stays = False
        encoder = self._once.if_made()
        if encoder is not None:
            encoder.leave_device()

    def encode(self, captions: Sequence[str], with_gradient: bool = False) -> list[CaptionStates]:
        """See TextEncoder."""
        return self.loaded.encode(captions, with_gradient)

    def _load(self) -> TextEncoder:
        from library.anima_runtime.text.qwen3 import load_qwen3
        from library.anima_runtime.text.tokenizers import provide_qwen_tokenizer, provide_t5_tokenizer

        # Tokenizers first: their download may fail, and Qwen3 takes longer.
        tokenizers = provide_qwen_tokenizer(self._qwen_plan), provide_t5_tokenizer(self._t5_plan, self._t5_is_strict)
        encoder = TextEncoder(load_qwen3(self._path, self._dtype, self._device), *tokenizers)
        if not self._stays:
            encoder.leave_device()
        return encoder


def _stamps_of(model: Path, *tokenizers: Path) -> FileStamps:
    """Those of a model's file or folder, and of folders of tokenizers, which may not be there yet.

    ModelFileError: they cannot be read.
    """
    try:
        files = _files_in(model) if model.is_dir() else [model]
        for folder in tokenizers:
            files += [file for file in _files_in(folder) if file.suffix in _TOKENIZER_FILES]
        return FileStamps.of(files)
    except OSError as error:
        raise ModelFileError(f"{model}: cannot be read: {error}") from error


def _files_in(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
