"""Dense deltas of one module's tensors, against plain maths."""

import pytest
import torch

from library.errors import ModelFileError
from networks.deltas import adapter_of, bias_delta_of, delta_of

ALPHA = torch.tensor(6.0)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


DOWN, UP = drawn(2, 5), drawn(7, 2)
LORA = {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": ALPHA}
W1, W2_A, W2_B = drawn(2, 3), drawn(4, 2), drawn(2, 5)
HADA = {"hada_w1_a": drawn(6, 2), "hada_w1_b": drawn(2, 4), "hada_w2_a": drawn(6, 2, seed=1), "hada_w2_b": drawn(2, 4)}

CASES = {
    "lora": (LORA, 3.0 * UP @ DOWN),
    "lora in bf16": (
        {name: tensor.bfloat16() for name, tensor in LORA.items()},
        3.0 * UP.bfloat16().float() @ DOWN.bfloat16().float(),
    ),
    "lokr": ({"lokr_w1": W1, "lokr_w2_a": W2_A, "lokr_w2_b": W2_B, "alpha": ALPHA}, 3.0 * torch.kron(W1, W2_A @ W2_B)),
    "whole lokr": ({"lokr_w1": W1, "lokr_w2": drawn(4, 5), "alpha": ALPHA}, torch.kron(W1, drawn(4, 5))),
    "loha": (
        {**HADA, "alpha": ALPHA},
        3.0 * (HADA["hada_w1_a"] @ HADA["hada_w1_b"]) * (HADA["hada_w2_a"] @ HADA["hada_w2_b"]),
    ),
    "norm": ({"w_norm": drawn(4)}, drawn(4)),
    "diff": ({"diff": drawn(3, 2).bfloat16(), "diff_b": drawn(3)}, drawn(3, 2).bfloat16().float()),
}


@pytest.mark.parametrize("case", CASES)
def test_the_delta_is_the_formulas(case):
    tensors, expected = CASES[case]
    delta = delta_of(tensors)
    assert delta.dtype == torch.float32 and not delta.requires_grad
    torch.testing.assert_close(delta, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**LORA, "dora_scale": torch.ones(7, 1)}, "without the base model"),
        ({"norm_value": torch.ones(3)}, "norm_value"),
        ({"b_norm": torch.ones(3)}, "b_norm"),
        ({"diff_b": torch.ones(3)}, "diff_b"),
        ({"lora_down.weight": DOWN}, "no whole adapter"),
    ],
)
def test_what_tensors_alone_do_not_tell_is_an_error(tensors, message):
    with pytest.raises(ModelFileError, match=message):
        delta_of(tensors)


def test_doras_factors_can_be_had_without_its_scales():
    adapter = adapter_of({**LORA, "dora_scale": torch.ones(7, 1)})
    assert adapter.dora_scale is None
    torch.testing.assert_close(adapter.delta_weight(), 3.0 * UP @ DOWN)


def test_biases_are_told_apart_from_weights():
    assert bias_delta_of({"b_norm": torch.ones(3, dtype=torch.float16)}).tolist() == [1.0, 1.0, 1.0]
    assert bias_delta_of({"diff": torch.ones(2, 2), "diff_b": torch.tensor([2.0, 3.0])}).tolist() == [2.0, 3.0]
    assert bias_delta_of(LORA) is None
