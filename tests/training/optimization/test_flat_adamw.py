"""AdamW over a few long tensors: held to torch's own over the many, bit for bit."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from torch import nn

from library.anima_runtime.config import AnimaConfig
from library.training.optimization.flat_adamw import FlatAdamW
from library.training.optimization.optimizer_states import load_optimizer, optimizer_content
from library.training.optimization.optimizers import OptimizerSettings, make_optimizer
from tools.anima_shapes import TINY, transformer_shapes
from tools.benchmark_cases import EAGER, BenchmarkTrainer, Case, case_settings, endless_batches, made_trainer

# Whole vectors of torch's CPU kernel, which rounds the rest of a tensor otherwise; the second needs padding.
SHAPES = [(16, 64), (16,), (64, 4), (2, 16), (128,)]
CPU = torch.device("cpu")


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(own: list[nn.Parameter]) -> list[dict]:
    return [
        {"name": "first", "params": own[:3], "lr": 1e-2, "weight_decay": 0.1},
        {"name": "rest", "params": own[3:], "lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6},
    ]


def give_gradients(own: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in own:
        gradient = torch.randn(parameter.shape, generator=generator)
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.copy_(gradient)


def take_step(optimizer: torch.optim.Optimizer, own: list[nn.Parameter], step: int, found_inf: float = 0.0) -> None:
    """One step of its own gradients and rates; no step where found_inf is 1."""
    optimizer.zero_grad(set_to_none=False)
    give_gradients(own, step)
    for group, base in zip(optimizer.param_groups, (1e-2, 3e-3), strict=True):
        group["lr"] = base / (step + 1)
    if optimizer.defaults["fused"]:  # others cannot be told
        optimizer.found_inf = torch.tensor(found_inf)
    optimizer.step()
    optimizer.found_inf = None


def pair(**arguments) -> tuple[list[nn.Parameter], torch.optim.AdamW, list[nn.Parameter], FlatAdamW]:
    """torch's AdamW and the flat one, each with parameters of its own."""
    theirs, ours = parameters(), parameters()
    flat = FlatAdamW(groups(ours), fused=True, **arguments)
    flat.flatten(ours)
    return theirs, torch.optim.AdamW(groups(theirs), fused=True, **arguments), ours, flat


def assert_same(theirs, their_optimizer, ours, our_optimizer) -> None:
    """Weights and states are equal bit for bit, and of one form."""
    for expected, found in zip(theirs, ours, strict=True):
        assert torch.equal(expected, found)
    expected, found = their_optimizer.state_dict(), our_optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        assert list(found["state"][number]) == list(state)
        for name, value in state.items():
            assert found["state"][number][name].dtype == value.dtype
            assert torch.equal(found["state"][number][name], value), (number, name)


def steps_flat(optimizer: FlatAdamW) -> bool:
    """Whether the moments of a group lie in one piece."""
    own = [optimizer.state[parameter]["exp_avg"] for parameter in optimizer.param_groups[0]["params"]]
    return len({moment.untyped_storage().data_ptr() for moment in own}) == 1


