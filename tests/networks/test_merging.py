"""Sums of adapters against sums of their deltas by plain maths."""

import pytest
import torch

from library.errors import ModelFileError, SettingError
from networks.loha import LoHa
from networks.lokr import LoKr
from networks.lora import LoRA
from networks.merging import merge_adapters, merged_weight

IN, OUT = 12, 16
PATH = "blocks.0.mlp.layer1"


def filled(adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapter.tensors()


def lora(rank=2, alpha=3.0, seed=0):
    return filled(LoRA(IN, OUT, rank, alpha), seed)


def lokr(rank=2, full_matrix=False, seed=0):
    return filled(LoKr.for_linear(IN, OUT, rank, 3.0, factor=2, full_matrix=full_matrix), seed)


def loha(seed=0):
    return filled(LoHa(IN, OUT, 2, 3.0), seed)


def product(tensors):
    """ΔW in float64, by the formulas."""
    own = {suffix: tensor.double() for suffix, tensor in tensors.items()}
    if "diff" in own or "w_norm" in own:
        return own.get("diff", own.get("w_norm"))
    if "lora_up.weight" in own:
        return own["alpha"] / len(own["lora_down.weight"]) * own["lora_up.weight"] @ own["lora_down.weight"]
    if "hada_w1_a" in own:
        first, second = (own[f"hada_{name}_a"] @ own[f"hada_{name}_b"] for name in ("w1", "w2"))
        return own["alpha"] / len(own["hada_w1_b"]) * first * second
    if "lokr_w2" in own:
        return torch.kron(own["lokr_w1"], own["lokr_w2"])
    return own["alpha"] / len(own["lokr_w2_b"]) * torch.kron(own["lokr_w1"], own["lokr_w2_a"] @ own["lokr_w2_b"])


def merge_one(*parts, rank=None):
    merged = merge_adapters([({PATH: tensors}, strength) for tensors, strength in parts], rank)
    assert merged.adapters.keys() == {PATH}
    return merged.adapters[PATH], merged.relative_errors


def assert_sum(merged, parts):
    expected = sum(strength * product(tensors) for tensors, strength in parts)
    torch.testing.assert_close(product(merged), expected, atol=1e-6 * float(expected.norm()), rtol=0)


@pytest.mark.parametrize(
    "tensors", [lora(), lokr(), lokr(full_matrix=True), loha()], ids=["lora", "lokr", "whole", "loha"]
)
@pytest.mark.parametrize("strength", [1.0, 0.3, -2.0])
def test_one_adapter_keeps_its_type_at_the_strength(tensors, strength):
    merged, errors = merge_one((tensors, strength))
    assert merged.keys() == tensors.keys() and not errors
    assert merged["alpha"] == tensors["alpha"]
    assert_sum(merged, [(tensors, strength)])


def test_loras_are_summed_exactly_by_their_ranks():
    parts = [(lora(2, 3.0, 1), 1.0), (lora(3, 1.0, 2), -0.5), (lora(1, 1.0, 3), 2.0)]
    merged, errors = merge_one(*parts)
    assert merged["lora_down.weight"].shape == (6, IN) and merged["alpha"] == 6.0 and not errors
    assert_sum(merged, parts)


@pytest.mark.parametrize("others", [[lokr()], [lokr(seed=1), lokr(seed=2)], [loha(), lora()]])
def test_other_sums_become_the_nearest_lora_of_the_rank(others):
    parts = [(tensors, 0.5 + i) for i, tensors in enumerate([lokr(full_matrix=True), *others])]
    with pytest.raises(SettingError, match=f"{PATH}.*--rank N"):
        merge_one(*parts)
    merged, errors = merge_one(*parts, rank=3)
    expected = sum(strength * product(tensors) for tensors, strength in parts)
    u, s, vh = torch.linalg.svd(expected)
    nearest = u[:, :3] * s[:3] @ vh[:3]
    torch.testing.assert_close(product(merged), nearest, atol=1e-5 * float(s[0]), rtol=0)
    assert errors[PATH] == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-5)
    exact, errors = merge_one(*parts, rank=100)
    assert errors[PATH] < 1e-6 and exact["lora_down.weight"].shape == (IN, IN)
    assert_sum(exact, parts)


