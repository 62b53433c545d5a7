"""The fused blocks against the transformer's own modules with hooks: the same losses and gradients, in float64."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from library.anima_runtime.config import AnimaConfig
from library.anima_runtime.memory.low_memory import quantise_blocks
from library.anima_runtime.memory.weight_swap import WeightSwap
from library.anima_runtime.transformer import AnimaTransformer
from networks import loha_anima, lokr_anima, lora_anima
from networks.fused.blocks import FusedBlocks, fuse_blocks, fuse_obstacle
from networks.network import AdapterNetwork
from tools.anima_shapes import TINY, transformer_shapes

CPU = torch.device("cpu")
CONFIG = AnimaConfig.from_shapes(transformer_shapes(TINY, 100))
WHOLE = {"full_matrix": "True", "factor": "4"}
CASES = {
    "lora": (lora_anima, {}),
    "lora without norms": (lora_anima, {"train_norm": "False"}),
    "lora of some modules": (lora_anima, {"target_modules": "blocks.*q_proj", "train_llm_adapter": "False"}),
    "lora of the modulations too": (lora_anima, {"target_modules": "blocks.*q_proj,blocks.*adaln_modulation_mlp.1"}),
    "lora of a block's last modulation": (
        lora_anima,
        {"target_modules": "blocks.*adaln_modulation_mlp.1", "train_norm": "False"},
    ),
    "lora of several ranks": (lora_anima, {"network_reg_dims": ".*k_proj=9,.*layer1=20"}),
    "lokr, whole": (lokr_anima, WHOLE),
    "lokr, low-rank": (lokr_anima, {"decompose_both": "True", "factor": "4"}),
    "lokr of some modules": (lokr_anima, {**WHOLE, "target_modules": "blocks.*v_proj,blocks.*layer2"}),
}


def model_and_network(module, arguments, fuses, dim=4, eight_bits=False):
    """A transformer with an attached network, all float64 and random, the same at each call."""
    torch.manual_seed(0)
    model = AnimaTransformer(CONFIG).double().requires_grad_(False)
    network = module.create_network(1.0, dim, 2.0, None, None, model, **arguments).double()
    for parameter in [*model.parameters(), *network.parameters()]:
        if parameter.ndim > 1 or parameter.requires_grad:
            nn.init.normal_(parameter, std=0.15)
    network.apply_to(None, model)
    if eight_bits:
        quantise_blocks(model)
    if fuses:
        fuse_blocks(model, network)
    return model, network


def inputs(length=8):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(2, 16, 1, 12, 16), torch.tensor([0.3, 0.8]), draw(2, length, CONFIG.context_width).requires_grad_()


def loss_and_gradients(model, network, length=8, zero_rows=0):
    latents, timesteps, context = inputs(length)
    loss = model(latents, timesteps, context, zero_rows).square().mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return loss.item(), {**gradients, "context": context.grad}


def check_equal(plain, fused):
    """Within what the plain rotation, which is float32, leaves of float64."""
    (loss, gradients), (fused_loss, fused_gradients) = plain, fused
    assert fused_loss == pytest.approx(loss, rel=1e-7)
    for name, gradient in gradients.items():
        if gradient is None:
            assert fused_gradients[name] is None, name
        else:
            assert (fused_gradients[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
            assert fused_gradients[name].shape == gradient.shape


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_losses_and_gradients_are_those_of_the_modules(case, checkpointing):
    results = []
    for fuses in (False, True):
        model, network = model_and_network(*CASES[case], fuses)
        model.gradient_checkpointing = checkpointing
        results.append(loss_and_gradients(model, network))
    check_equal(*results)


@pytest.mark.parametrize("case", ["lora", "lora of some modules", "lora of the modulations too", "lokr, whole"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_weights_may_have_8_bits(case, checkpointing):
    """They are rounded to float64, not to bfloat16, here."""
    results = []
    for fuses in (False, True):
        model, network = model_and_network(*CASES[case], fuses, eight_bits=True)
        model.gradient_checkpointing = checkpointing
        results.append(loss_and_gradients(model, network))
    check_equal(*results)
    assert results[0][0] != pytest.approx(loss_and_gradients(*model_and_network(*CASES[case], True))[0], rel=1e-4)


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize(
    ("case", "swapped"), [("lora", 2), ("lora", 1), ("lora of the modulations too", 2), ("lokr, whole", 2)]
)
def test_weights_may_lie_elsewhere(case, swapped, eight_bits):
    """In steps one after the other, without the network, and of the first block too, which is both first and next."""
    plain = model_and_network(*CASES[case], False, eight_bits=eight_bits)
    model, network = model_and_network(*CASES[case], False, eight_bits=eight_bits)
    model.gradient_checkpointing = True
    fuse_blocks(model, network, swap=WeightSwap(swapped, CPU))
    for _ in range(2):
        results = []
        for own in (plain, (model, network)):
            own[1].zero_grad()
            results.append(loss_and_gradients(*own))
        check_equal(*results)
        with torch.no_grad(), plain[1].disabled(), network.disabled():
            torch.testing.assert_close(model(*inputs()), plain[0](*inputs()))


class WatchedSwap(WeightSwap):
    """under_way: blocks whose weights were sent for, and for which nothing waited yet."""

    def __init__(self, blocks):
        super().__init__(blocks, CPU)
        self.under_way = set()

    def enter(self, number, backward, ends=False):
        super().enter(number, backward, ends)
        self.under_way.discard(number)

    def _copy(self, number):
        super()._copy(number)
        self.under_way.add(number)


@pytest.mark.parametrize(("trained", "first"), [("blocks.*", 0), ("blocks.1.*", 1), ("blocks.3.*", 3)])
def test_a_pass_waits_for_all_weights_that_it_sends_for(monkeypatch, trained, first):
    """Else no CUDA graph could record it. first: the first block with adapters, with which the backward pass ends."""
    monkeypatch.setattr(f"{__name__}.CONFIG", replace(CONFIG, depth=5))
    results = []
    for swap in (None, WatchedSwap(5)):
        model, network = model_and_network(lora_anima, {"target_modules": f"{trained}q_proj"}, fuses=False)
        network.requires_grad_(False)
        for path, adapter in network.adapters.items():
            adapter.requires_grad_(path.endswith("q_proj"))
        if swap is not None:
            fuse_blocks(model, network, swap=swap)
        latents, timesteps, context = inputs()
        loss = model(latents, timesteps, context.detach()).square().mean()
        assert swap is None or not swap.under_way
        loss.backward()
        results.append((loss.item(), {name: parameter.grad for name, parameter in network.named_parameters()}))
    check_equal(*results)
    assert not swap.under_way
    assert set(swap.in_slot) == {first, first + 1}


@pytest.mark.parametrize("dim", [16, 40])
@pytest.mark.parametrize("length", [8, 30])
def test_every_rank_and_context_length_is_served(dim, length):
    """Ranks above 16 are added at once, and queries of few keys come in parts."""
    check_equal(
        *(loss_and_gradients(*model_and_network(lora_anima, {}, fuses, dim), length) for fuses in (False, True))
    )


@pytest.mark.parametrize("case", ["lora", "lokr, whole"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_rows_of_zeros_that_were_left_out_count(case, checkpointing):
    """Whole, they are keys of zeros with an adapter on top, as in the model's own blocks."""
    results = []
    for fuses in (False, True):
        model, network = model_and_network(*CASES[case], fuses)
        model.gradient_checkpointing = checkpointing
        results.append(loss_and_gradients(model, network, zero_rows=40))
    check_equal(*results)
    assert results[0][0] != pytest.approx(loss_and_gradients(*model_and_network(*CASES[case], True))[0], rel=1e-3)