@pytest.mark.parametrize("arguments", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("left_out", [(), (0,), (1, 2)], ids=str)
def test_steps_are_torchs_bit_for_bit(arguments, left_out):
    theirs, torchs, ours, flat = pair(**arguments)
    assert flat.state_dict()["state"] == {}
    for step in range(5):
        take_step(torchs, theirs, step, found_inf=float(step in left_out))
        take_step(flat, ours, step, found_inf=float(step in left_out))
        assert_same(theirs, torchs, ours, flat)
    assert steps_flat(flat)
    assert flat.state_dict()["state"][0]["step"].item() == 5 - len(left_out)


def test_a_step_without_anyone_telling_it_and_with_a_scale_of_gradients():
    theirs, torchs, ours, flat = pair()
    for optimizer, own in ((torchs, theirs), (flat, ours)):
        give_gradients(own, 0)
        optimizer.step()
        give_gradients(own, 1)
        optimizer.grad_scale = torch.tensor(4.0)
        optimizer.step()
    assert_same(theirs, torchs, ours, flat)


def test_a_closure_is_called_as_torch_does():
    theirs, torchs, ours, flat = pair()
    for optimizer, own in ((torchs, theirs), (flat, ours)):
        take_step(optimizer, own, 0)
        assert optimizer.step(lambda own=own: sum((x**2).sum() for x in own)).requires_grad
        take_step(optimizer, own, 1)
    assert_same(theirs, torchs, ours, flat)


@pytest.mark.parametrize("saved_by", ["torch", "torch unfused", "flat"])
@pytest.mark.parametrize("loaded_by", ["torch", "flat", "flat later"])
def test_either_goes_on_from_the_others_state(saved_by, loaded_by):
    theirs, torchs, ours, flat = pair()
    sources = {
        "torch": (torchs, theirs),
        "flat": (flat, ours),
        "torch unfused": (torch.optim.AdamW(groups(theirs), fused=False), theirs),
    }
    optimizer, own = sources[saved_by]
    for step in range(3):
        take_step(optimizer, own, step)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    expected = [nn.Parameter(parameter.detach().clone()) for parameter in own]
    reference = torch.optim.AdamW(groups(expected), fused=True)
    reference.load_state_dict(read(file, fused=True))
    found = [nn.Parameter(parameter.detach().clone()) for parameter in own]
    cls = torch.optim.AdamW if loaded_by == "torch" else FlatAdamW
    other = cls(groups(found), fused=True)
    if loaded_by == "flat":
        other.flatten(found)
    other.load_state_dict(read(file, fused=None if cls is FlatAdamW else True))
    if loaded_by == "flat later":
        other.flatten(found)
    for step in range(3, 6):
        take_step(reference, expected, step)
        take_step(other, found, step)
    assert_same(expected, reference, found, other)
    assert cls is torch.optim.AdamW or steps_flat(other)


def read(file: io.BytesIO, fused: bool | None) -> dict:
    """The saved state; fused: what it is made to say of how its optimizer computed, None leaves that."""
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for group in state["param_groups"] if fused is not None else ():
        group["fused"] = fused
    return state


def test_going_back_to_an_earlier_state_and_to_none():
    theirs, torchs, ours, flat = pair()
    for optimizer, own in ((torchs, theirs), (flat, ours)):
        kept = [copy.deepcopy(optimizer.state_dict())]
        take_step(optimizer, own, 0)
        kept.append(copy.deepcopy(optimizer.state_dict()))
        take_step(optimizer, own, 1)
        for state in reversed(kept):
            optimizer.load_state_dict(copy.deepcopy(state))
            take_step(optimizer, own, 2)
            take_step(optimizer, own, 3)
    assert_same(theirs, torchs, ours, flat)
    assert steps_flat(flat)


def test_parameters_without_a_gradient_stay_and_a_state_of_uneven_steps_is_taken_over():
    theirs, torchs, ours, flat = pair()
    for optimizer, own in ((torchs, theirs), (flat, ours)):
        take_step(optimizer, own, 0)
        kept, own[1].grad = own[1].grad, None
        before = own[1].detach().clone()
        optimizer.step()
        assert torch.equal(own[1], before)
        own[1].grad = kept
        take_step(optimizer, own, 1)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        take_step(optimizer, own, 2)
    assert_same(theirs, torchs, ours, flat)
    assert torchs.state_dict()["state"][1]["step"] == 3 and torchs.state_dict()["state"][0]["step"] == 4


def test_a_parameter_that_was_not_trained_before_starts_anew():
    theirs, torchs, ours, flat = pair()
    for optimizer, own in ((torchs, theirs), (flat, ours)):
        take_step(optimizer, own, 0)
        state = copy.deepcopy(optimizer.state_dict())
        del state["state"][3]
        optimizer.load_state_dict(state)
        take_step(optimizer, own, 1)
    assert_same(theirs, torchs, ours, flat)


def test_clipping_a_few_pieces_clips_all_gradients():
    expected, own = parameters(), parameters()
    outside = nn.Parameter(torch.ones(3))
    flat = FlatAdamW(groups(own), fused=True)
    pieces = flat.flatten([*own, outside])
    assert len(pieces) == 3 and pieces[-1] is outside
    outside.grad = torch.full((3,), 2.0)
    expected.append(nn.Parameter(torch.ones(3)))
    give_gradients(expected[:-1], 0)
    expected[-1].grad = outside.grad.clone()
    give_gradients(own, 0)
    norm = nn.utils.get_total_norm([piece.grad for piece in pieces])
    nn.utils.clip_grads_with_norm_(pieces, 1.0, norm)
    assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(expected, 1.0).item(), rel=1e-6)
    for one, other in zip(expected, [*own, outside], strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=0)
    assert own[0].grad.norm() < 1


