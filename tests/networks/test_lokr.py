"""LoKr's maths against LyCORIS and dense products."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from networks.adapter import Dropouts
from networks.lokr import LoKr, factorize


def randomised(adapter: LoKr) -> LoKr:
    torch.manual_seed(0)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


STRUCTURES = [
    {"rank": 4, "alpha": 2.0},
    {"rank": 3, "alpha": 7.0, "factor": -1, "decompose_both": True},
    {"rank": 100000, "alpha": 100000.0},
    {"rank": 4, "alpha": 1.0, "full_matrix": True, "factor": 4},
    {"rank": 2, "alpha": 4.0, "factor": 4, "decompose_both": True},
]


@pytest.mark.parametrize(
    ("dimension", "factor", "pair"),
    [(2048, 8, (8, 256)), (8192, 8, (8, 1024)), (1024, 8, (8, 128)), (6144, 8, (8, 768)), (256, 8, (8, 32)),
     (68, 8, (4, 17)), (64, 8, (8, 8)), (2048, -1, (32, 64)), (8192, -1, (64, 128)), (1024, -1, (32, 32)),
     (4, 8, (2, 2)), (7, 8, (1, 7)), (1, 8, (1, 1))],
)  # fmt: skip
def test_factors_of_a_dimension(dimension, factor, pair):
    assert factorize(dimension, factor) == pair


def test_factors_equal_lycoris():
    from lycoris.functional.general import factorization

    for factor in (-1, 1, 2, 3, 5, 8, 16, 40):
        for dimension in (*range(1, 200), 256, 1000, 2048, 6144):
            assert factorize(dimension, factor) == factorization(dimension, factor), (dimension, factor)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("in_features", "out_features"), [(32, 96), (96, 32), (64, 64), (68, 64)])
def test_structure_and_delta_equal_lycoris(structure, in_features, out_features):
    from lycoris.functional.lokr import diff_weight
    from lycoris.modules.lokr import LokrModule

    adapter = randomised(LoKr.for_linear(in_features, out_features, **structure))
    options = {"factor": 8, "full_matrix": False, "decompose_both": False} | structure
    theirs = LokrModule(
        "m", nn.Linear(in_features, out_features, bias=False), 1.0, options["rank"], options["alpha"],
        decompose_both=options["decompose_both"], factor=options["factor"], full_matrix=options["full_matrix"],
    )  # fmt: skip
    shapes = {name: tuple(p.shape) for name, p in theirs.named_parameters() if name.startswith("lokr_")}
    assert {name: tuple(p.shape) for name, p in adapter.named_parameters()} == shapes

    p = dict(adapter.named_parameters())
    parts = [p.get(f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")]
    whole = parts[0] is not None and parts[3] is not None
    expected = diff_weight(*parts, None, gamma=1.0 if whole else options["alpha"])
    torch.testing.assert_close(adapter.delta_weight(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_forward_adds_the_kronecker_product(structure):
    adapter = randomised(LoKr.for_linear(32, 96, **structure))
    x, base = torch.randn(2, 5, 32), torch.randn(2, 5, 96)
    torch.testing.assert_close(adapter(x, base), base + x @ adapter.delta_weight().T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", [(7, 32), (2, 3, 32), (2, 24, 32)])
def test_gradients_equal_those_of_the_dense_delta_in_float64(structure, shape):
    out_features = 96 if shape[-2] != 3 else 16  # w1 or w2 goes first
    adapter = randomised(LoKr.for_linear(32, out_features, **structure)).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    base = torch.randn(*shape[:-1], out_features, dtype=torch.float64, requires_grad=True)
    inputs = [x, base, *adapter.parameters()]
    seed = torch.randn_like(base)
    ours = torch.autograd.grad(adapter(x, base), inputs, seed)
    dense = base + F.linear(x, adapter.scale * torch.kron(adapter.w1, adapter.w2))
    for gradient, expected in zip(ours, torch.autograd.grad(dense, inputs, seed), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_new_adapter_changes_nothing_and_can_learn(structure):
    adapter = LoKr.for_linear(32, 96, **structure)
    base = torch.randn(4, 96)
    output = adapter(torch.randn(4, 32), base)
    assert torch.equal(output, base)
    output.square().sum().backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())


@pytest.mark.parametrize(("structure", "alpha"), [(STRUCTURES[2], 96 // 8 // 8), (STRUCTURES[3], 96 // 4 // 4)])
def test_whole_factors_are_written_with_the_alpha_that_means_strength_one(structure, alpha):
    adapter = LoKr.for_linear(32, 96, **structure)
    assert adapter.scale == 1.0
    tensors = adapter.tensors()
    assert tensors["alpha"].item() == alpha
    assert tensors["alpha"].dtype == torch.float32


@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_adapter_is_rebuilt_from_its_tensors(structure):
    adapter = randomised(LoKr.for_linear(32, 96, **structure))
    rebuilt = LoKr.from_tensors(adapter.tensors())
    rebuilt.load_tensors(adapter.tensors())
    torch.testing.assert_close(rebuilt.delta_weight(), adapter.delta_weight(), rtol=1e-6, atol=1e-6)
    assert rebuilt.scale == pytest.approx(adapter.scale)
    assert rebuilt.weight_shape == (96, 32)


def test_the_rank_is_that_of_the_large_factor():
    """Read from lokr_w2_b, not from lokr_w1."""
    adapter = LoKr.for_linear(512, 512, 5, 10.0)
    assert LoKr.from_tensors(adapter.tensors()).rank == 5


def test_row_dropout_keeps_whole_rows_and_scales_by_the_share_kept():
    torch.manual_seed(0)
    adapter = randomised(LoKr.for_linear(32, 96, 4, 4.0, Dropouts(rank=0.5)))
    x, base = torch.randn(200, 32), torch.zeros(200, 96)
    full = x @ adapter.delta_weight().T
    dropped = adapter(x, base)
    zero = (dropped == 0).all(dim=0)
    assert 20 < zero.sum() < 76
    torch.testing.assert_close(dropped[:, ~zero], full[:, ~zero], rtol=1e-4, atol=1e-3)

    adapter.dropouts = Dropouts(rank=0.5, rank_scale=True)
    scaled = adapter(x, base)
    kept = ~(scaled == 0).all(dim=0)
    torch.testing.assert_close(scaled[:, kept], full[:, kept] * 96 / kept.sum(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(adapter.eval()(x, base), full, rtol=1e-4, atol=1e-3)


def test_norm_of_the_delta_and_its_limit():
    adapter = randomised(LoKr.for_linear(32, 96, 4, 2.0))
    length = adapter.delta_weight().norm()
    torch.testing.assert_close(adapter.delta_norm(), length)
    adapter.limit_norm(2 * length.item())
    torch.testing.assert_close(adapter.delta_weight().norm(), length)
    adapter.limit_norm(1.5)
    assert adapter.delta_weight().norm().item() == pytest.approx(1.5, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near_float32_with_float32_gradients(dtype):
    adapter = LoKr.for_linear(64, 64, 100000, 1.0)
    nn.init.normal_(adapter.lokr_w2, std=0.1)
    x, base = torch.randn(50, 64), torch.randn(50, 64)
    exact = adapter(x, base)
    low = adapter(x.to(dtype), base.to(dtype))
    assert low.dtype == dtype
    assert (low.float() - exact).norm() / exact.norm() < 0.01
    low.float().square().mean().backward()
    assert {p.dtype for p in adapter.parameters()} == {p.grad.dtype for p in adapter.parameters()} == {torch.float32}


def test_initial_values_have_kaimings_spread():
    torch.manual_seed(0)
    adapter = LoKr.for_linear(4096, 4096, 100000, 1.0, factor=64)
    assert adapter.lokr_w1.abs().max() <= 1 / math.sqrt(64)
    assert adapter.lokr_w1.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.05)
    assert adapter.lokr_w2.abs().max() == 0
