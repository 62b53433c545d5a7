"""Another package's network module, LyCORIS', from settings to a file that loads everywhere."""

import pytest
import torch
from lycoris.kohya import create_network_from_weights as lycoris_from_weights
from safetensors.torch import load_file
from torch import nn

from library.adapter_writing import write_adapter
from library.errors import ModelFileError, SettingError
from networks import loha_anima, lokr_anima, lora_anima
from networks.comfyui_reader import check_comfyui_reads
from networks.creation import create_network_from_weights, weight_shapes
from networks.outside import OutsideNetwork
from networks.settings import NetworkSettings
from networks.setup import (
    attach_network,
    check_network,
    create_network,
    import_network_module,
    network_arguments,
    prove_loadable,
    summary_table,
)

ALGORITHMS = {
    "lokr": ("algo=lokr", "factor=8"),
    "lokr_whole": ("algo=lokr", "factor=8", "full_matrix=True"),
    "loha": ("algo=loha",),
    "lora": ("algo=lora",),
}


def build(model, text_encoder=None, **settings) -> OutsideNetwork:
    """An attached network with random weights."""
    settings = NetworkSettings(
        **{"network_module": "lycoris.kohya", "network_dim": 2, "network_alpha": 3.0, **settings}
    )
    module, arguments = import_network_module(settings.network_module), network_arguments(settings, ())
    torch.manual_seed(1)
    network = create_network(settings, module, arguments, model, text_encoder)
    attach_network(settings, network, model, text_encoder, torch.device("cpu"))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    return network


def live_delta(linear: nn.Linear) -> torch.Tensor:
    """What an attached Linear adds to its own product, as a matrix; in float32 models."""
    x = torch.eye(linear.in_features)
    return (linear(x) - nn.functional.linear(x, linear.weight, linear.bias)).T


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("file_format", ["comfy", "kohya"])
def test_what_lycoris_computes_is_what_the_file_holds(model, tmp_path, algorithm, file_format, make_model):
    network = build(model, network_args=ALGORITHMS[algorithm])
    prove_loadable(network, (file_format,), model, None)
    file = tmp_path / "a.safetensors"
    write_adapter(file, network.export(file_format), None)
    assert check_comfyui_reads(load_file(file), weight_shapes(model, None)) == []
    again, _ = create_network_from_weights(1.0, file, None, None, make_model())
    assert (
        again.adapters.keys() == lora_anima.create_network(1, 2, 1, None, None, model, train_norm=False).adapters.keys()
    )
    for path, adapter in again.adapters.items():
        expected = live_delta(model.get_submodule(path))
        assert expected.norm() > 0.01
        torch.testing.assert_close(adapter.delta_weight(), expected, rtol=1e-4, atol=1e-5)


def test_alpha_of_whole_matrices_is_written_as_every_reader_takes_it(model):
    tensors = build(model, network_dim=100000, network_args=ALGORITHMS["lokr_whole"]).export()
    assert tensors["diffusion_model.blocks.0.mlp.layer1.alpha"].item() == (128 // 8) // 8
    assert tensors["diffusion_model.blocks.0.mlp.layer2.alpha"].item() == 1.0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_weights_work_on_a_low_precision_model(model, algorithm, dtype):
    layer = model.to(dtype).blocks[0].mlp.layer1
    x, weight = torch.randn(64, 64, dtype=dtype), layer.weight.float()
    network = build(model, network_args=ALGORITHMS[algorithm])
    delta = create_network_from_weights(1.0, None, None, None, model, weights_sd=network.export())[0]
    expected = x.float() @ (weight + delta.adapters["blocks.0.mlp.layer1"].delta_weight()).T
    output = layer(x)
    output.float().square().mean().backward()
    assert output.dtype == dtype
    assert (output.float() - expected).norm() / expected.norm() < 0.02
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in network.parameters() if p.grad is not None} == {torch.float32}


def test_small_changes_are_not_lost_in_bf16(model):
    """Added to a bf16 weight of 2e-2, a change of 2e-4 comes out 15 % off."""
    layer = model.blocks[0].mlp.layer1
    nn.init.normal_(layer.weight, std=0.02)
    model.bfloat16()
    network = build(model, network_args=("algo=lora",))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.mul_(7e-4 if name.endswith("lora_up.weight") else 1.0)
    tensors = network.adapter_tensors()["blocks.0.mlp.layer1"]
    expected = 3 / 2 * tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    assert expected.square().mean().sqrt().item() == pytest.approx(2e-4, rel=0.5)
    x = torch.randn(4096, 64, dtype=torch.bfloat16)
    change = layer(x).detach().float() - nn.functional.linear(x, layer.weight).float()
    found = torch.linalg.lstsq(x.float(), change).solution.T
    assert (found - expected).norm() / expected.norm() < 0.06


