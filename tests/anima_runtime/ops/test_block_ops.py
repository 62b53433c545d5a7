"""The passes between a block's products against autograd of the plain formulas, and the kernels against them."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from library.anima_runtime.ops import block_ops
from library.anima_runtime.ops.block_ops import Gated, ManyCopies, Modulation, ModulationSums, Sum
from tests.anima_runtime.rows import apart, close

SAMPLES, LENGTH, WIDTH, HEAD = 2, 21, 512, 32
COUNT = SAMPLES * LENGTH


@pytest.fixture
def kernels(interpreter, monkeypatch):
    """`block_kernels` in Triton's interpreter; tests/test_cuda.py runs whole blocks of them on a card.

    Cut up as large inputs are: several programs a row, and several turns a program.
    """
    from library.anima_runtime.ops import block_kernels

    monkeypatch.setitem(block_kernels.SUM_LAUNCH, "ROWS", 4)
    monkeypatch.setitem(block_kernels.GELU_LAUNCH, "SIZE", 256)
    return block_kernels


@pytest.fixture
def norm_kernels(kernels, monkeypatch):
    """The same of `norm_kernels`."""
    from library.anima_runtime.ops import norm_kernels

    monkeypatch.setitem(norm_kernels.BACKWARD_LAUNCH, "PROGRAMS", 4)
    return norm_kernels


@pytest.fixture
def head_kernels(kernels, monkeypatch):
    """The same of `head_kernels`."""
    from library.anima_runtime.ops import head_kernels

    monkeypatch.setitem(head_kernels.LAUNCH, "PROGRAMS", 4)
    return head_kernels


def plain_gated_norm(x, base, hidden, weight, gate, shift, scale):
    x = x + gate[:, None] * (base + hidden @ weight).view_as(x)
    return x, F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


@pytest.fixture
def gated_case(draw):
    """Inputs of x + gate * (base + hidden @ weight) and its modulated norm, and gradients of both results."""
    shapes = [(SAMPLES, LENGTH, WIDTH), (COUNT, WIDTH), (COUNT, 16), (16, WIDTH), *[(SAMPLES, WIDTH)] * 3]
    inputs = [draw(*shape).requires_grad_() for shape in shapes]
    return SimpleNamespace(inputs=inputs, dx=draw(*shapes[0]), dnormed=draw(*shapes[0]))


def run_gated(case, ops, dtype, wants_modulation=True):
    """x, normed, and gradients of x, the branch, and (shift, scale, gate), by `block_ops` or `norm_kernels`."""
    x, base, hidden, weight, gate, shift, scale = (tensor.detach().to(dtype) for tensor in case.inputs)
    gated, modulation = Gated(Sum(apart(base), apart(hidden), weight), gate), Modulation(shift, scale)
    x_out, normed = ops.gated_norm(x, gated, modulation, apart(torch.empty_like(base)))
    programs = 1 if ops is block_ops else ops.modulation_programs(SAMPLES, LENGTH)
    partial = torch.full((SAMPLES, programs, 4, WIDTH), torch.nan, dtype=dtype)
    dbranch = apart(torch.empty_like(base))
    sums = ModulationSums(partial, 0, 3) if wants_modulation else None
    dx, dnormed = case.dx.to(dtype), case.dnormed.to(dtype).flatten(0, 1)
    dx = ops.gated_norm_backward(dx, dnormed, x_out, normed, modulation, gated, dbranch, sums)
    found = partial.sum(1)[:, [0, 1, 3]].unbind(1) if wants_modulation else []
    return [x_out, normed.normed_ND, dx, dbranch, *found]


def test_gated_norm_is_the_plain_formula_with_autograds_gradients(gated_case):
    x_out, normed = plain_gated_norm(*gated_case.inputs)
    x, base, _, _, gate, shift, scale = gated_case.inputs
    both = (x_out * gated_case.dx).sum() + (normed * gated_case.dnormed).sum()
    gradients = torch.autograd.grad(both, (x, base, shift, scale, gate))
    expected = [x_out, normed.flatten(0, 1), *gradients]
    for found, wanted in zip(run_gated(gated_case, block_ops, torch.float64), expected, strict=True):
        assert close(found, wanted, 1e-12)


@pytest.mark.parametrize("wants_modulation", [True, False])
def test_gated_norms_kernels_equal_it(gated_case, norm_kernels, wants_modulation):
    expected = run_gated(gated_case, block_ops, torch.float64, wants_modulation)
    found = run_gated(gated_case, norm_kernels, torch.float32, wants_modulation)
    for result, wanted in zip(found, expected, strict=True):
        assert close(result, wanted)


@pytest.mark.parametrize("ops", ["plain", "kernels"])
def test_either_half_of_gated_norm_can_be_left_out(gated_case, request, ops):
    ops = block_ops if ops == "plain" else request.getfixturevalue("norm_kernels")
    x, base, _, _, gate, shift, scale = (tensor.detach().float() for tensor in gated_case.inputs)
    gated, modulation, room = Gated(Sum(base), gate), Modulation(shift, scale), torch.empty_like(base)
    added, nothing = ops.gated_norm(x, gated, None, None)
    assert nothing is None and close(added, x + gate[:, None] * base.view_as(x))
    same, normed = ops.gated_norm(x, None, modulation, room)
    zero = torch.zeros_like(base), torch.zeros(COUNT, 1), torch.zeros(1, WIDTH)
    assert same is x and close(normed.normed_ND, plain_gated_norm(x, *zero, gate, shift, scale)[1].flatten(0, 1))
    dbranch = torch.empty_like(base)
    assert ops.gated_norm_backward(x, None, added, None, None, gated, dbranch, None) is x
    assert close(dbranch, (gate[:, None] * x).flatten(0, 1))


def test_partial_sums_are_added(draw, kernels):
    partial = draw(2, 11, 40)
    assert close(kernels.sum_programs(partial.float()), partial.sum(1), 1e-6)


@pytest.fixture
def head_case(draw):
    """q, k and v, the norms' weights, gradients of the results, and rotary tables."""
    return SimpleNamespace(
        inputs=[draw(COUNT, WIDTH).requires_grad_() for _ in range(3)],
        weights=[draw(HEAD).requires_grad_() for _ in range(2)], gradients=[draw(COUNT, WIDTH) for _ in range(3)],
        rotary=(draw(LENGTH, HEAD // 2), draw(LENGTH, HEAD // 2)),
    )  # fmt: skip


def run_heads(case, ops, dtype, turns, norms, copies):
    """Results, gradients of the inputs (v's with them, if it is copied), and those of the weights, of so many norms."""
    inputs, weights, gradients = (
        [tensor.detach().to(dtype) for tensor in tensors] for tensors in (case.inputs, case.weights, case.gradients)
    )
    inputs, weights = [apart(x) for x in inputs[:norms]], weights[:norms]
    gradients = gradients[:norms] + gradients[2:] * copies
    rotary = tuple(table.to(dtype) for table in case.rotary) if turns else None
    into = [apart(torch.empty_like(x)) for x in gradients]
    sums = block_ops.empty_head_sums(gradients[0], norms, HEAD)
    if ops is not block_ops:
        sums = torch.full((norms, ops.head_programs(COUNT, WIDTH), HEAD), torch.nan)
    outputs = ops.head_norms(inputs, weights, rotary, LENGTH)
    ops.head_norms_backward(gradients, inputs, weights, rotary, LENGTH, into, sums)
    return [*outputs, *into, *sums.sum(1)]


def plain_heads(case, turns, norms, copies):
    """The same by autograd."""
    outputs = []
    for x, weight in zip(case.inputs[:norms], case.weights, strict=False):
        heads = F.rms_norm(x.view(SAMPLES, LENGTH, -1, HEAD), (HEAD,), weight, 1e-6)
        if turns:
            cos, sin = (table[:, None] for table in case.rotary)
            a, b = heads.chunk(2, dim=-1)
            heads = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        outputs.append(heads.reshape(COUNT, WIDTH))
    leaves = case.inputs[:norms] + case.weights[:norms]
    found = torch.autograd.grad(outputs, leaves, case.gradients[:norms])
    return [*outputs, *found[:norms], *case.gradients[2:] * copies, *found[norms:]]


@pytest.mark.parametrize(("norms", "copies"), [(1, False), (2, False), (1, True), (2, True)])
@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize(("ops", "dtype", "bound"), [("plain", torch.float64, 1e-12), ("kernels", torch.float32, 1e-5)])
def test_head_norms_are_the_plain_formula_with_autograds_gradients(
    head_case, request, norms, copies, turns, ops, dtype, bound
):
    ops = block_ops if ops == "plain" else request.getfixturevalue("head_kernels")
    expected = plain_heads(head_case, turns, norms, copies)
    for found, wanted in zip(run_heads(head_case, ops, dtype, turns, norms, copies), expected, strict=True):
        assert close(found, wanted, bound)


@pytest.mark.parametrize("ops", ["plain", "kernels"])
def test_gradients_of_heads_may_be_wider_than_what_they_are_written_to(head_case, request, ops):
    """Those of few keys, and of their values, are float32 sums; the model is bf16."""
    ops = block_ops if ops == "plain" else request.getfixturevalue("head_kernels")
    expected = plain_heads(head_case, False, 1, True)
    x, weight, gradients = head_case.inputs[0].detach(), head_case.weights[0].detach(), head_case.gradients[::2]
    into = [apart(torch.empty(COUNT, WIDTH, dtype=torch.bfloat16)) for _ in gradients]
    wide = [gradient.float() for gradient in gradients]
    ops.head_norms_backward(wide, [x.bfloat16()], [weight.float()], None, LENGTH, into, None)
    for found, wanted in zip(into, expected[1:3], strict=True):
        assert found.dtype == torch.bfloat16 and close(found, wanted, 0.005)


@pytest.mark.parametrize(("ops", "dtype", "bound"), [("plain", torch.float64, 1e-12), ("kernels", torch.float32, 1e-6)])
def test_gelu_is_exact_with_autograds_gradient(draw, request, ops, dtype, bound):
    ops = block_ops if ops == "plain" else request.getfixturevalue("kernels")
    x, dout = (3 * draw(COUNT, 600)).requires_grad_(), draw(COUNT, 600)
    expected = F.gelu(x)
    (gradient,) = torch.autograd.grad((expected * dout).sum(), x)
    out, dx = (apart(torch.empty(COUNT, 600, dtype=dtype)) for _ in range(2))
    ops.gelu(x.detach().to(dtype), out)
    ops.gelu_backward(dout.to(dtype), x.detach().to(dtype), dx)
    assert close(out, expected, bound) and close(dx, gradient, bound)


@pytest.mark.parametrize("ops", ["plain", "kernels"])
def test_many_copies_put_each_matrix_in_its_place_as_it_now_is(draw, request, ops):
    kernels = None if ops == "plain" else request.getfixturevalue("kernels")
    sources, storage = [draw(3, 700).float(), draw(100, 16).float()], torch.zeros(2000, 800)
    places = [storage[:3, :700], storage[1100:1116, 700:].t()]
    copies = [(sources[0], places[0], 1.0), (sources[1], places[1], 0.5)]
    plain, plan = ManyCopies(copies), None
    for _ in range(2):
        if kernels is None:
            plain.run()
        else:
            plan = kernels.copy_all(copies, plan)
        assert torch.equal(places[0], sources[0]) and torch.equal(places[1], sources[1] * 0.5)
        assert storage.count_nonzero() == sources[0].numel() + sources[1].numel()
        sources[0].add_(1)


@pytest.mark.parametrize("ops", ["plain", "kernels"])
def test_zero_keys_enlarge_the_denominator(draw, request, ops):
    """Logits of some keys with zeros behind them; their number, and that of rows, fill no whole program."""
    ops = block_ops if ops == "plain" else request.getfixturevalue(ops)
    logits, values = 40 * draw(SAMPLES, 3, LENGTH, 5), draw(SAMPLES, 3, 5, HEAD)
    out = (logits.softmax(-1) @ values).transpose(1, 2).float().contiguous()
    lse = logits.logsumexp(-1).float().mT.contiguous().mT  # rows of a head, any distance apart
    all_logits = F.pad(logits, (0, 7))
    total = ops.add_zero_keys(out, lse, 7)
    assert close(out.double(), (all_logits.softmax(-1) @ F.pad(values, (0, 0, 0, 7))).transpose(1, 2))
    assert close(total.double(), all_logits.logsumexp(-1))


def test_kernels_are_tried_before_a_run_relies_on_them(kernels, monkeypatch):
    """A machine may have Triton but no C compiler, which it needs."""
    cpu = torch.device("cpu")
    assert block_ops.kernel_obstacle(cpu) is None
    monkeypatch.setattr(kernels, "gelu", Mock(side_effect=RuntimeError("Failed to find C compiler")))
    assert block_ops.kernel_obstacle(cpu) == "RuntimeError: Failed to find C compiler"


class Launches:
    """Stands in for a kernel and collects the grids that it would be launched with."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *arguments, **numbers: None


def test_a_hundred_thousand_tokens_fit_the_grids_of_cuda(kernels, norm_kernels, head_kernels, monkeypatch):
    """CUDA's grids end at 65535 along all axes but the first; batch 32 at 1024 x 1024 has 131072 tokens."""
    launches = Launches()
    for name in ("_gated_norm", "_gated_norm_backward"):
        monkeypatch.setattr(norm_kernels, name, launches)
    for name in ("_head_norms", "_head_norms_backward"):
        monkeypatch.setattr(head_kernels, name, launches)
    for name in ("_sum_programs", "_gelu", "_gelu_backward"):
        monkeypatch.setattr(kernels, name, launches)
    samples, length, width = 32, 4096, 2048
    x, modulation = torch.empty(samples, length, width, device="meta"), torch.empty(samples, width, device="meta")
    rows, wide = x.flatten(0, 1), torch.empty(samples * length, 8192, device="meta")
    gated, changed = Gated(Sum(rows), modulation), Modulation(modulation, modulation)
    _, normed = norm_kernels.gated_norm(x, gated, changed, rows)
    partial = torch.empty(samples, norm_kernels.modulation_programs(samples, length), 9, width, device="meta")
    norm_kernels.gated_norm_backward(x, rows, x, normed, changed, gated, rows, ModulationSums(partial, 0, 2))
    kernels.sum_programs(partial.flatten(2))
    head_kernels.head_norms([rows], [modulation[0, :128]], None, length)
    head_kernels.head_norms_backward([rows], [rows], [modulation[0, :128]], None, length, [rows], None)
    kernels.gelu(wide, wide)
    kernels.gelu_backward(wide, wide, wide)
    assert len(launches.grids) == 7
    assert all(size <= 65535 for grid in launches.grids for size in grid[1:])