@pytest.mark.parametrize(
    ("case", "swapped"), [("lora", 0), ("lora", 2), ("lokr, whole", 0), ("lokr, low-rank", 0), ("lokr, low-rank", 1)]
)
def test_two_forward_passes_may_come_before_their_backward_passes(case, swapped):
    results = []
    for fuses in (False, True):
        model, network = model_and_network(*CASES[case], fuses=False)
        if fuses:
            fuse_blocks(model, network, swap=WeightSwap(swapped, CPU) if swapped else None)
        losses = [model(*inputs(length)).square().mean() for length in (8, 30)]
        sum(losses).backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        results.append((sum(losses).item(), gradients))
    check_equal(*results)


@pytest.mark.parametrize(("case", "share"), [("lora", 1.1), ("lokr, whole", 1.2), ("lokr, low-rank", 1.2)])
def test_a_bf16_model_gets_float32_gradients_as_good_as_the_modules(case, share):
    """share: of the modules' errors. With LoKr each product has weights that were rounded, by chance at that."""
    _, exact = loss_and_gradients(*model_and_network(*CASES[case], fuses=False))
    exact = {name: gradient for name, gradient in exact.items() if gradient is not None and name != "context"}
    errors = []
    for fuses in (False, True):
        model, network = model_and_network(*CASES[case], fuses=False)
        model.bfloat16()
        network.float()
        if fuses:
            fuse_blocks(model, network)
        _, gradients = loss_and_gradients(model, network)
        assert {gradients[name].dtype for name in exact} == {torch.float32}
        errors.append([(gradients[name] - gradient).norm() / gradient.norm() for name, gradient in exact.items()])
    plain, fused = (torch.stack(each).mean() for each in errors)
    assert fused < share * plain < 0.03


@pytest.mark.parametrize("case", ["lora", "lokr, low-rank"])
def test_weights_and_alphas_of_another_state_are_taken_over(case):
    """A resumed run's come after the blocks were fused, and its steps move the weights."""
    module, arguments = CASES[case]
    moved = module.create_network(1.0, 4, 3.0, None, None, AnimaTransformer(CONFIG), **arguments).state_dict()
    results = []
    for fuses in (False, True):
        model, network = model_and_network(module, arguments, fuses)
        before, _ = loss_and_gradients(model, network)
        network.zero_grad()
        network.load_state_dict({name: x + 0.05 if x.ndim else x for name, x in moved.items()})
        results.append(loss_and_gradients(model, network))
        assert results[-1][0] != before
    check_equal(*results)


