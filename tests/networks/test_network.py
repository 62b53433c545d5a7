"""The network of adapters: what it attaches to, what trains, and what its file holds."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.anima_runtime.config import AnimaConfig, LLMAdapterConfig
from library.anima_runtime.transformer import AnimaTransformer
from library.errors import ModelFileError, SettingError
from networks import loha_anima, lokr_anima, lora_anima
from networks.lora_anima import create_network_from_weights
from networks.network import AdapterNetwork

CONFIG = AnimaConfig(
    latent_channels=16, patch_size=2, width=64, depth=2, head_size=32, mlp_width=128, context_width=32, adaln_rank=8,
    llm_adapter=LLMAdapterConfig(
        vocabulary=64, width=32, depth=2, head_size=16, mlp_width=48, source_width=24, context_width=32
    ),
)  # fmt: skip


@pytest.fixture
def model() -> AnimaTransformer:
    torch.manual_seed(0)
    transformer = AnimaTransformer(CONFIG).requires_grad_(False)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(std=0.02 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5).add_(
                1.0 if parameter.ndim == 1 else 0.0
            )
    return transformer


def make_network(model, rank=4, alpha=2.0, module=lora_anima, **arguments) -> AdapterNetwork:
    torch.manual_seed(1)
    return module.create_network(1.0, rank, alpha, None, None, model, **arguments)


def randomised(network: AdapterNetwork) -> AdapterNetwork:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    return network


def run(model: AnimaTransformer, seed=3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 16, 1, 8, 6, generator=generator)
    states = torch.randn(2, 5, 24, generator=generator)
    context = model.encode_context(
        states, torch.ones(2, 5, dtype=torch.bool), torch.arange(8).view(2, 4), torch.ones(2, 4, dtype=torch.bool)
    )
    return model(latents, torch.tensor([0.3, 0.8]), context)


def expected_modules(depth: int, adapter_depth: int) -> set[str]:
    """The default targets, spelled out from the checkpoint's names."""
    names = set()
    for i in range(depth):
        for attention in ("self_attn", "cross_attn"):
            for projection in ("q_proj", "k_proj", "v_proj", "output_proj"):
                names.add(f"blocks.{i}.{attention}.{projection}")
        names |= {f"blocks.{i}.mlp.layer1", f"blocks.{i}.mlp.layer2"}
    for j in range(adapter_depth):
        for attention in ("self_attn", "cross_attn"):
            for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
                names.add(f"llm_adapter.blocks.{j}.{attention}.{projection}")
        names |= {f"llm_adapter.blocks.{j}.mlp.0", f"llm_adapter.blocks.{j}.mlp.2"}
    return names


def expected_norms(depth: int, adapter_depth: int) -> set[str]:
    """Every norm weight, spelled out from the checkpoint's names."""
    heads = [f"{attention}.{norm}" for attention in ("self_attn", "cross_attn") for norm in ("q_norm", "k_norm")]
    names = {"t_embedding_norm", "llm_adapter.norm"} | {f"blocks.{i}.{norm}" for i in range(depth) for norm in heads}
    for norm in (*heads, "norm_self_attn", "norm_cross_attn", "norm_mlp"):
        names |= {f"llm_adapter.blocks.{j}.{norm}" for j in range(adapter_depth)}
    return names


def test_the_real_sizes_have_280_and_60_targets_and_156_norms():
    real = AnimaConfig(16, 2, 2048, 28, 128, 8192, 1024, 256, LLMAdapterConfig(32128, 1024, 6, 64, 4096, 1024, 1024))
    with torch.device("meta"):
        model = AnimaTransformer(real)
        network = make_network(model)
        assert set(network.adapters) == expected_modules(28, 6) | expected_norms(28, 6)
        assert (len(expected_modules(28, 6)), len(expected_norms(28, 6))) == (280 + 60, 156)
        assert len(make_network(model, train_llm_adapter="false", train_norm="false").adapters) == 280
        assert len(make_network(model, train_llm_adapter="false").adapters) == 280 + 28 * 4 + 1


