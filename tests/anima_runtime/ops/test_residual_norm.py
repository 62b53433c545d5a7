"""Residuals with their RMSNorm against autograd of the plain formula, and the kernels against it."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from library.anima_runtime.ops import residual_norm
from library.anima_runtime.ops.block_ops import Sum
from tests.anima_runtime.rows import apart, close

COUNT, WIDTH = 21, 256


@pytest.fixture
def kernels(interpreter, monkeypatch):
    """`residual_norm_kernels` as a module, in Triton's interpreter; several turns a program, as of large inputs."""
    from library.anima_runtime.ops import residual_norm_kernels

    monkeypatch.setitem(residual_norm_kernels.BACKWARD_LAUNCH, "PROGRAMS", 4)
    return residual_norm_kernels


@pytest.fixture
def residual_case(draw):
    """Inputs of x + base + hidden @ weight and its RMSNorm by `norm`, and gradients of both results."""
    shapes = [(COUNT, WIDTH), (COUNT, WIDTH), (COUNT, 16), (16, WIDTH), (WIDTH,)]
    inputs = [draw(*shape).requires_grad_() for shape in shapes]
    return SimpleNamespace(inputs=inputs, dx=draw(COUNT, WIDTH), dnormed=draw(COUNT, WIDTH))


def run_residual(case, ops, dtype, has_branch, has_dx):
    """x, normed, and gradients of x and norm, by `residual_norm` or `residual_norm_kernels`."""
    x, base, hidden, weight, norm = (tensor.detach().to(dtype) for tensor in case.inputs)
    branch = Sum(apart(base), apart(hidden), weight) if has_branch else None
    x_out, normed = ops.residual_norm(apart(x), branch, norm, apart(torch.empty_like(x)))
    programs = 1 if ops is residual_norm else ops.backward_programs(COUNT)
    partial, dx_out = torch.zeros(programs, 3, WIDTH, dtype=dtype), apart(torch.empty_like(x))
    dx = apart(case.dx.to(dtype)) if has_dx else None
    ops.residual_norm_backward(dx, case.dnormed.to(dtype), x_out, normed, norm, dx_out, partial[:, 1])
    unweighed = apart(torch.empty_like(x))
    ops.residual_norm_backward(dx, case.dnormed.to(dtype), x_out, normed, norm, unweighed, None)
    assert torch.equal(unweighed, dx_out) and not partial[:, ::2].any()
    return [x_out, normed.normed_ND, dx_out, partial[:, 1].sum(0)]


@pytest.mark.parametrize("has_branch", [True, False])
@pytest.mark.parametrize("has_dx", [True, False])
@pytest.mark.parametrize(("ops", "dtype", "bound"), [("plain", torch.float64, 1e-12), ("kernels", torch.float32, 1e-5)])
def test_residual_norm_is_the_plain_formula_with_autograds_gradients(
    residual_case, request, has_branch, has_dx, ops, dtype, bound
):
    x, base, hidden, weight, norm = residual_case.inputs
    x_out = x + base + hidden @ weight if has_branch else x
    normed = F.rms_norm(x_out, (WIDTH,), norm, 1e-6)
    total = (normed * residual_case.dnormed).sum() + (x_out * residual_case.dx).sum() * has_dx
    expected = [x_out, normed, *torch.autograd.grad(total, (x, norm))]
    ops = residual_norm if ops == "plain" else request.getfixturevalue("kernels")
    for found, wanted in zip(run_residual(residual_case, ops, dtype, has_branch, has_dx), expected, strict=True):
        assert close(found, wanted, bound)


@pytest.mark.parametrize("ops", ["plain", "kernels"])
def test_a_residual_alone_needs_no_norm(residual_case, request, ops):
    ops = residual_norm if ops == "plain" else request.getfixturevalue("kernels")
    x, base, *_ = (tensor.detach().float() for tensor in residual_case.inputs)
    added, nothing = ops.residual_norm(x, Sum(apart(base)), None, None)
    assert nothing is None and close(added, x + base)