@pytest.mark.parametrize("case", ["lora", "lokr, whole", "lokr, low-rank"])
def test_frozen_parts_get_no_gradients(case):
    module, arguments = CASES[case]
    results = []
    for fuses in (False, True):
        model, network = model_and_network(module, {**arguments, "network_reg_lrs": ".*q_proj=0"}, fuses)
        network.prepare_optimizer_params(None, None, 1e-3)
        results.append(loss_and_gradients(model, network))
    check_equal(*results)
    assert sum(gradient is None for gradient in results[1][1].values()) >= 8


def test_without_gradients_it_renders_and_a_disabled_network_changes_nothing():
    results = []
    for fuses in (False, True):
        model, network = model_and_network(lora_anima, {}, fuses)
        with torch.no_grad():
            enabled = model(*inputs())
            with network.disabled():
                results.append((enabled, model(*inputs())))
    for plain, fused in zip(*results, strict=True):
        assert torch.allclose(plain, fused, atol=1e-6)
    assert not torch.allclose(*results[1])


def test_the_models_weights_keep_their_names_and_values():
    model, _ = model_and_network(lora_anima, {}, fuses=False)
    fused, network = model_and_network(lora_anima, {}, fuses=True)
    assert isinstance(fused.run_blocks, FusedBlocks)
    assert fused.state_dict().keys() == model.state_dict().keys()
    loss_and_gradients(fused, network)
    for name, tensor in model.state_dict().items():
        assert torch.equal(fused.state_dict()[name], tensor), name


def of_widths(width=2048, mlp_width=8192, head_size=128, llm_adapter=()):
    """A model of the real widths, or others, on the meta device. llm_adapter: others of the LLM adapter."""
    real = {"width": 1024, "mlp_width": 4096, "head_size": 64, "context_width": 1024}
    adapter = replace(CONFIG.llm_adapter, **{**real, **dict(llm_adapter)})
    with torch.device("meta"):
        return AnimaTransformer(
            replace(CONFIG, width=width, mlp_width=mlp_width, head_size=head_size, llm_adapter=adapter)
        )


@pytest.mark.parametrize(
    ("module", "arguments", "neuron_dropout", "obstacle"),
    [
        (lora_anima, {}, None, None),
        (lokr_anima, WHOLE, None, None),
        (lora_anima, {"dora": "True"}, None, "DoRA"),
        (lora_anima, {}, 0.1, "dropout"),
        (lora_anima, {"module_dropout": "0.1"}, None, "dropout"),
        (loha_anima, {}, None, "LoHa"),
    ],
)
def test_what_it_cannot_compute_is_told(module, arguments, neuron_dropout, obstacle):
    model = of_widths()
    network = module.create_network(1.0, 4, 4.0, None, None, model, neuron_dropout=neuron_dropout, **arguments)
    found = fuse_obstacle(model, network)
    assert found is None if obstacle is None else obstacle in found


def test_lora_and_lokr_side_by_side_are_refused():
    """A file can hold both, for a network made by dim_from_weights."""
    model = of_widths()
    lora, lokr = (module.create_network(1.0, 4, 4.0, None, None, model) for module in (lora_anima, lokr_anima))
    for path in ("blocks.0.self_attn.k_proj", "llm_adapter.blocks.0.mlp.2"):
        assert "both" in fuse_obstacle(model, AdapterNetwork({**lora.adapters, path: lokr.adapters[path]}))


def test_what_only_the_llm_adapter_has_is_told():
    model = of_widths()
    lora, loha = (module.create_network(1.0, 4, 4.0, None, None, model) for module in (lora_anima, loha_anima))
    path = "llm_adapter.blocks.0.cross_attn.o_proj"
    found = fuse_obstacle(model, AdapterNetwork({**lora.adapters, path: loha.adapters[path]}))
    assert found == f"{path} has a LoHa"


@pytest.mark.parametrize("widths", [{"width": 96}, {"context_width": 768}, {"mlp_width": 72}, {"head_size": 16}])
def test_an_llm_adapter_of_odd_widths_is_refused_where_it_is_trained(widths):
    model = of_widths(llm_adapter=widths)
    trained = lora_anima.create_network(1.0, 4, 4.0, None, None, model)
    assert "widths" in fuse_obstacle(model, trained)
    frozen = lora_anima.create_network(1.0, 4, 4.0, None, None, model, train_llm_adapter="False")
    assert fuse_obstacle(model, frozen) is None


def test_another_packages_network_is_refused():
    assert "another package" in fuse_obstacle(of_widths(), nn.Linear(2, 2))


@pytest.mark.parametrize("widths", [{"width": 128, "head_size": 32}, {"width": 768}, {"mlp_width": 72}])
def test_widths_that_the_kernels_cannot_take_are_refused(widths):
    assert "widths" in fuse_obstacle(of_widths(**widths), AdapterNetwork({}))