def test_the_exported_keys_are_comfyuis(model, tmp_path):
    make_network(model).save_weights(tmp_path / "a.safetensors", None, {"ss_steps": "1"})
    expected = {
        f"diffusion_model.{module}.{suffix}"
        for module in expected_modules(2, 2)
        for suffix in ("lora_down.weight", "lora_up.weight", "alpha")
    } | {f"diffusion_model.{norm}.w_norm" for norm in expected_norms(2, 2)}
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == expected
        assert file.metadata() == {"ss_steps": "1"}


@pytest.mark.parametrize(("alpha", "scale"), [(4.0, 1.0), (2.0, 0.5), (0.0, 1.0), (10.0, 2.5)])
def test_base_plus_the_files_delta_equals_the_live_model(model, tmp_path, alpha, scale):
    network = randomised(make_network(model, rank=4, alpha=alpha))
    base, with_network = run(model), copy.deepcopy(model)
    network.apply_to(None, with_network)
    live = run(with_network)
    network.save_weights(tmp_path / "a.safetensors", torch.float32, None)

    tensors = load_file(tmp_path / "a.safetensors")
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for module in expected_modules(2, 2):
            key = f"diffusion_model.{module}"
            up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
            assert tensors[f"{key}.alpha"].item() / down.shape[0] == pytest.approx(scale)
            weights[f"{module}.weight"] += tensors[f"{key}.alpha"] / down.shape[0] * (up @ down)
        for norm in expected_norms(2, 2):
            weights[f"{norm}.weight"] += tensors[f"diffusion_model.{norm}.w_norm"]
    merged = run(model)

    assert (live - base).norm() / base.norm() > 0.1
    assert (live - merged).norm() / merged.norm() <= 1e-5


