"""What a step computes the loss of: noisy latents with the text of each, in groups whose contexts are of one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from library.anima_runtime.devices import to_device
from library.anima_runtime.text.contexts import CaptionContext, stack_contexts
from library.anima_runtime.text.encoding import CaptionStates, pad_captions

# Where zero rows of a context can be left out, batches have a multiple of at least so many others: each row takes time.
CONTEXT_STEP = 128


class Samples(NamedTuple):
    """A batch's samples, on the device.

    weights_B: what each sample's loss is multiplied by. mask_B1HW: what that of each place is; ones [B, 1, 1, 1]
    without masks.
    """

    noisy_BCTHW: Tensor
    timesteps_B: Tensor
    target_BCTHW: Tensor
    weights_B: Tensor
    mask_B1HW: Tensor


class TrainingInputs(NamedTuple):
    """`Samples` whose contexts are of one length, at rows_B of the batch; the last four are `PaddedCaptions`."""

    rows_B: Tensor
    noisy_BCTHW: Tensor
    timesteps_B: Tensor
    target_BCTHW: Tensor
    weights_B: Tensor
    mask_B1HW: Tensor
    qwen_states_BSD: Tensor
    qwen_mask_BS: Tensor
    t5_ids_BL: Tensor
    t5_mask_BL: Tensor


class ContextInputs(NamedTuple):
    """`TrainingInputs` where nothing that makes the context has adapters, so that it is there already."""

    rows_B: Tensor
    noisy_BCTHW: Tensor
    timesteps_B: Tensor
    target_BCTHW: Tensor
    weights_B: Tensor
    mask_B1HW: Tensor
    context_BLD: Tensor


def by_context_length(
    samples: Samples,
    captions: Sequence[CaptionStates] | Sequence[CaptionContext],
    least_rows: int,
    row_step: int | None,
) -> list[TrainingInputs] | list[ContextInputs]:
    """The samples with their captions, in groups whose contexts have the same number of rows.

    A context is as long as its caption alone would make it, and `least_rows` at least, so captions that need more go
    through the model apart from the others: zero rows are part of the model's input, more of them change a result.
    row_step: zero rows that no caption of a group needs are left out, to a multiple of so many; None: all are there.
    """
    device, rows_of = samples.noisy_BCTHW.device, {}
    for row, caption in enumerate(captions):
        rows_of.setdefault(max(least_rows, caption.context_length), []).append(row)
    prepared = []
    for length, rows in rows_of.items():
        own = [captions[row] for row in rows]
        if row_step is not None:
            longest = max(caption.padded_length for caption in own)
            length = min(length, -(-longest // row_step) * row_step)
        chosen = slice(None) if len(rows_of) == 1 else rows
        common = (to_device(torch.tensor(rows), device), *(tensor[chosen] for tensor in samples))
        if isinstance(own[0], CaptionContext):
            prepared.append(ContextInputs(*common, to_device(stack_contexts(own, length), device)))
        else:
            prepared.append(TrainingInputs(*common, *pad_captions(own, device, length)))
    return prepared


def context_step(buckets: int, longest: int, most_shapes: int) -> int:
    """What numbers of context rows are rounded up to a multiple of, for contexts of up to `longest` rows.

    For each number that occurs a bucket's steps are recorded once more, for full batches and for its last one. With
    many buckets there are fewer numbers, so that all can be recorded. most_shapes: how many can.
    """
    step = CONTEXT_STEP
    while step < longest and 2 * buckets * -(-longest // step) > most_shapes:
        step *= 2
    return step