def test_groups_have_names_rates_and_all_parameters(model, text_encoder, tmp_path, make_model):
    preset = tmp_path / "preset.toml"
    preset.write_text(
        'enable_conv = false\nunet_target_module = []\nunet_target_name = ["llm_adapter.*q_proj$", "blocks.*layer1$"]\n'
        'text_encoder_target_module = ["Qwen3MLP"]\ntext_encoder_target_name = []\n'
    )
    network = build(model, text_encoder, network_args=(f"preset={preset}", "loraplus_lr_ratio=4"))
    groups = network.prepare_optimizer_params(1e-5, None, 1e-3)
    assert {group["name"]: (pytest.approx(group["lr"]), len(group["params"])) for group in groups} == {
        "text_encoder": (1e-5, 3), "text_encoder_2": (4e-5, 3), "transformer": (1e-3, 3), "transformer_2": (4e-3, 3),
    }  # fmt: skip
    assert all(network.adapts(part) for part in ("transformer", "llm_adapter", "text_encoder"))
    with pytest.raises(SettingError, match="cache_text_encoder_outputs"):
        check_network(NetworkSettings(), network, caches_text=True)
    table = summary_table(network, groups).splitlines()
    assert table[1].split()[:2] == ["text_encoder", "3"]
    assert "3 lora rank 2" in table[3]
    keys = {key for key in network.export() if key.startswith("text_encoders.")}
    assert "text_encoders.qwen3_06b.transformer.model.layers.0.mlp.gate_proj.lora_up.weight" in keys
    assert len(keys) == 3 * 3
    alone = build(make_model(), text_encoder, network_args=(f"preset={preset}",), network_train_unet_only=True)
    assert not alone.adapts("text_encoder")


def test_norms_of_changes_can_be_limited(model):
    network = build(model, network_args=ALGORITHMS["lokr"])
    network.apply_max_norm(0.5)
    lengths = [live_delta(model.get_submodule(path)).norm().item() for path in network.adapter_tensors()]
    assert max(lengths) == pytest.approx(0.5, rel=1e-3)


def test_a_state_brings_everything_back(model, make_model):
    network = build(model, network_args=ALGORITHMS["loha"])
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    other_model = make_model()
    other = build(other_model, network_args=ALGORITHMS["loha"])
    nn.init.normal_(next(other.parameters()))
    other.load_state_dict(state)
    for path in network.adapter_tensors():
        assert torch.equal(live_delta(model.get_submodule(path)), live_delta(other_model.get_submodule(path)))


@pytest.mark.parametrize("file_format", ["comfy", "kohya"])
def test_training_starts_from_a_file_of_any_spelling(model, tmp_path, file_format, make_model):
    file = tmp_path / "start.safetensors"
    source = build(model, network_args=ALGORITHMS["lokr"])
    write_adapter(file, source.export(file_format), None)
    other_model = make_model()
    other = build(other_model, network_args=ALGORITHMS["lokr"])
    other.load_weights(file)
    layer, other_layer = model.blocks[0].mlp.layer1, other_model.blocks[0].mlp.layer1
    torch.testing.assert_close(live_delta(other_layer), live_delta(layer), rtol=1e-6, atol=1e-6)
    with pytest.raises(ModelFileError, match="alpha 3, the network 1: set network_alpha"):
        build(make_model(), network_args=ALGORITHMS["lokr"], network_alpha=1.0).load_weights(file)
    with pytest.raises(ModelFileError, match=r"blocks\.0.*expected"):
        build(make_model(), network_args=ALGORITHMS["lora"]).load_weights(file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network_args": ("algo=nonsense",)}, "made no network with network_args algo=nonsense.*KeyError"),
        ({"network_args": ("preset=nowhere.toml",)}, "made no network"),
        ({"network_args": ("dora_wd=True",)}, "dora_wd: .*ComfyUI"),
        ({"network_args": ("train_norm=True",)}, "train_norm: LyCORIS cannot train"),
        ({"dim_from_weights": True}, "dim_from_weights"),
    ],
)
def test_what_lycoris_cannot_do_is_refused(model, settings, message):
    with pytest.raises(SettingError, match=message):
        build(model, **settings)


def test_tensors_that_no_file_can_hold_are_refused(model):
    with pytest.raises(ModelFileError, match="network_module: ComfyUI cannot read what its network trains"):
        build(model, network_args=("algo=glora",))


def test_settings_of_this_projects_modules_are_refused():
    settings = NetworkSettings(network_module="lycoris.kohya", train_norm=False)
    with pytest.raises(SettingError, match="train_norm: for this project's network modules only"):
        network_arguments(settings, {"train_norm"})
    assert network_arguments(settings, ()) == {}


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (lora_anima, {}), (loha_anima, {}), (lokr_anima, {}), (lokr_anima, {"full_matrix": True}),
        (lokr_anima, {"decompose_both": True, "factor": -1}),
    ],
)  # fmt: skip
def test_files_written_here_load_in_lycoris(model, tmp_path, module, arguments):
    """Its networks' forward is the oracle; get_diff_weight applies the scale twice."""
    network = module.create_network(1.0, 2, 3.0, None, None, model, train_norm=False, **arguments)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    write_adapter(tmp_path / "a.safetensors", network.export("kohya"), None)
    theirs, tensors = lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), None, None, model)
    theirs.apply_to(None, model, False, True)
    theirs.load_state_dict(tensors)  # strict: every tensor of the file has its place
    for path, adapter in network.adapters.items():
        torch.testing.assert_close(live_delta(model.get_submodule(path)), adapter.delta_weight(), rtol=1e-4, atol=1e-5)