def test_the_adapter_trains_and_the_base_does_not_move(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = make_network(model)
    network.apply_to(None, model)
    optimizer = torch.optim.AdamW(network.prepare_optimizer_params(None, None, 1e-2), lr=1e-2)
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for _ in range(2):  # after the first step up is no longer zero, so down gets gradients as well
        run(model).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    still = [name for name, tensor in network.named_parameters() if torch.equal(tensor, start[name])]
    assert still == []


def test_the_parameters_are_all_there_and_nothing_else(model):
    """A state made of state_dict() would otherwise lose the adapter."""
    network = make_network(model)
    network.apply_to(None, model)
    names = {f"{module}.{part}.weight" for module in expected_modules(2, 2) for part in ("lora_down", "lora_up")}
    names |= {f"{norm}.w_norm" for norm in expected_norms(2, 2)}
    assert {name for name in network.state_dict() if not name.endswith("_extra_state")} == names
    assert {name for name, _ in network.named_parameters()} == names
    in_groups = [p for group in network.prepare_optimizer_params(None, None, 1.0) for p in group["params"]]
    assert {id(p) for p in in_groups} == {id(p) for p in network.parameters()}
    assert len(in_groups) == len(names)


def test_a_state_brings_alpha_back(model):
    other = make_network(model, alpha=3.0)
    other.load_state_dict(make_network(model, alpha=8.0).state_dict())
    assert other.adapters["blocks.0.mlp.layer1"].scale == 8.0 / 4


def test_the_llm_adapter_is_a_group_of_its_own_and_can_be_left_out(model):
    groups = make_network(model).prepare_optimizer_params(None, None, 1.0)
    assert {group["name"]: len(group["params"]) for group in groups} == {"transformer": 49, "llm_adapter": 55}
    without = make_network(model, train_llm_adapter=False)
    assert [group["name"] for group in without.prepare_optimizer_params(None, None, 1.0)] == ["transformer"]
    assert not without.adapts("llm_adapter")


def test_disabled_equals_base(model):
    base = run(model)
    network = randomised(make_network(model))
    network.apply_to(None, model)
    adapted = run(model)
    with network.disabled():
        assert torch.equal(run(model), base)
    assert torch.equal(run(model), adapted)
    assert not torch.equal(adapted, base)


def test_a_multiplier_scales_the_change(model):
    network = randomised(make_network(model, target_modules="blocks.1.mlp.layer2"))
    network.apply_to(None, model)
    layer, x = model.blocks[1].mlp.layer2, torch.randn(3, 128)
    full = layer(x)
    network.multiplier = 0.25
    quarter = layer(x)
    base = x @ layer.weight.T
    torch.testing.assert_close(quarter - base, (full - base) / 4, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_network_stays_float32_on_a_low_precision_model(model, dtype):
    model.to(dtype)
    network = make_network(model)
    network.apply_to(None, model)
    run(model).float().square().mean().backward()
    assert all(
        p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in network.parameters() if p.grad is not None
    )
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_alpha_is_saved_in_float32_whatever_the_precision(model, tmp_path, dtype):
    make_network(model, rank=4, alpha=100000.0).save_weights(tmp_path / "a.safetensors", dtype, None)
    tensors = load_file(tmp_path / "a.safetensors")
    alphas = [tensor for key, tensor in tensors.items() if key.endswith(".alpha")]
    assert {(alpha.dtype, alpha.item()) for alpha in alphas} == {(torch.float32, 100000.0)}
    assert {tensor.dtype for key, tensor in tensors.items() if not key.endswith(".alpha")} == {dtype}


def test_a_saved_file_loads_into_the_same_network_and_rebuilds_one(model, tmp_path):
    network = randomised(make_network(model, rank=3, alpha=7.0))
    network.save_weights(tmp_path / "a.safetensors", None, None)
    fresh = make_network(model, rank=3, alpha=7.0)
    fresh.load_weights(tmp_path / "a.safetensors")
    rebuilt, _ = create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, model)
    for other in (fresh, rebuilt):
        assert {path: adapter.alpha for path, adapter in other.adapters.items()} == {
            path: adapter.alpha for path, adapter in network.adapters.items()
        }
        assert other.state_dict().keys() == network.state_dict().keys()
        assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_a_file_that_does_not_fit_is_refused_with_names(model, tmp_path):
    make_network(model, rank=8).save_weights(tmp_path / "rank8.safetensors", None, None)
    with pytest.raises(ModelFileError, match=r"dim_from_weights.*blocks\.0.*\(8, "):
        make_network(model, rank=4).load_weights(tmp_path / "rank8.safetensors")
    with pytest.raises(ModelFileError, match=r"llm_adapter\.blocks\.0"):
        make_network(model, rank=8, train_llm_adapter=False).load_weights(tmp_path / "rank8.safetensors")
    save_file({"lora_unet_blocks_0.alpha": torch.ones(())}, tmp_path / "foreign.safetensors")
    with pytest.raises(ModelFileError, match="lora_unet_blocks_0"):
        make_network(model).load_weights(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize(
    ("arguments", "theirs"),
    [({"alpha": 1.0}, "1"), ({"rs_lora": "true"}, "4"), ({"network_reg_alphas": "layer1=3"}, "3"), ({"alpha": 0}, "4")],
)
def test_a_file_of_another_alpha_is_refused_rather_than_that_the_settings_are_not_obeyed(
    model, tmp_path, arguments, theirs
):
    make_network(model, rank=4, alpha=2.0).save_weights(tmp_path / "a.safetensors", None, None)
    message = rf"dim_from_weights.*blocks\.0\.\S+ has alpha 2, the network {theirs}: set network_alpha"
    with pytest.raises(ModelFileError, match=message):
        make_network(model, **{"rank": 4, **arguments}).load_weights(tmp_path / "a.safetensors")


def test_an_alpha_that_its_number_format_rounded_is_the_files(model, tmp_path):
    """0.3 is 0.30078125 in bf16."""
    network = randomised(make_network(model, alpha=0.3, train_norm=False))
    tensors = {key: tensor.bfloat16() for key, tensor in network.export().items()}
    save_file(tensors, tmp_path / "bf16.safetensors")
    fresh = make_network(model, alpha=0.3, train_norm=False)
    fresh.load_weights(tmp_path / "bf16.safetensors")
    assert {adapter.alpha for adapter in fresh.adapters.values()} == {0.30078125}


def test_what_a_file_lacks_stays_as_it_is(model, tmp_path):
    randomised(make_network(model, train_llm_adapter=False, train_norm=False)).save_weights(
        tmp_path / "part.safetensors", None, None
    )
    network = make_network(model)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_weights(tmp_path / "part.safetensors")
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    own = expected_modules(2, 0)
    assert changed == {f"{module}.{part}.weight" for module in own for part in ("lora_down", "lora_up")}


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        ("q_proj", 8),
        ("self_attn.q_proj, mlp.layer1", 6),
        ("blocks.1.mlp.*", 2),
        ("re:blocks\\.0\\.cross_attn\\..*", 4),
        (["final_layer.linear"], 1),
    ],
)
def test_targets_can_be_chosen(model, patterns, count):
    assert len(make_network(model, target_modules=patterns, train_norm=False).adapters) == count