def test_loras_beyond_the_rank_are_cut_and_others_not():
    parts = [(lora(2, 3.0, 1), 1.0), (lora(3, 1.0, 2), 0.5)]
    exact, errors = merge_one(*parts, rank=5)
    assert not errors and exact["lora_down.weight"].shape == (5, IN)
    cut, errors = merge_one(*parts, rank=4)
    s = torch.linalg.svdvals(sum(strength * product(tensors) for tensors, strength in parts))
    assert cut["lora_down.weight"].shape == (4, IN)
    assert errors[PATH] == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-4)
    single, errors = merge_one((lora(6, 1.0, 3), 1.0), rank=4)
    assert not errors and single["lora_down.weight"].shape == (6, IN)


def test_norms_and_differences_are_added():
    norms = [({"w_norm": torch.tensor([1.0, 2.0]), "b_norm": torch.tensor([1.0, 0.0])}, 0.5)]
    norms.append(({"w_norm": torch.tensor([1.0, -2.0]).half()}, 2.0))
    merged, _ = merge_one(*norms)
    assert {suffix: tensor.tolist() for suffix, tensor in merged.items()} == {
        "w_norm": [2.5, -3.0],
        "b_norm": [0.5, 0.0],
    }
    parts = [({"diff": torch.ones(OUT, IN), "diff_b": torch.ones(OUT)}, 0.5), (lora(), 2.0)]
    merged, errors = merge_one(*parts)
    assert merged.keys() == {"diff", "diff_b"} and not errors
    assert_sum(merged, parts)
    assert merged["diff_b"].tolist() == [0.5] * OUT


def test_modules_of_either_file_are_kept():
    first, second = {"a": lora(seed=1), "b": lora(seed=2)}, {"b": lora(seed=3), "c": lokr()}
    merged = merge_adapters([(first, 1.0), (second, 0.5)], None).adapters
    assert list(merged) == ["a", "b", "c"]
    assert_sum(merged["b"], [(first["b"], 1.0), (second["b"], 0.5)])
    assert_sum(merged["c"], [(second["c"], 0.5)])


def test_dora_goes_through_alone_at_strength_1_only():
    dora = {**lora(), "dora_scale": torch.ones(OUT, 1)}
    merged, _ = merge_one((dora, 1.0))
    assert merged.keys() == dora.keys() and torch.equal(merged["dora_scale"], dora["dora_scale"])
    for parts in ([(dora, 0.5)], [(dora, 1.0), (lora(seed=1), 1.0)]):
        with pytest.raises(ModelFileError, match=r"DoRA.*--checkpoint"):
            merge_one(*parts)


def test_what_cannot_be_summed_is_named():
    with pytest.raises(ModelFileError, match=rf"{PATH} has weights of different shapes"):
        merge_one((lora(), 1.0), (filled(LoRA(IN, OUT + 1, 2, 1.0), 0), 1.0))
    with pytest.raises(ModelFileError, match=r"absolute norm value.*--base_model"):
        merge_one(({"norm_value": torch.ones(3)}, 1.0))


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_a_weight_is_merged_as_comfyui_does(strength):
    weight = torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    plain = merged_weight(weight.float(), lora(), strength)
    torch.testing.assert_close(plain.double(), weight + strength * product(lora()), atol=1e-5, rtol=0)
    dora = {**lora(), "dora_scale": torch.rand(OUT, 1) + 0.5}
    length = weight.square().sum(1, keepdim=True).sqrt()
    rescaled = (weight + product(lora())) * dora["dora_scale"] / length
    expected = weight + strength * (rescaled - weight)
    torch.testing.assert_close(merged_weight(weight.float(), dora, strength).double(), expected, atol=1e-5, rtol=0)
