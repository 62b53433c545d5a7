"""Captions to text context where neither Qwen3 nor the LLM adapter is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from library.anima_runtime.text.encoding import CaptionEncoder, fixed_batches, pad_captions
from library.anima_runtime.transformer import AnimaTransformer


@dataclass(frozen=True)
class CaptionContext:
    """One caption's context rows (L, context width), one for each of its T5 tokens, in the transformer's dtype."""

    rows: torch.Tensor

    @property
    def context_length(self) -> int:
        """How many rows it has."""
        return len(self.rows)

    padded_length = context_length


class ContextEncoder:
    """Runs captions through Qwen3 and the LLM adapter, both frozen, in the one form of `fixed_batches`."""

    def __init__(self, text_encoder: CaptionEncoder, transformer: AnimaTransformer, device: torch.device | str) -> None:
        """device: where the transformer lies."""
        self.text_encoder = text_encoder
        self.transformer = transformer
        self.device = device

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[CaptionContext]:
        """The context of each caption, on the device; the same bits in any batch."""
        states = self.text_encoder.encode(captions)
        lengths = [max(len(caption.qwen_states), len(caption.t5_ids)) for caption in states]
        contexts: dict[int, CaptionContext] = {}
        for rows, length in fixed_batches(lengths):
            padded = pad_captions([states[row] for row in rows], self.device, length)
            context_BLD = self.transformer.encode_context(*padded, min_length=0)
            for place, row in enumerate(rows):
                contexts[row] = CaptionContext(context_BLD[place, : len(states[row].t5_ids)].clone())
        return [contexts[row] for row in range(len(captions))]


def stack_contexts(contexts: Sequence[CaptionContext], length: int) -> torch.Tensor:
    """context_BLD of `length` rows each: the caption's own, then zeros, where the contexts lie."""
    return torch.stack([F.pad(context.rows, (0, 0, 0, length - len(context.rows))) for context in contexts])