def test_a_pattern_that_matches_nothing_is_an_error_with_near_names(model):
    with pytest.raises(SettingError, match=r"'self_attn\.query_proj' matches nothing.*q_proj"):
        make_network(model, target_modules="self_attn.query_proj")


def test_unknown_arguments_and_ranks_are_refused(model):
    with pytest.raises(SettingError, match="did you mean target_modules"):
        make_network(model, target_module="q_proj")
    with pytest.raises(SettingError, match="network_dim: 0"):
        make_network(model, rank=0)
    with pytest.raises(SettingError, match="train_llm_adapter = 'maybe': expected true or false"):
        make_network(model, train_llm_adapter="maybe")


def test_an_interrupted_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    make_network(model).save_weights(path, None, None)
    before = path.read_bytes()

    def fail(file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("library.adapter_writing.fill_hashes", fail)
    with pytest.raises(OSError, match="disk full"):
        randomised(make_network(model)).save_weights(path, None, None)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


LORA, LOKR, LOHA = lora_anima, lokr_anima, loha_anima
KINDS = {
    "lora": (LORA, {}),
    "rs_lora": (LORA, {"rs_lora": True}),
    "dora": (LORA, {"dora": True}),
    "lokr": (LOKR, {}),
    "lokr_whole": (LOKR, {"full_matrix": True}),
    "lokr_both": (LOKR, {"decompose_both": True, "factor": -1, "rank": 2}),
    "lokr_dora": (LOKR, {"dora": True}),
    "loha": (LOHA, {}),
    "by_pattern": (LORA, {"network_reg_dims": "mlp.layer1=7", "network_reg_alphas": "blocks.1.*=3"}),
}


@pytest.fixture(params=KINDS)
def kind(request, model) -> AdapterNetwork:
    """A network of each kind, with random weights."""
    module, arguments = KINDS[request.param]
    return randomised(make_network(model, module=module, **arguments))


def merged_output(model, network) -> torch.Tensor:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network.merge_to(None, model)
    output = run(model)
    model.load_state_dict(before)
    return output


def test_every_kind_merges_to_what_it_computes(model, kind):
    base, with_network = run(model), copy.deepcopy(model)
    kind.apply_to(None, with_network)
    live = run(with_network)
    with kind.disabled():
        assert torch.equal(run(with_network), base)
    merged = merged_output(model, kind)
    assert (live - base).norm() / base.norm() > 0.05
    assert (live - merged).norm() / merged.norm() <= 1e-4


@pytest.mark.parametrize("file_format", ["comfy", "kohya"])
def test_every_kind_is_the_same_after_saving_and_loading(model, kind, tmp_path, file_format):
    kind.save_weights(tmp_path / "a.safetensors", None, None, file_format)
    again, _ = create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, model)
    assert again.adapters.keys() == kind.adapters.keys()
    expected = merged_output(model, kind)
    assert (merged_output(model, again) - expected).norm() / expected.norm() <= 1e-6


