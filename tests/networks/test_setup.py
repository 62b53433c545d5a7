"""From settings to a network that is proven to load."""

import logging
import sys

import pytest
import torch
from torch import nn

from library.errors import ModelFileError, SettingError
from networks import lora_anima
from networks.settings import NetworkSettings
from networks.setup import (
    attach_network,
    check_planned,
    create_network,
    import_network_module,
    may_change_text_encoder,
    merge_base_weights,
    network_arguments,
    prove_loadable,
    summary_table,
)

CPU = torch.device("cpu")


def build(settings, model, text_encoder, given=()):
    arguments = network_arguments(settings, given)
    merge_base_weights(settings, model, text_encoder)
    network = create_network(settings, import_network_module(settings.network_module), arguments, model, text_encoder)
    attach_network(settings, network, model, text_encoder, CPU)
    return network


def test_settings_reach_the_network_and_must_not_contradict_its_arguments():
    assert network_arguments(NetworkSettings(train_llm_adapter=False, llm_adapter_lr=0.5), ()) == {
        "train_norm": "True", "train_llm_adapter": "False", "llm_adapter_lr": "0.5",
    }  # fmt: skip
    both = NetworkSettings(train_norm=False, network_args=("train_norm=true",))
    with pytest.raises(SettingError, match="train_norm is False, but network_args says train_norm=true"):
        network_arguments(both, {"train_norm"})
    only_argument = NetworkSettings(network_args=("train_norm=false", "target_modules=q_proj"))
    assert network_arguments(only_argument, ())["train_norm"] == "false"
    agreed = NetworkSettings(train_norm=False, network_args=("train_norm=false",))
    assert network_arguments(agreed, {"train_norm"})["train_norm"] == "false"


def test_settings_tell_whether_the_text_encoder_may_be_changed(tmp_path):
    assert not may_change_text_encoder(NetworkSettings())
    assert not may_change_text_encoder(NetworkSettings(network_args=("target_modules=q_proj",)))
    for settings in (
        NetworkSettings(network_args=("train_text_encoder = true",)),
        NetworkSettings(network_module="lycoris.kohya"),
        NetworkSettings(network_weights=tmp_path / "adapter.safetensors"),
        NetworkSettings(base_weights=(tmp_path / "adapter.safetensors",)),
    ):
        assert may_change_text_encoder(settings)


def test_what_has_a_setting_of_its_own_cannot_stand_in_network_args():
    with pytest.raises(SettingError, match="network_dim cannot stand here"):
        network_arguments(NetworkSettings(network_args=("network_dim=4",)), ())


def test_all_wrong_arguments_are_told_at_once():
    settings = NetworkSettings(
        network_args=("conv_dim=4", "factor=8", "train_norm", "unet=1", "train_llm_adapter=false")
    )
    with pytest.raises(SettingError) as error:
        network_arguments(settings, {"train_llm_adapter"})
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == [
        *4 * ["network_args"], "train_llm_adapter is True, but network_args says train_llm_adapter=false",
    ]  # fmt: skip
    for part in ("conv_dim", "factor", "'train_norm' is not of the form key=value", "unet cannot stand here"):
        assert part in str(error.value)


def test_network_modules_are_checked():
    with pytest.raises(SettingError, match=r"network_module: 'networks\.lora_anmia' cannot be imported"):
        import_network_module("networks.lora_anmia")
    with pytest.raises(SettingError, match="'' cannot be imported"):
        import_network_module("")
    with pytest.raises(SettingError, match="'json' has no create_network"):
        import_network_module("json")


