"""The fused LLM adapter against its own modules with hooks: the same rows and gradients, in float64."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from library.anima_runtime.config import AnimaConfig
from library.anima_runtime.transformer import AnimaTransformer
from networks import lokr_anima, lora_anima
from networks.fused import joint_linear
from networks.fused.blocks import fuse_blocks
from networks.fused.llm_adapter import FusedLLMAdapter
from networks.network import AdapterNetwork
from tools.anima_shapes import TINY, transformer_shapes

_TINY = AnimaConfig.from_shapes(transformer_shapes(TINY, 50))
# Another width than the context's, so that none stands in for the other.
CONFIG = replace(_TINY, llm_adapter=replace(_TINY.llm_adapter, width=64, depth=3, source_width=24))
WHOLE = {"full_matrix": "True", "factor": "4"}
ALSO_OUTPUT = {"include_patterns": "llm_adapter.out_proj"}
CASES = {
    "lora": (lora_anima, {}),
    "lora without norms": (lora_anima, {"train_norm": "False"}),
    "lora of every Linear": (lora_anima, ALSO_OUTPUT),
    "lora of some modules": (lora_anima, {"target_modules": "llm_adapter.*k_proj,llm_adapter.*mlp.2"}),
    "lora of some norms": (lora_anima, {"exclude_patterns": ".*norm_mlp,.*blocks.0.norm_self_attn,.*q_norm"}),
    "lora of several ranks": (lora_anima, {"network_reg_dims": ".*k_proj=9,.*o_proj=20"}),
    "norms alone, but for one Linear": (lora_anima, {"target_modules": "blocks.0.mlp.layer1"}),
    "lokr, whole": (lokr_anima, WHOLE | ALSO_OUTPUT),
    "lokr, low-rank": (lokr_anima, {"decompose_both": "True", "factor": "4"}),
    "lokr of some modules": (lokr_anima, {**WHOLE, "target_modules": "llm_adapter.*v_proj,llm_adapter.*mlp.0"}),
}
CAPTIONS = [(7, 9), (12, 1), (1, 5)]  # numbers of Qwen and T5 tokens


def model_and_network(module, arguments, fuses, dim=4):
    """A transformer with an attached network, all float64 and random, the same at each call."""
    torch.manual_seed(0)
    model = AnimaTransformer(CONFIG).double().requires_grad_(False)
    network = module.create_network(1.0, dim, 2.0, None, None, model, **arguments).double()
    for parameter in [*model.parameters(), *network.parameters()]:
        if parameter.ndim > 1 or parameter.requires_grad:
            nn.init.normal_(parameter, std=0.15)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    network.apply_to(None, model)
    if fuses:
        fuse_blocks(model, network)
        assert isinstance(model.llm_adapter.run_rows, FusedLLMAdapter)
    return model, network


def padded(captions=CAPTIONS, least=0):
    """States, their mask, ids and theirs, as `encode_context` takes them; what lies under the padding is noticed."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor(captions).T  # of each side
    masks = [torch.arange(max(least, side.max())) < side[:, None] for side in lengths]
    shape = (*masks[0].shape, CONFIG.llm_adapter.source_width)
    states = torch.randn(*shape, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 50, masks[1].shape, generator=generator)
    return states.masked_fill(~masks[0][..., None], 7.0), masks[0], ids, masks[1]


