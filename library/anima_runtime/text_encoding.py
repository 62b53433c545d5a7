"""Captions to what the LLM adapter takes: Qwen3's hidden states and T5's token ids, real tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Qwen3Model

from library.anima_runtime.devices import to_device
from library.errors import ModelFileError

# Captions run through Qwen3 together: memory stays bounded when a whole dataset is encoded at once.
_BATCH_SIZE = 16


@dataclass(frozen=True)
class CaptionStates:
    """One caption without padding: qwen_states (S, hidden), t5_ids (L,) int64; S and L are at least 1."""

    qwen_states: torch.Tensor
    t5_ids: torch.Tensor


class PaddedCaptions(NamedTuple):
    """A batch of captions for the LLM adapter, padded on the right; the masks are True at real tokens."""

    qwen_states_BSD: torch.Tensor
    qwen_mask_BS: torch.Tensor
    t5_ids_BL: torch.Tensor
    t5_mask_BL: torch.Tensor


class CaptionEncoder(Protocol):
    """Whatever turns captions into states: TextEncoder, or CachedTextEncoder around it."""

    def encode(self, captions: Sequence[str]) -> list[CaptionStates]: ...


class TextEncoder:
    """Qwen3 and both tokenizers. Captions are encoded in full, whatever their length, as ComfyUI does."""

    def __init__(
        self, qwen: Qwen3Model, qwen_tokenizer: PreTrainedTokenizerBase, t5_tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Raises ModelFileError when the tokenizer has tokens that the model lacks."""
        if len(qwen_tokenizer) > qwen.config.vocab_size:
            raise ModelFileError(
                f"{qwen_tokenizer.name_or_path}: this tokenizer has {len(qwen_tokenizer)} tokens, more than the Qwen3 "
                f"model's {qwen.config.vocab_size}: they do not belong together; check qwen and qwen_tokenizer_dir."
            )
        self.qwen = qwen
        self.qwen_tokenizer = qwen_tokenizer
        self.t5_tokenizer = t5_tokenizer

    def encode(self, captions: Sequence[str], with_gradient: bool = False) -> list[CaptionStates]:
        """The states of each caption, on Qwen3's device and in its dtype; the same alone as in any batch."""
        states: list[CaptionStates] = []
        # Not inference_mode: the states take part in a graph when the LLM adapter is trained.
        with torch.set_grad_enabled(with_gradient):
            for start in range(0, len(captions), _BATCH_SIZE):
                states += self._encode_batch(captions[start : start + _BATCH_SIZE])
        return states

    def _encode_batch(self, captions: Sequence[str]) -> list[CaptionStates]:
        qwen_ids = [self._qwen_ids(caption) for caption in captions]
        padded = pad_sequence(qwen_ids, batch_first=True, padding_value=self.qwen_tokenizer.pad_token_id)
        # Attention is causal and the padding on the right, so no real token can see a padded one: no mask is needed.
        hidden = self.qwen(input_ids=padded.to(self.qwen.device), use_cache=False).last_hidden_state
        return [
            CaptionStates(hidden[row, : len(ids)].clone(), self._t5_ids(caption))
            for row, (caption, ids) in enumerate(zip(captions, qwen_ids, strict=True))
        ]

    def _qwen_ids(self, caption: str) -> torch.Tensor:
        """No template and no BOS; the empty caption is a single pad token, as in ComfyUI."""
        ids = self.qwen_tokenizer(caption, add_special_tokens=False, verbose=False).input_ids
        return torch.tensor(ids or [self.qwen_tokenizer.pad_token_id])

    def _t5_ids(self, caption: str) -> torch.Tensor:
        """Ends with `</s>` = 1, which is all there is of the empty caption."""
        return torch.tensor(self.t5_tokenizer(caption, verbose=False).input_ids, device=self.qwen.device)


class CachedTextEncoder:
    """Remembers each caption's states in main memory; a caption is encoded once."""

    def __init__(self, encoder: CaptionEncoder) -> None:
        self.encoder = encoder
        self._states: dict[str, CaptionStates] = {}

    def encode(self, captions: Sequence[str]) -> list[CaptionStates]:
        """The states of each caption, on the CPU; the unseen ones are encoded together."""
        unseen = [caption for caption in dict.fromkeys(captions) if caption not in self._states]
        for caption, states in zip(unseen, self.encoder.encode(unseen), strict=True):
            self._states[caption] = CaptionStates(states.qwen_states.cpu(), states.t5_ids.cpu())
        return [self._states[caption] for caption in captions]


def pad_captions(captions: Sequence[CaptionStates], device: torch.device | str, least: int = 0) -> PaddedCaptions:
    """A batch on `device`, padded to the longest caption of each side, and to `least` tokens at least.

    On the way to a GPU it lies in pinned memory, so that the copy waits for nothing.
    """
    qwen_states_BSD, qwen_mask_BS = _pad([caption.qwen_states for caption in captions], device, least)
    t5_ids_BL, t5_mask_BL = _pad([caption.t5_ids for caption in captions], device, least)
    return PaddedCaptions(qwen_states_BSD, qwen_mask_BS, t5_ids_BL, t5_mask_BL)


def _pad(rows: Sequence[torch.Tensor], device: torch.device | str, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (length, ...) stacked with zeros after their end, and the mask of their real places."""
    padded = pad_sequence(list(rows), batch_first=True)
    missing = max(0, least - padded.shape[1])
    padded = F.pad(padded, (0, 0) * (padded.ndim - 2) + (0, missing))
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return to_device(padded, device), to_device(mask, device)