def test_the_package_of_lycoris_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lycoris", None)
    monkeypatch.delitem(sys.modules, "lycoris.kohya", raising=False)
    with pytest.raises(SettingError, match=r"'lycoris\.kohya' cannot be imported .*pip install lycoris-lora"):
        import_network_module("lycoris.kohya")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter_format": ("diffusers",)}, "--no-train_norm"),
        ({"adapter_format": ("diffusers",), "train_norm": False, "network_module": "networks.lokr_anima"},
         "networks.lora_anima"),
        ({"network_args": ("train_text_encoder=true",), "text_encoder_lr": 0.0},
         "cache_text_encoder_outputs: Qwen3 has adapters.*at whatever rate"),
    ],
)  # fmt: skip
def test_what_cannot_be_given_is_told_from_the_plan(model, text_encoder, settings, message, make_model):
    settings = NetworkSettings(**settings)
    module = import_network_module(settings.network_module)
    with torch.device("meta"):
        plan = make_model()
    with pytest.raises(SettingError, match=message):
        check_planned(settings, module, network_arguments(settings, ()), plan, text_encoder, caches_text=True)


def test_a_rank_that_means_whole_matrices_is_told_once(model, text_encoder, caplog):
    settings = NetworkSettings(network_module="networks.lokr_anima", network_dim=100000)
    module, arguments = import_network_module(settings.network_module), network_arguments(settings, ())
    with caplog.at_level(logging.INFO):
        check_planned(settings, module, arguments, model, text_encoder, caches_text=False)
        create_network(settings, module, arguments, model, text_encoder)
    assert caplog.messages == ["network_dim 100000: LoKr with whole matrices"]


def test_adapter_files_that_do_not_fit_are_told_from_the_plan(model, text_encoder, tmp_path, make_model):
    file, nonsense = tmp_path / "rank8.safetensors", tmp_path / "nonsense.safetensors"
    lora_anima.create_network(1.0, 8, 1.0, None, None, model).save_weights(file, None, None)
    nonsense.write_bytes(b"no adapter")
    with torch.device("meta"):
        plan = make_model()
    for settings in (
        NetworkSettings(network_weights=file),
        NetworkSettings(network_weights=nonsense),
        NetworkSettings(base_weights=(nonsense,)),
    ):
        with pytest.raises(ModelFileError, match=r"(rank8|nonsense)\.safetensors"):
            check_planned(settings, lora_anima, network_arguments(settings, ()), plan, text_encoder, caches_text=False)
    fitting = NetworkSettings(network_weights=file, dim_from_weights=True)
    planned = create_network(fitting, lora_anima, network_arguments(fitting, ()), plan, text_encoder)
    assert {adapter.rank for adapter in planned.adapters.values()} == {8, 1}


def test_a_lone_text_encoder_rate_warns(model, text_encoder, caplog):
    settings = NetworkSettings(text_encoder_lr=1e-5)
    with caplog.at_level(logging.WARNING):
        check_planned(settings, lora_anima, network_arguments(settings, ()), model, text_encoder, caches_text=False)
    assert "text_encoder_lr does nothing without network_args train_text_encoder=true" in caplog.text


KINDS = [
    {},
    {"network_module": "networks.lokr_anima"},
    {"network_module": "networks.lokr_anima", "network_dim": 100000, "network_alpha": 100000.0},
    {"network_module": "networks.loha_anima"},
    {"network_args": ("dora=true",)},
    {"network_args": ("train_text_encoder=true", "rs_lora=true")},
    {"adapter_format": ("comfy", "kohya")},
    {"adapter_format": ("comfy", "diffusers"), "train_norm": False},
]


@pytest.mark.parametrize("settings", KINDS)
def test_every_kind_is_proven_loadable(model, text_encoder, settings):
    settings = NetworkSettings(**settings)
    network = build(settings, model, text_encoder)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    prove_loadable(network, settings.adapter_format, model, text_encoder)
    assert all(parameter.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda tensors: {f"transformer.{k}": t for k, t in tensors.items()}, "reads no such key"),
        (lambda tensors: {k: t for k, t in tensors.items() if "blocks.0.mlp.layer1" not in k}, "mlp.layer1 is lost"),
        (lambda tensors: {k: t + 1 if "lora_up" in k else t for k, t in tensors.items()}, "comes back changed"),
        (lambda tensors: {k: t.half() if "alpha" in k else t for k, t in tensors.items()}, "alpha"),
    ],
)
def test_an_export_that_would_not_load_stops_the_run(model, text_encoder, monkeypatch, wrong, message):
    network = build(NetworkSettings(), model, text_encoder)
    export = network.export
    monkeypatch.setattr(type(network), "export", lambda self, file_format: wrong(export(file_format)))
    with pytest.raises(ModelFileError, match=message):
        prove_loadable(network, ("comfy",), model, text_encoder)


