from __future__ import annotations

import math

import pytest
import torch

from library.anima_runtime.attention import RMSNorm, attend, axis_angles, rotate


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_norm_statistics_are_taken_in_float32(dtype, tolerance):
    """Squares near 90,000 overflow float16, and a sum of 4096 of them loses its last terms in bfloat16."""
    x = (300 + torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))).to(dtype)
    norm = RMSNorm(4096).to(dtype)
    norm.weight.data.mul_(1.5)
    exact = 1.5 * x.double() / (x.double().square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    assert norm(x).dtype == dtype
    assert ((norm(x).double() - exact).abs() / exact).max() <= tolerance


def test_a_norm_keeps_the_dtype_of_a_float32_stream_with_float16_weights():
    x = torch.tensor([[3.0, 4.0]])
    normed = RMSNorm(2).half()(x)
    assert normed.dtype == torch.float32
    torch.testing.assert_close(normed, x / math.sqrt(12.5), atol=1e-6, rtol=0)


def test_rotation_turns_first_and_second_half_together():
    angles = axis_angles(3, 4, 100.0, torch.device("cpu"))
    torch.testing.assert_close(angles, torch.tensor([[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]]))
    x = torch.zeros(1, 3, 1, 4)
    x[..., 0] = 1.0  # turns into dimension 2
    x[..., 3] = 1.0  # turns into minus dimension 1
    rotated = rotate(x, (angles.cos(), angles.sin()))
    expected = [[math.cos(p), -math.sin(p / 10), math.sin(p), math.cos(p / 10)] for p in range(3)]
    torch.testing.assert_close(rotated[0, :, 0], torch.tensor(expected))
    assert rotate(x.bfloat16(), (angles.cos(), angles.sin())).dtype == torch.bfloat16


def test_attention_equals_the_formula_over_the_keys_that_take_part():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, 3, 8, generator=generator) for length in (4, 5, 5))
    mask = torch.tensor([[True, True, False, False, False], [True, True, True, True, True]])
    joined = attend(q, k, v, mask)
    for sample, keys in ((0, 2), (1, 5)):
        for head in range(3):
            scores = q[sample, :, head] @ k[sample, :keys, head].T / math.sqrt(8)
            expected = scores.softmax(dim=-1) @ v[sample, :keys, head]
            torch.testing.assert_close(joined[sample, :, 8 * head : 8 * head + 8], expected)
