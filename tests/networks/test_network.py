"""The network of adapters: what it attaches to, what trains, and what its file holds."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.anima_runtime.config import AnimaConfig, LLMAdapterConfig
from library.anima_runtime.transformer import AnimaTransformer
from library.errors import ModelFileError, SettingError
from networks.lora_anima import create_network, create_network_from_weights
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


def make_network(model, rank=4, alpha=2.0, **arguments) -> AdapterNetwork:
    torch.manual_seed(1)
    return create_network(1.0, rank, alpha, None, None, model, **arguments)


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


def test_the_real_sizes_have_280_and_60_targets():
    real = AnimaConfig(16, 2, 2048, 28, 128, 8192, 1024, 256, LLMAdapterConfig(32128, 1024, 6, 64, 4096, 1024, 1024))
    with torch.device("meta"):
        model = AnimaTransformer(real)
        network = make_network(model)
        assert set(network.adapters) == expected_modules(28, 6)
        assert len(network.adapters) == 280 + 60
        assert len(make_network(model, train_llm_adapter="false").adapters) == 280


def test_the_exported_keys_are_comfyuis(model, tmp_path):
    make_network(model).save_weights(tmp_path / "a.safetensors", None, {"ss_steps": "1"})
    expected = {
        f"diffusion_model.{module}.{suffix}"
        for module in expected_modules(2, 2)
        for suffix in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == expected
        assert file.metadata() == {"ss_steps": "1"}


@pytest.mark.parametrize(("alpha", "scale"), [(4.0, 1.0), (2.0, 0.5), (0.0, 1.0), (10.0, 2.5)])
def test_base_plus_the_files_delta_equals_the_live_model(model, tmp_path, alpha, scale):
    network = randomised(make_network(model, rank=4, alpha=alpha))
    base = run(model)
    network.apply_to(None, model)
    live = run(model)
    network.detach()
    network.save_weights(tmp_path / "a.safetensors", torch.float32, None)

    tensors = load_file(tmp_path / "a.safetensors")
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for module in expected_modules(2, 2):
            key = f"diffusion_model.{module}"
            up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
            assert tensors[f"{key}.alpha"].item() / down.shape[0] == pytest.approx(scale)
            weights[f"{module}.weight"] += tensors[f"{key}.alpha"] / down.shape[0] * (up @ down)
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
    still = [name for name, tensor in network.state_dict().items() if torch.equal(tensor, start[name])]
    assert still == []


def test_the_parameters_are_all_there_and_nothing_else(model):
    """A state made of state_dict() would otherwise lose the adapter."""
    network = make_network(model)
    network.apply_to(None, model)
    names = {f"{module}.{part}.weight" for module in expected_modules(2, 2) for part in ("lora_down", "lora_up")}
    assert set(network.state_dict()) == names
    assert {name for name, _ in network.named_parameters()} == names
    in_groups = [p for group in network.prepare_optimizer_params(None, None, 1.0) for p in group["params"]]
    assert {id(p) for p in in_groups} == {id(p) for p in network.parameters()}
    assert len(in_groups) == len(names)


def test_the_llm_adapter_is_a_group_of_its_own_and_can_be_left_out(model):
    groups = make_network(model).prepare_optimizer_params(None, None, 1.0)
    assert {group["name"]: len(group["params"]) for group in groups} == {"transformer": 40, "llm_adapter": 40}
    without = make_network(model, train_llm_adapter=False)
    assert [group["name"] for group in without.prepare_optimizer_params(None, None, 1.0)] == ["transformer"]
    assert not without.trains_llm_adapter


def test_disabled_equals_base_and_detach_restores_it(model):
    base = run(model)
    network = randomised(make_network(model))
    network.apply_to(None, model)
    adapted = run(model)
    with network.disabled():
        assert torch.equal(run(model), base)
    assert torch.equal(run(model), adapted)
    network.detach()
    assert torch.equal(run(model), base)


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
    fresh = make_network(model, rank=3, alpha=1.0)
    fresh.load_weights(tmp_path / "a.safetensors")
    rebuilt, _ = create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, model)
    for other in (fresh, rebuilt):
        assert {path: adapter.alpha for path, adapter in other.adapters.items()} == dict.fromkeys(network.adapters, 7.0)
        assert other.state_dict().keys() == network.state_dict().keys()
        assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_a_file_that_does_not_fit_is_refused_with_names(model, tmp_path):
    make_network(model, rank=8).save_weights(tmp_path / "rank8.safetensors", None, None)
    with pytest.raises(ModelFileError, match=r"blocks\.0.*\(8, "):
        make_network(model, rank=4).load_weights(tmp_path / "rank8.safetensors")

    tensors = load_file(tmp_path / "rank8.safetensors")
    part = {key: tensor for key, tensor in tensors.items() if "blocks.1.self_attn.q_proj" not in key}
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(ModelFileError, match=r"missing modules: .*blocks\.1\.self_attn\.q_proj"):
        make_network(model, rank=8).load_weights(tmp_path / "part.safetensors")

    save_file({"lora_unet_blocks_0.alpha": torch.ones(())}, tmp_path / "foreign.safetensors")
    with pytest.raises(ModelFileError, match="lora_unet_blocks_0"):
        make_network(model).load_weights(tmp_path / "foreign.safetensors")


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
    assert len(make_network(model, target_modules=patterns).adapters) == count


def test_a_pattern_that_matches_nothing_is_an_error_with_near_names(model):
    with pytest.raises(SettingError, match=r"'self_attn\.query_proj' matches no Linear.*q_proj"):
        make_network(model, target_modules="self_attn.query_proj")


def test_unknown_arguments_and_ranks_are_refused(model):
    with pytest.raises(SettingError, match="did you mean target_modules"):
        make_network(model, target_module="q_proj")
    with pytest.raises(SettingError, match="network_dim: 0"):
        make_network(model, rank=0)
    with pytest.raises(SettingError, match="train_llm_adapter=maybe"):
        make_network(model, train_llm_adapter="maybe")


def test_an_interrupted_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    make_network(model).save_weights(path, None, None)
    before = path.read_bytes()

    def fail(tensors, file, metadata=None):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("networks.network.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        randomised(make_network(model)).save_weights(path, None, None)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