def test_base_weights_are_merged_with_their_strengths_before_the_network_is_attached(model, text_encoder, tmp_path):
    base = lora_anima.create_network(1.0, 2, 1.0, None, None, model)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.1)
    base.save_weights(tmp_path / "base.safetensors", None, None)
    layer, norm = model.blocks[0].mlp.layer1.weight.clone(), model.t_embedding_norm.weight.clone()
    settings = NetworkSettings(base_weights=(tmp_path / "base.safetensors",) * 2, base_weights_multiplier=(0.5,))
    network = build(settings, model, text_encoder)
    change = base.adapters["blocks.0.mlp.layer1"].delta_weight()
    torch.testing.assert_close(model.blocks[0].mlp.layer1.weight, layer + 1.5 * change, rtol=1e-5, atol=1e-6)
    change = base.adapters["t_embedding_norm"].delta_weight()
    torch.testing.assert_close(model.t_embedding_norm.weight, norm + 1.5 * change, rtol=1e-5, atol=1e-6)
    assert "blocks.0.mlp.layer1" in network.adapters  # a wrapped model would have nothing left to match
    assert all(tensor.abs().max() == 0 for name, tensor in network.state_dict().items() if "lora_up" in name)


def test_dim_from_weights_takes_types_ranks_and_targets_from_the_file(model, text_encoder, tmp_path):
    file = tmp_path / "mixed.safetensors"
    lora_anima.create_network(
        1.0, 3, 6.0, None, None, model, target_modules="blocks.0.mlp.*", network_reg_dims="layer2=5", train_norm=False
    ).save_weights(file, None, None)
    network = build(NetworkSettings(network_weights=file, dim_from_weights=True), model, text_encoder)
    ranks = {path: (adapter.rank, adapter.alpha) for path, adapter in network.adapters.items()}
    assert ranks == {"blocks.0.mlp.layer1": (3, 6.0), "blocks.0.mlp.layer2": (5, 6.0)}


def test_text_encoder_adapters_are_attached_and_keyed_for_comfyui(model, text_encoder):
    ids = torch.arange(5)[None]
    before = text_encoder(ids).last_hidden_state
    network = build(NetworkSettings(network_args=("train_text_encoder=true",)), model, text_encoder)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert (text_encoder(ids).last_hidden_state - before).norm() > 0.1
    keys = {key for key in network.export() if key.startswith("text_encoders.")}
    assert len(keys) == 7 * 3
    assert "text_encoders.qwen3_06b.transformer.model.layers.0.mlp.gate_proj.lora_down.weight" in keys


def test_the_table_names_groups_modules_ranks_and_rates(model, text_encoder):
    settings = NetworkSettings(network_dim=4, llm_adapter_lr=1e-5, network_args=("network_reg_dims=mlp.layer1=8",))
    network = build(settings, model, text_encoder)
    table = summary_table(network, network.prepare_optimizer_params(None, 2e-4, 1e-3)).splitlines()
    parameters = {
        part: sum(p.numel() for name, p in network.named_parameters() if name.startswith("llm_adapter.") == (part == 2))
        for part in (1, 2)
    }
    assert table[1].split()[:4] == ["transformer", "15", f"{parameters[1]:,}", "0.0002"]
    assert "9 lora rank 4" in table[1]
    assert "1 lora rank 8" in table[1]
    assert "5 norm" in table[1]
    assert table[2].split()[:4] == ["llm_adapter", "18", f"{parameters[2]:,}", "1e-05"]