def test_only_the_adapter_of_every_kind_moves(model, kind):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kind.apply_to(None, model)
    optimizer = torch.optim.AdamW(kind.prepare_optimizer_params(None, None, 1e-2))
    start = {name: tensor.clone() for name, tensor in kind.state_dict().items()}
    run(model).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not torch.equal(tensor, start[name]) for name, tensor in kind.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kind_keeps_float32_masters(model, kind, dtype):
    model.to(dtype)
    kind.apply_to(None, model)
    run(model).float().square().mean().backward()
    for name, parameter in kind.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad.dtype == torch.float32, name


def test_every_kind_gives_the_same_gradients_with_checkpointing(model, kind):
    kind.apply_to(None, model)
    gradients = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        kind.zero_grad()
        run(model).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in kind.parameters()])
    for without, with_checkpointing in zip(*gradients, strict=True):
        torch.testing.assert_close(with_checkpointing, without, rtol=1e-5, atol=1e-6)


def outputs_and_gradients(model, network) -> list[torch.Tensor]:
    network.zero_grad()
    output = run(model)
    output.square().mean().backward()
    return [output.detach(), *(parameter.grad.clone() for parameter in network.parameters())]


COMPILED_IN_CI = ("lora", "lokr")


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "aot_eager") for name in COMPILED_IN_CI),
        *(pytest.param(name, "inductor", marks=pytest.mark.slow) for name in KINDS),
    ],
)
def test_every_kind_gives_the_same_in_a_compiled_block(model, name, backend):
    """The block is captured as one graph, adapters and all: a break in it would be an error."""
    module, arguments = KINDS[name]
    network = randomised(make_network(model, module=module, **arguments))
    network.apply_to(None, model)
    plain = outputs_and_gradients(model, network)
    torch._dynamo.reset()
    model.blocks[1].compile(backend=backend, fullgraph=True)
    for compiled, expected in zip(outputs_and_gradients(model, network), plain, strict=True):
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_every_kind_equal_those_of_the_materialised_weight_in_float64(model, name):
    module, arguments = KINDS[name]
    network = randomised(make_network(model.double(), module=module, **arguments)).double()
    network.apply_to(None, model)
    for path in ("blocks.1.mlp.layer1", "llm_adapter.blocks.0.mlp.0", "blocks.0.self_attn.q_norm"):
        layer, adapter = model.get_submodule(path), network.adapters[path]
        x = torch.randn(2, 5, layer.weight.shape[-1], dtype=torch.float64, requires_grad=True)
        inputs, seed = [x, *adapter.parameters()], torch.randn_like(layer(x))
        ours = torch.autograd.grad(layer(x), inputs, seed)
        with torch.no_grad():
            base, norm = layer.weight, layer.weight.norm(dim=-1, keepdim=True)
        weight = base + adapter.delta_weight()
        if adapter.dora_scale is not None:
            weight = weight * adapter.dora_scale / norm
        if path.endswith("norm"):
            dense = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        else:
            dense = torch.nn.functional.linear(x, weight, layer.bias)
        for gradient, expected in zip(ours, torch.autograd.grad(dense, inputs, seed), strict=True):
            assert (gradient - expected).norm() / expected.norm() <= 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_dropouts_of_every_kind_act_in_training_only(model, name):
    module, arguments = KINDS[name]
    network = randomised(
        make_network(model, module=module, neuron_dropout=0.3, rank_dropout=0.3, module_dropout=0.3, **arguments)
    )
    with_network = copy.deepcopy(model)
    network.apply_to(None, with_network)
    network.eval()
    still = run(with_network)
    assert torch.equal(run(with_network), still)
    network.train()
    assert not torch.equal(run(with_network), still)
    merged = merged_output(model, network)
    assert (still - merged).norm() / merged.norm() <= 1e-4