def test_parameters_stay_the_same_objects_with_their_numbers():
    own, before = parameters(), parameters()
    network = nn.ParameterDict({str(number): parameter for number, parameter in enumerate(own)})
    flat = FlatAdamW(groups(own), fused=True)
    pieces = flat.flatten(own)
    assert len(pieces) == 2
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(network.values(), own, before, strict=True))
    assert all(x.data_ptr() % 64 == pieces[0].data_ptr() % 64 for x in own[:3])
    network.load_state_dict({name: torch.full_like(value, 2.0) for name, value in network.state_dict().items()})
    assert pieces[0].sum().item() == 2 * sum(parameter.numel() for parameter in own[:3])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_become_zeros_where_they_lie(set_to_none):
    _, _, ours, flat = pair()
    gradients = [parameter.grad for parameter in ours]
    sum((parameter**2).sum() for parameter in ours).backward()
    assert all(parameter.grad is gradient for parameter, gradient in zip(ours, gradients, strict=True))
    assert all(torch.equal(parameter.grad, 2 * parameter) for parameter in ours)
    flat.zero_grad(set_to_none)
    assert all(parameter.grad is gradient for parameter, gradient in zip(ours, gradients, strict=True))
    assert not any(gradient.any() for gradient in gradients)


def test_before_it_is_flattened_it_is_torchs():
    theirs, ours = parameters(), parameters()
    torchs, flat = torch.optim.AdamW(groups(theirs), fused=True), FlatAdamW(groups(ours), fused=True)
    for step in range(3):
        take_step(torchs, theirs, step)
        take_step(flat, ours, step)
    flat.zero_grad()
    assert all(parameter.grad is None for parameter in ours)
    assert_same(theirs, torchs, ours, flat)


def test_what_is_not_float32_stays_as_it_is():
    own = [nn.Parameter(torch.ones(16, dtype=torch.bfloat16)), nn.Parameter(torch.ones(16))]
    flat = FlatAdamW(own, fused=True)
    assert all(a is b for a, b in zip(flat.flatten(own), own, strict=True))
    assert own[0].grad is None


def test_fused_adamw_is_the_flat_one_and_its_states_are_torchs():
    network = nn.Linear(16, 2, bias=False)
    own = [{"name": "all", "params": list(network.parameters())}]
    made = make_optimizer(OptimizerSettings(optimizer_args=("fused=True",)), own, CPU)
    assert type(made) is FlatAdamW
    plain = make_optimizer(OptimizerSettings(), own, CPU)
    assert type(plain) is torch.optim.AdamW
    assert optimizer_content(made, network)["type"] == optimizer_content(plain, network)["type"]
    network.weight.grad = torch.ones(2, 16)
    plain.step()
    made.flatten(network.parameters())
    assert load_optimizer(copy.deepcopy(optimizer_content(plain, network)), made, network, ignore_mismatch=False)
    assert made.param_groups[0]["fused"] is True
    assert torch.equal(made.state[network.weight]["exp_avg"], plain.state[network.weight]["exp_avg"])


def test_the_trainers_steps_are_the_same_over_pieces():
    """But for the norm of the gradients, which is summed in another order."""
    PartialState(cpu=True)
    config = AnimaConfig.from_shapes(transformer_shapes(TINY, 32128))
    case = Case(network={"network_dim": 4, "network_alpha": 4.0}, sides=((64, 64),), speed=EAGER)
    settings = case_settings(case, CPU)
    settings = replace(settings, optimizer=replace(settings.optimizer, optimizer_args=("fused=True",)))
    results = []
    for flattens in (False, True):
        torch.manual_seed(0)
        trainer = made_trainer(BenchmarkTrainer, settings, config, 1)
        if flattens:
            trainer.trained = trainer.parts.optimizer.flatten(trainer.trained)
        batches = endless_batches(case, config)
        losses = [trainer.step([next(batches), next(batches)], 2) for _ in range(4)]
        results.append((torch.stack(losses), *(parameter.detach() for parameter in trainer.network.parameters())))
    assert len(trainer.trained) == 2
    for plain, flat in zip(*results, strict=True):
        torch.testing.assert_close(flat, plain, rtol=1e-4, atol=1e-7)
