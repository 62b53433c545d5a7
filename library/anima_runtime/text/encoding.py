"""Captions to what the LLM adapter takes: Qwen3's hidden states and T5's token ids, real tokens only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from library.anima_runtime.devices import to_device
from library.anima_runtime.memory.lending import lent_to
from library.errors import ModelFileError
from library.tensor_cache import cache_key, identity_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3Model

# The one form in which captions run through frozen weights: always 8 in a batch, padded to a multiple of 64 tokens.
# A product's rounding depends on its shape, so with shapes that follow from the caption alone its result is the same,
# bit for bit, whichever captions it runs with, now or in a cache. More rows help caching and burden single captions.
_ROWS = 8
_LENGTH_STEP = 64


@dataclass(frozen=True)
class CaptionStates:
    """One caption without padding: qwen_states (S, hidden), t5_ids (L,) int64; S and L are at least 1."""

    qwen_states: torch.Tensor
    t5_ids: torch.Tensor

    @property
    def context_length(self) -> int:
        """Rows of the context that the LLM adapter makes of it."""
        return len(self.t5_ids)

    @property
    def padded_length(self) -> int:
        """Tokens of its longer side."""
        return max(len(self.t5_ids), len(self.qwen_states))


class PaddedCaptions(NamedTuple):
    """A batch of captions for the LLM adapter, padded on the right; the masks are True at real tokens."""

    qwen_states_BSD: torch.Tensor
    qwen_mask_BS: torch.Tensor
    t5_ids_BL: torch.Tensor
    t5_mask_BL: torch.Tensor


class CaptionEncoder(Protocol):
    """Whatever turns captions into states: TextEncoder, or a cache around it."""

    def encode(self, captions: Sequence[str]) -> list[CaptionStates]: ...


class TextEncoder:
    """Qwen3 and both tokenizers. Captions are encoded in full, whatever their length, as ComfyUI does."""

    def __init__(
        self, qwen: Qwen3Model, qwen_tokenizer: PreTrainedTokenizerBase, t5_tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Takes Qwen3 on the device where it is to run. ModelFileError: the tokenizer has tokens that it lacks."""
        if len(qwen_tokenizer) > qwen.config.vocab_size:
            raise ModelFileError(
                f"{qwen_tokenizer.name_or_path}: this tokenizer has {len(qwen_tokenizer)} tokens, more than the Qwen3 "
                f"model's {qwen.config.vocab_size}: they do not belong together; check qwen and qwen_tokenizer_dir."
            )
        self.qwen = qwen
        self.qwen_tokenizer = qwen_tokenizer
        self.t5_tokenizer = t5_tokenizer
        self.device = qwen.device

    def leave_device(self) -> None:
        """Moves Qwen3 to main memory; from then on each `encode` lends its weights to the device while it runs."""
        self.qwen.to("cpu")

    def identity(self) -> str:
        """32 hex digits that the states depend on, beside the caption: weights and tokenizers."""
        tokenizers = (tokenizer.backend_tokenizer.to_str() for tokenizer in (self.qwen_tokenizer, self.t5_tokenizer))
        return cache_key(identity_of(self.qwen), *tokenizers)

    def encode(self, captions: Sequence[str], with_gradient: bool = False) -> list[CaptionStates]:
        """The states of each caption, on the device and in Qwen3's dtype.

        Without gradients they are the same bits in any batch; with them, the captions run as one batch of their own.
        """
        qwen_ids = [self._qwen_ids(caption) for caption in captions]
        lengths = [len(ids) for ids in qwen_ids]
        states: dict[int, torch.Tensor] = {}
        # Not inference_mode: the states take part in a graph when the LLM adapter is trained.
        with torch.set_grad_enabled(with_gradient), lent_to(self.qwen, self.device):
            batches = [(range(len(captions)), max(lengths))] if with_gradient else fixed_batches(lengths)
            for rows, length in batches:
                hidden = self._hidden([qwen_ids[row] for row in rows], length)
                states.update((row, hidden[place, : lengths[row]].clone()) for place, row in enumerate(rows))
        return [CaptionStates(states[row], self._t5_ids(caption)) for row, caption in enumerate(captions)]

    def _hidden(self, qwen_ids: Sequence[torch.Tensor], length: int) -> torch.Tensor:
        """Attention is causal and the padding on the right: no real token can see a padded one, so no mask is needed.

        Where rows may repeat (see `fixed_batches`), so does the result.
        """
        padded = pad_sequence(list(qwen_ids), batch_first=True, padding_value=self.qwen_tokenizer.pad_token_id)
        padded = F.pad(padded, (0, length - padded.shape[1]), value=self.qwen_tokenizer.pad_token_id)
        return self.qwen(input_ids=to_device(padded, self.device), use_cache=False).last_hidden_state

    def _qwen_ids(self, caption: str) -> torch.Tensor:
        """No template and no BOS; the empty caption is a single pad token, as in ComfyUI."""
        ids = self.qwen_tokenizer(caption, add_special_tokens=False, verbose=False).input_ids
        return torch.tensor(ids or [self.qwen_tokenizer.pad_token_id])

    def _t5_ids(self, caption: str) -> torch.Tensor:
        """Ends with `</s>` = 1, which is all there is of the empty caption."""
        return to_device(torch.tensor(self.t5_tokenizer(caption, verbose=False).input_ids), self.device)


def fixed_batches(lengths: Sequence[int]) -> Iterator[tuple[list[int], int]]:
    """Rows of captions that run together, always 8, and the length to pad them to, a multiple of 64.

    lengths: of each caption, in tokens. Captions of nearly one length share a batch; one with fewer is filled up by
    repeating its first row.
    """
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_length.setdefault(-(-length // _LENGTH_STEP) * _LENGTH_STEP, []).append(row)
    for length, rows in sorted(by_length.items()):
        for start in range(0, len(rows), _ROWS):
            batch = rows[start : start + _ROWS]
            yield batch + batch[:1] * (_ROWS - len(batch)), length


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