def test_a_limit_on_norms_shrinks_only_what_is_longer(model, kind):
    lengths = {path: adapter.delta_weight().norm().item() for path, adapter in kind.adapters.items()}
    limit = sorted(lengths[path] for path in expected_modules(2, 2))[20]
    kind.apply_max_norm(limit)
    for path, adapter in kind.adapters.items():
        expected = min(lengths[path], limit) if path in expected_modules(2, 2) else lengths[path]
        assert adapter.delta_weight().norm().item() == pytest.approx(expected, rel=1e-4)


def test_rs_lora_scales_by_the_root_of_the_rank_and_its_file_agrees(model):
    adapter = make_network(model, rank=9, alpha=6.0, rs_lora=True).adapters["blocks.0.mlp.layer1"]
    assert adapter.scale == pytest.approx(6.0 / 3)
    assert adapter.tensors()["alpha"].item() / 9 == pytest.approx(6.0 / 3)


def test_ranks_and_alphas_by_pattern(model):
    network = make_network(
        model, rank=4, alpha=2.0, network_reg_dims="mlp.layer1=7", network_reg_alphas=["blocks.1.*=3"]
    )
    chosen = {path: (adapter.rank, adapter.alpha) for path, adapter in network.adapters.items()}
    assert chosen["blocks.0.mlp.layer1"] == (7, 2.0)
    assert chosen["blocks.1.mlp.layer1"] == (7, 3.0)
    assert chosen["blocks.1.mlp.layer2"] == (4, 3.0)
    assert chosen["llm_adapter.blocks.1.mlp.0"] == (4, 2.0)


def test_rates_by_part_and_pattern_and_for_lora_plus(model):
    network = make_network(
        model, train_norm=False, llm_adapter_lr=1e-5, loraplus_lr_ratio=16, network_reg_lrs="mlp.layer1=5e-4"
    )
    rates = {}
    for group in network.prepare_optimizer_params(None, 1e-4, 1.0):
        rates |= {id(parameter): group["lr"] for parameter in group["params"]}
    named = {name: rates[id(parameter)] for name, parameter in network.named_parameters()}
    assert named["blocks.0.mlp.layer2.lora_down.weight"] == pytest.approx(1e-4)
    assert named["blocks.0.mlp.layer2.lora_up.weight"] == pytest.approx(16e-4)
    assert named["blocks.0.mlp.layer1.lora_down.weight"] == pytest.approx(5e-4)
    assert named["llm_adapter.blocks.0.mlp.0.lora_down.weight"] == pytest.approx(1e-5)
    assert named["llm_adapter.blocks.0.mlp.0.lora_up.weight"] == pytest.approx(16e-5)


def test_what_would_learn_at_rate_zero_is_frozen(model):
    """Gradients that no optimizer clears would add up and weigh in the clipping."""
    network = make_network(model, network_reg_lrs="mlp.layer1=0")
    groups = network.prepare_optimizer_params(None, None, 1e-3)
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in network.named_parameters() if id(parameter) not in trained}
    assert len(frozen) == 2 * 2
    assert all(".mlp.layer1." in name for name in frozen)
    with pytest.raises(SettingError, match="rate 0"):
        network.prepare_optimizer_params(None, 0.0, 0.0)


