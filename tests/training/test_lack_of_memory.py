"""What a run does and says when something needs more GPU memory than there is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from library.errors import UserError
from library.training.lack_of_memory import explaining_lack_of_memory, tried_twice


def test_out_of_memory_names_the_batch_and_three_remedies():
    batch = SimpleNamespace(captions=["a", "b"], bucket=(64, 96))
    with pytest.raises(UserError) as caught, explaining_lack_of_memory([batch]):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "2 x 64x96 pixels" in str(caught.value)
    for remedy in ("gradient_checkpointing", "batch_size", "resolution"):
        assert remedy in str(caught.value)


def test_other_errors_pass():
    with pytest.raises(ValueError, match="other"), explaining_lack_of_memory([]):
        raise ValueError("other")


@pytest.mark.parametrize(
    ("fails", "can_make_room", "succeeds"), [(0, False, True), (1, False, False), (1, True, True), (2, True, False)]
)
def test_work_is_tried_again_when_room_was_made(fails, can_make_room, succeeds):
    rooms, outcomes = [], iter([torch.OutOfMemoryError("CUDA out of memory")] * fails + ["done"])

    def work():
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    recorded = SimpleNamespace(release=lambda: rooms.append(1)) if can_make_room else None
    if succeeds:
        assert tried_twice(work, lambda: recorded) == "done"
    else:
        with pytest.raises(torch.OutOfMemoryError):
            tried_twice(work, lambda: recorded)
    assert len(rooms) == (fails > 0 and can_make_room)