def rows_and_gradients(model, network, captions=None):
    """Context rows, and the gradient of every adapter tensor of a sum of them all, weighed differently."""
    rows = model.encode_context(*(captions or padded()), min_length=0)
    weighing = torch.randn(rows.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (rows * weighing).sum().backward()
    return rows.detach(), {name: parameter.grad for name, parameter in network.named_parameters()}


def check_equal(plain, fused):
    """Within what the plain rotation, which is float32, leaves of float64."""
    (rows, gradients), (fused_rows, fused_gradients) = plain, fused
    assert (fused_rows - rows).norm() <= 1e-6 * rows.norm()
    for name, gradient in gradients.items():
        if gradient is None:
            assert fused_gradients[name] is None, name
        else:
            assert (fused_gradients[name] - gradient).norm() <= 2e-6 * gradient.norm() + 1e-12, name
            assert fused_gradients[name].shape == gradient.shape


@pytest.mark.parametrize("case", CASES)
def test_rows_and_gradients_are_those_of_the_modules(case):
    plain, fused = (rows_and_gradients(*model_and_network(*CASES[case], fuses)) for fuses in (False, True))
    check_equal(plain, fused)
    assert any(gradient is not None for name, gradient in fused[1].items() if name.startswith("llm_adapter"))


@pytest.mark.parametrize("dim", [16, 40])
@pytest.mark.parametrize(("captions", "least"), [([(3, 1)], 0), ([(3, 2)], 64), ([(40, 3), (5, 30)], 0)])
def test_every_rank_and_number_of_rows_is_served(dim, captions, least):
    """Ranks above 16 are added at once."""
    inputs = padded(captions, least)
    check_equal(
        *(rows_and_gradients(*model_and_network(lora_anima, {}, fuses, dim), inputs) for fuses in (False, True))
    )


@pytest.mark.parametrize("case", ["lora", "lora without norms", "lokr, whole"])
def test_gradients_reach_the_states_of_a_trained_qwen_and_the_embedding(case):
    results = []
    for fuses in (False, True):
        model, network = model_and_network(*CASES[case], fuses)
        states, *others = padded()
        table = model.llm_adapter.embed.weight.requires_grad_()
        rows, _ = rows_and_gradients(model, network, (states.requires_grad_(), *others))
        results.append((rows, {"states": states.grad, "embedding": table.grad}))
    check_equal(*results)
    assert results[1][1]["states"].norm() > 0


def test_gradients_of_all_blocks_are_few_products(monkeypatch):
    """A step's launches count: batches for q, k and v, q, the MLP and the outputs; each output's A; k and v of Qwen."""
    model, network = model_and_network(lora_anima, {}, fuses=True)
    products = Mock(side_effect=joint_linear.wide_product)
    monkeypatch.setattr(joint_linear, "wide_product", products)
    rows_and_gradients(model, network)
    assert products.call_count == (1 + 3) + 3 * 2 + 2 * (CONFIG.llm_adapter.depth + 1) + 2


def test_two_forward_passes_may_come_before_their_backward_passes():
    results = []
    for fuses in (False, True):
        model, network = model_and_network(lora_anima, {}, fuses)
        rows = [model.encode_context(*padded(captions)) for captions in (CAPTIONS, [(2, 20)])]
        sum(each.square().sum() for each in rows).backward()
        results.append((rows[1].detach(), {name: parameter.grad for name, parameter in network.named_parameters()}))
    check_equal(*results)


@pytest.mark.parametrize("case", ["lora", "lokr, whole"])
def test_a_bf16_model_gets_float32_gradients_as_good_as_the_modules(case):
    _, exact = rows_and_gradients(*model_and_network(*CASES[case], fuses=False))
    exact = {name: gradient for name, gradient in exact.items() if gradient is not None}
    errors = []
    for fuses in (False, True):
        model, network = model_and_network(*CASES[case], fuses=False)
        model.bfloat16()
        network.float()
        if fuses:
            fuse_blocks(model, network)
        rows, gradients = rows_and_gradients(model, network)
        assert rows.dtype == torch.bfloat16
        assert {gradients[name].dtype for name in exact} == {torch.float32}
        errors.append([(gradients[name] - gradient).norm() / gradient.norm() for name, gradient in exact.items()])
    plain, fused = (torch.stack(each).mean() for each in errors)
    assert fused < 1.1 * plain < 0.06


@pytest.mark.parametrize("case", ["lora", "lokr, low-rank"])
def test_weights_and_alphas_of_another_state_are_taken_over(case):
    module, arguments = CASES[case]
    moved = module.create_network(1.0, 4, 3.0, None, None, AnimaTransformer(CONFIG), **arguments).state_dict()
    results = []
    for fuses in (False, True):
        model, network = model_and_network(module, arguments, fuses)
        before, _ = rows_and_gradients(model, network)
        network.zero_grad()
        network.load_state_dict({name: x + 0.05 if x.ndim else x for name, x in moved.items()})
        results.append(rows_and_gradients(model, network))
        assert not torch.allclose(results[-1][0], before)
    check_equal(*results)


def test_frozen_parts_get_no_gradients():
    results = []
    for fuses in (False, True):
        model, network = model_and_network(lora_anima, {"network_reg_lrs": ".*q_proj=0"}, fuses)
        network.prepare_optimizer_params(None, None, 1e-3)
        results.append(rows_and_gradients(model, network))
    check_equal(*results)


@pytest.mark.parametrize("multiplier", [1.0, 0.5, 0.0])
def test_captions_are_encoded_without_gradients_at_any_strength(multiplier):
    rows = []
    for fuses in (False, True):
        model, network = model_and_network(lora_anima, {}, fuses)
        network.multiplier = multiplier
        with torch.no_grad():
            rows.append(model.encode_context(*padded(), min_length=0))
    assert (rows[0] - rows[1]).norm() <= 1e-6 * rows[0].norm()
    assert torch.equal(rows[1].abs().amax(2) > 0, padded()[3])


def test_the_models_weights_keep_their_names_and_values():
    model, _ = model_and_network(lora_anima, {}, fuses=False)
    fused, network = model_and_network(lora_anima, {}, fuses=True)
    rows_and_gradients(fused, network)
    assert fused.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(fused.state_dict()[name], tensor), name


def test_a_frozen_llm_adapter_stays_as_it_is():
    """Caches hold its rows bit for bit."""
    model = AnimaTransformer(CONFIG)
    network = lora_anima.create_network(1.0, 4, 4.0, None, None, model, train_llm_adapter="False")
    before = model.llm_adapter.run_rows
    fuse_blocks(model, network)
    assert model.llm_adapter.run_rows == before
    fuse_blocks(model, AdapterNetwork({**network.adapters, "text_encoder.norm": next(iter(network.adapters.values()))}))
    assert isinstance(model.llm_adapter.run_rows, FusedLLMAdapter)