def test_targets_are_excluded_and_included(model):
    def paths(**arguments):
        return set(make_network(model, train_norm=False, **arguments).adapters)

    without_mlp = paths(exclude_patterns=".*mlp.*")
    assert without_mlp == {path for path in expected_modules(2, 2) if "mlp" not in path}
    assert paths(exclude_patterns="blocks.0-1.mlp.*", include_patterns="blocks.0.mlp.layer1") == (
        {path for path in expected_modules(2, 2) if not path.startswith("blocks.") or ".mlp." not in path}
        | {"blocks.0.mlp.layer1"}
    )
    extra = paths(include_patterns="adaln_modulation_mlp.1, t_embedder.1.linear_1, final_layer.linear")
    assert extra - expected_modules(2, 2) == {
        "blocks.0.adaln_modulation_mlp.1", "blocks.1.adaln_modulation_mlp.1", "t_embedder.1.linear_1",
        "final_layer.linear",
    }  # fmt: skip


@pytest.mark.parametrize("arguments", [{"network_reg_dims": "mlp.layer9=4"}, {"exclude_patterns": "mlpp"}])
def test_patterns_that_match_nothing_are_errors(model, arguments):
    with pytest.raises(SettingError, match=r"mlp.* matches (no adapter|nothing)"):
        make_network(model, **arguments)


def test_an_llm_adapter_rate_of_zero_leaves_it_out_of_a_new_network(model):
    assert not make_network(model, llm_adapter_lr=0).adapts("llm_adapter")


def test_adapters_of_a_file_change_the_context_at_rate_zero_as_well(model, tmp_path):
    randomised(make_network(model)).save_weights(tmp_path / "a.safetensors", None, None)
    network, _ = create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, model, llm_adapter_lr=0)
    groups = network.prepare_optimizer_params(None, 1e-4, 1e-4)
    assert [group["name"] for group in groups] == ["transformer"]
    text = (torch.randn(1, 5, 24), torch.ones(1, 5).bool(), torch.arange(4)[None], torch.ones(1, 4).bool())
    before = model.encode_context(*text)
    network.apply_to(None, model)
    assert network.adapts("llm_adapter")
    assert not torch.allclose(model.encode_context(*text), before, atol=1e-3)


def test_dora_starts_at_the_base_and_follows_comfyuis_arithmetic(model):
    """W' = (W + ΔW) dora_scale / ‖W‖ with the norm of the original weight."""
    network = make_network(model, dora=True, train_norm=False)
    base = run(model)
    network.apply_to(None, model)
    torch.testing.assert_close(run(model), base, rtol=1e-5, atol=1e-6)
    randomised(network)
    for path in ("blocks.0.mlp.layer1", "llm_adapter.blocks.0.mlp.0"):  # the second has a bias
        layer, tensors = model.get_submodule(path), network.adapters[path].tensors()
        delta = tensors["alpha"] / 4 * tensors["lora_up.weight"] @ tensors["lora_down.weight"]
        norm = layer.weight.norm(dim=1, keepdim=True)
        x = torch.randn(3, layer.in_features)
        expected = torch.nn.functional.linear(x, (layer.weight + delta) * tensors["dora_scale"] / norm, layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert tensors["dora_scale"].shape == (layer.out_features, 1)


def test_module_dropout_skips_the_adapter_unscaled(model):
    network = randomised(
        make_network(model, module_dropout=0.5, target_modules="blocks.0.mlp.layer1", train_norm=False)
    )
    network.apply_to(None, model)
    layer, x = model.blocks[0].mlp.layer1, torch.randn(2, 64)
    network.eval()
    full = layer(x)
    network.train()
    base = x @ layer.weight.T
    outcomes = [layer(x) for _ in range(64)]
    skipped = [torch.equal(outcome, base) for outcome in outcomes]
    assert 16 < sum(skipped) < 48
    assert all(torch.equal(outcome, full) for outcome, skip in zip(outcomes, skipped, strict=True) if not skip)


def test_merging_into_bf16_rounds_once(model):
    model.bfloat16()
    network = make_network(model, target_modules="blocks.0.mlp.layer1", train_norm=False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.01)
    weight = model.blocks[0].mlp.layer1.weight
    expected = (weight.float() + network.adapters["blocks.0.mlp.layer1"].delta_weight()).bfloat16()
    network.merge_to(None, model)
    assert torch.equal(weight, expected)
