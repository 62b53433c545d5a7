"""Samples are grouped by the lengths of their contexts, and keep what is theirs."""

from __future__ import annotations

import torch

from library.anima_runtime.objective.step_inputs import (
    ContextInputs,
    Samples,
    TrainingInputs,
    by_context_length,
    context_step,
)
from library.anima_runtime.text.contexts import CaptionContext
from library.anima_runtime.text.encoding import CaptionStates


def samples(count: int) -> Samples:
    """Each holds its own number everywhere."""
    numbers = torch.arange(count, dtype=torch.float32)
    latents = numbers[:, None, None, None, None].expand(count, 2, 1, 4, 4)
    return Samples(latents, numbers, latents + 0.5, numbers + 1, numbers[:, None, None, None])


def context(number: int, rows: int) -> CaptionContext:
    return CaptionContext(torch.full((rows, 3), float(number + 1)))


def test_contexts_longer_than_the_least_go_apart_with_their_own_samples():
    first, second = by_context_length(samples(3), [context(0, 2), context(1, 9), context(2, 8)], 8, None)
    assert isinstance(first, ContextInputs)
    assert [first.rows_B.tolist(), second.rows_B.tolist()] == [[0, 2], [1]]
    assert first.timesteps_B.tolist() == [0, 2] and second.weights_B.tolist() == [2]
    assert first.target_BCTHW[:, 0, 0, 0, 0].tolist() == [0.5, 2.5] and second.mask_B1HW.flatten().tolist() == [1]
    assert [first.context_BLD.shape, second.context_BLD.shape] == [(2, 8, 3), (1, 9, 3)]
    assert first.context_BLD[:, :, 0].tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [3] * 8]


def test_zero_rows_are_left_out_to_a_multiple_and_never_added():
    captions = [context(0, 2), context(1, 5)]
    prepared = [by_context_length(samples(2), captions, 8, step) for step in (2, 4, 16)]
    assert [inputs.context_BLD.shape[1] for (inputs,) in prepared] == [6, 8, 8]


def test_what_the_llm_adapter_reads_is_padded_on_both_sides():
    """Qwen3's side is the longer one here; the mask says what is real."""
    states = CaptionStates(torch.ones(6, 3), torch.tensor([5, 1]))
    (inputs,) = by_context_length(samples(1), [states], 16, 4)
    assert isinstance(inputs, TrainingInputs)
    assert inputs.qwen_states_BSD.shape == (1, 8, 3) and inputs.t5_ids_BL.tolist() == [[5, 1, 0, 0, 0, 0, 0, 0]]
    assert [inputs.qwen_mask_BS.sum(), inputs.t5_mask_BL.sum()] == [6, 2]


def test_with_many_buckets_contexts_have_fewer_lengths():
    """Full and last batches of each bucket in each length are as many shapes as can be recorded, at most."""
    steps = {buckets: context_step(buckets, 512, 64) for buckets in (1, 8, 9, 16, 17, 32, 33, 100)}
    assert steps == {1: 128, 8: 128, 9: 256, 16: 256, 17: 512, 32: 512, 33: 512, 100: 512}
    assert context_step(100, 100, 64) == 128
