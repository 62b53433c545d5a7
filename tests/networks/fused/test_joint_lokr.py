"""Joint LoKrs against autograd through dense weights, in float64."""

import pytest
import torch
from torch import nn

from library.anima_runtime.ops.block_ops import ManyCopies
from networks.fused.joint_lokr import JointLoKr
from networks.lokr import LoKr

ROWS, WIDTH = 6, 32
EIGHT, FOUR = ({"rank": 100000, "alpha": 1.0, "factor": factor} for factor in (8, 4))
LOW_RANK = {"rank": 2, "alpha": 3.0, "factor": 4, "decompose_both": True}
CASES = {
    "alike": (WIDTH, [(64, EIGHT)] * 3),
    "some": (WIDTH, [(64, None), (64, EIGHT), (64, EIGHT)]),
    "apart": (WIDTH, [(64, EIGHT), (64, None), (64, EIGHT)]),
    "of different factors": (WIDTH, [(64, EIGHT), (64, FOUR), (64, FOUR)]),
    "of different widths": (WIDTH, [(64, FOUR), (32, FOUR)]),
    "low-rank among whole ones": (WIDTH, [(64, FOUR), (64, LOW_RANK)]),
    "wide": (WIDTH, [(128, EIGHT)]),
    "narrow": (128, [(32, EIGHT)]),
    "of sides that are no powers of two": (48, [(96, {**EIGHT, "factor": 6})]),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_dense_weights(case):
    torch.manual_seed(0)
    width, kinds = CASES[case]
    linears = [nn.Linear(width, out, bias=False).double().requires_grad_(False) for out, _ in kinds]
    adapters = [None if kind is None else LoKr.for_linear(width, out, **kind).double() for out, kind in kinds]
    for parameter in (parameter for adapter in adapters if adapter is not None for parameter in adapter.parameters()):
        nn.init.normal_(parameter)
    joint = JointLoKr(linears, adapters)
    x = torch.randn(ROWS, width, dtype=torch.float64, requires_grad=True)
    deltas = [0 if adapter is None else adapter.delta_weight() for adapter in adapters]
    expected = [x @ (linear.weight + delta).t() for linear, delta in zip(linears, deltas, strict=True)]
    gradients = joint.empty_gradients(ROWS)
    for gradient in gradients:
        nn.init.normal_(gradient)
    loss = sum((y * gradient).sum() for y, gradient in zip(expected, gradients, strict=True))
    dx, *wanted = torch.autograd.grad(loss, [x, *joint.parameters()])

    ManyCopies(joint.copies()).run()
    with torch.no_grad():
        outputs = joint.forward(x)
        found_dx, found = joint.backward(gradients, x, None, True)
        without_dx, same = joint.backward(gradients, x, None, False)
    for ours, theirs in zip([*outputs, found_dx, *found], [*expected, dx, *wanted], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert without_dx is None
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))
