"""Whole runs with each type of adapter and each way to start from, limit and save one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from anima_train_network import AnimaNetworkTrainer, main
from library.anima_runtime.checkpoint import check_transformer_file
from library.anima_runtime.text.qwen3 import plan_qwen3
from library.anima_runtime.transformer import AnimaTransformer
from networks.adapter_files import read_adapter_file
from networks.comfyui_reader import check_comfyui_reads
from networks.creation import weight_shapes
from networks.deltas import delta_of

LOKR, LOHA, LYCORIS = "networks.lokr_anima", "networks.loha_anima", "lycoris.kohya"
QWEN_KEYS = "text_encoders.qwen3_06b.transformer.model.layers."


@pytest.fixture
def written(tmp_path):
    """written("tiny") -> the tensors of the adapter that a run wrote, by key."""

    def tensors(name: str = "tiny") -> dict[str, torch.Tensor]:
        return load_file(tmp_path / "output" / f"{name}.safetensors")

    return tensors


@pytest.fixture
def planned(tiny_anima):
    """The transformer and Qwen3 without weights."""
    config = check_transformer_file(tiny_anima / "anima.safetensors")
    with torch.device("meta"):
        return AnimaTransformer(config), plan_qwen3(tiny_anima / "qwen3")


def deltas(file: Path) -> dict[str, torch.Tensor]:
    """What a file without DoRA adds to each weight."""
    return {path: delta_of(own) for path, own in read_adapter_file(file)[0].items()}


@pytest.mark.parametrize(
    ("settings", "suffixes", "modules"),
    [
        ({"network_module": LOKR, "network_dim": 100000}, {"lokr_w1", "lokr_w2", "alpha", "w_norm"}, 64),
        ({"network_module": LOKR, "network_args": ["factor=4", "decompose_both=true"], "network_dim": 1},
         {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "alpha", "w_norm"}, 64),
        ({"network_module": LOHA}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha", "w_norm"}, 64),
        ({"network_args": ["dora=true"]},
         {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale", "w_norm"}, 64),
        ({"train_norm": False}, {"lora_down.weight", "lora_up.weight", "alpha"}, 40),
        ({"llm_adapter_lr": 0}, {"lora_down.weight", "lora_up.weight", "alpha", "w_norm"}, 29),
        ({"network_module": LYCORIS, "network_args": ["algo=lokr", "factor=8"], "network_dim": 100000},
         {"lokr_w1", "lokr_w2", "alpha"}, 40),
        ({"network_module": LYCORIS, "network_args": ["algo=loha"], "mixed_precision": "bf16"},
         {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"}, 40),
        ({"network_module": LYCORIS, "network_args": ["algo=lora"], "mixed_precision": "fp16", "network_dropout": 0.1},
         {"lora_down.weight", "lora_up.weight", "alpha"}, 40),
    ],
    ids=["lokr_whole", "lokr_low_rank", "loha", "dora", "no_norm", "no_llm_adapter", "lycoris_lokr", "lycoris_loha",
         "lycoris_lora"],
)  # fmt: skip
def test_every_type_trains_and_its_file_is_read_by_comfyui(
    config, losses, written, planned, settings, suffixes, modules
):
    assert main(config(max_train_steps=8, learning_rate=5e-3, log_with="none", **settings)) == 0
    assert sum(losses[-4:]) < sum(losses[:4])
    tensors = written()
    assert check_comfyui_reads(tensors, weight_shapes(*planned)) == []
    found = {suffix for suffix in suffixes if any(key.endswith(f".{suffix}") for key in tensors)}
    assert found == suffixes
    changed = {key.removesuffix(f".{suffix}") for key in tensors for suffix in suffixes if key.endswith(f".{suffix}")}
    assert len(changed) == modules
    assert all(key.startswith("diffusion_model.") for key in tensors)
    still = [key for key, tensor in tensors.items() if key.endswith(("lora_up.weight", "w2", "w2_a", "w2_b", "w_norm"))
             and not tensor.any()]  # fmt: skip
    assert still == []


def test_text_encoder_adapters_move_and_are_saved_under_comfyuis_name(config, written, planned):
    words = config(
        network_args=["train_text_encoder=true"], text_encoder_lr=1e-3, cache_text_encoder_outputs=False,
        max_train_steps=2,
    )  # fmt: skip
    assert main(words) == 0
    tensors = written()
    assert check_comfyui_reads(tensors, weight_shapes(*planned)) == []
    ups = [tensor for key, tensor in tensors.items() if key.startswith(QWEN_KEYS) and key.endswith("lora_up.weight")]
    assert len(ups) == 7 * planned[1].config.num_hidden_layers
    assert all(up.any() for up in ups)


def test_base_weights_are_merged_before_training(config, losses, tmp_path):
    """The frozen model with an adapter merged into it starts at the loss of the same adapter loaded to go on with."""
    assert main(config(max_train_steps=12, learning_rate=1e-2, network_module=LOKR)) == 0
    start = (tmp_path / "output" / "tiny.safetensors").rename(tmp_path / "start.safetensors")
    losses.clear()
    assert main(config(max_train_steps=1)) == 0
    assert main(config(max_train_steps=1, network_module=LOKR, network_weights=start)) == 0
    assert main(config(max_train_steps=1, base_weights=[str(start)])) == 0
    words = config(max_train_steps=1, base_weights=[str(start)], base_weights_multiplier=[0.0], html_report=True)
    assert main(words) == 0
    plain, continued, merged, merged_at_zero = losses
    assert abs(plain - continued) > 0.01
    assert merged == pytest.approx(continued, rel=1e-4)
    assert merged_at_zero == pytest.approx(plain, rel=1e-6)
    with safe_open(tmp_path / "output" / "tiny.safetensors", "pt") as file:
        metadata = str(file.metadata())
    for told in (metadata, (tmp_path / "output" / "tiny_report.html").read_text(encoding="utf-8")):
        assert "start.safetensors" in told and str(tmp_path) not in told


def test_dora_starts_from_the_model_that_base_weights_were_merged_into(config, written, tiny_anima, tmp_path):
    """Untrained it changes nothing: ComfyUI multiplies the rows of the merged W by dora_scale / ‖W‖."""
    assert main(config(max_train_steps=12, learning_rate=1e-2, network_module=LOKR)) == 0
    start = (tmp_path / "output" / "tiny.safetensors").rename(tmp_path / "start.safetensors")
    words = config(base_weights=[str(start)], network_args=["dora=true"], learning_rate=1e-12, max_train_steps=1)
    assert main(words) == 0
    model, changes = load_file(tiny_anima / "anima.safetensors"), deltas(start)
    scales = {key: tensor for key, tensor in written().items() if key.endswith(".dora_scale")}
    assert len(scales) == 40
    for key, scale in scales.items():
        path = key.removeprefix("diffusion_model.").removesuffix(".dora_scale")
        weight = model[f"net.{path}.weight"].float()
        merged = weight.double() + changes[path].double()
        torch.testing.assert_close(scale.double(), merged.norm(dim=1, keepdim=True), rtol=1e-5, atol=0)
        assert not torch.allclose(scale, weight.norm(dim=1, keepdim=True), rtol=1e-3)


@pytest.mark.parametrize("arguments", [["factor=4"], ["factor=4", "decompose_both=true"], ["full_matrix=true"]])
def test_dim_from_weights_takes_lokrs_structure_from_the_file(config, written, tmp_path, arguments):
    """The rank is lokr_w2_b's, the factor and whole matrices are seen: nothing of it is told to the second run."""
    assert main(config(network_module=LOKR, network_dim=3, network_alpha=2, network_args=arguments)) == 0
    before = written()
    start = (tmp_path / "output" / "tiny.safetensors").rename(tmp_path / "start.safetensors")
    words = config(network_weights=start, dim_from_weights=True, learning_rate=1e-9)
    assert main(words) == 0
    with safe_open(tmp_path / "output" / "tiny.safetensors", "pt") as file:
        told = file.metadata()
    assert told["ss_network_module"] == LOKR
    assert told["ss_network_dim"] == ("100000" if "full_matrix=true" in arguments else "3")
    after = written()
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=1e-7)


@pytest.mark.parametrize("module", ["networks.lora_anima", LOKR, LYCORIS])
def test_scale_weight_norms_limits_every_change(config, tmp_path, module):
    words = config(
        network_module=module, scale_weight_norms=0.01, learning_rate=0.1, max_train_steps=3,
        network_args=["algo=lokr", "factor=8"] if module == LYCORIS else ["train_norm=false"],
    )  # fmt: skip
    assert main(words) == 0
    lengths = [delta.norm().item() for delta in deltas(tmp_path / "output" / "tiny.safetensors").values()]
    assert max(lengths) == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize(
    ("formats", "settings"),
    [
        (["comfy", "kohya"], {"network_module": LOKR}),
        (["diffusers", "comfy"], {"train_norm": False, "network_alpha": 3}),
        (["kohya", "comfy"], {"network_module": LYCORIS, "network_args": ["algo=lokr", "factor=8"]}),
    ],
)
def test_several_formats_hold_the_same_changes(config, tmp_path, formats, settings):
    assert main(config(adapter_format=formats, learning_rate=1e-2, **settings)) == 0
    first = deltas(tmp_path / "output" / "tiny.safetensors")
    second = deltas(tmp_path / "output" / f"tiny-{formats[1]}.safetensors")
    assert first.keys() == second.keys()
    for path, delta in first.items():
        torch.testing.assert_close(delta, second[path], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"network_module": LOKR, "network_dropout": 0.2, "network_args": ["rank_dropout=0.2", "module_dropout=0.1"]},
        {"network_module": LYCORIS, "network_args": ["algo=lokr", "factor=8", "module_dropout=0.1"]},
    ],
    ids=["lokr", "lycoris"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(config, tmp_path, losses, written, settings):
    options = {"max_train_steps": 6, "lr_scheduler": "cosine", **settings}
    assert main(config(save_every_n_steps=3, save_state=True, **options)) == 0
    straight = written()
    assert main(config(resume=tmp_path / "output" / "tiny-step00000003-state", **options)) == 0
    assert losses[3:6] == losses[6:]
    assert all(torch.equal(tensor, straight[key]) for key, tensor in written().items())


def underscored(prefix: str, key: str) -> str:
    module, suffix = re.fullmatch(r"diffusion_model\.(.*)\.(alpha|lora_\w+\.weight)", key).groups()
    return f"{prefix}{module.replace('.', '_')}.{suffix}"


FOREIGN = {
    "kohya": lambda key: underscored("lora_unet_", key),
    "lycoris": lambda key: underscored("lycoris_", key),
    # Without alpha the strength is 1.
    "peft": lambda key: key.replace("diffusion_model", "base_model.model").replace("_down", "_A").replace("_up", "_B"),
}


@pytest.mark.parametrize("spelling", FOREIGN)
def test_training_goes_on_from_other_trainers_files(config, written, tmp_path, spelling):
    options = {"train_norm": False, "network_dim": 4, "network_alpha": 4}
    assert main(config(**options)) == 0
    start = written()
    kept = {key: tensor for key, tensor in start.items() if not (spelling == "peft" and key.endswith("alpha"))}
    renamed = {FOREIGN[spelling](key): tensor for key, tensor in kept.items()}
    assert not renamed.keys() & start.keys()
    save_file(renamed, tmp_path / "foreign.safetensors")
    words = config(network_weights=tmp_path / "foreign.safetensors", learning_rate=1e-9, max_train_steps=1, **options)
    assert main(words) == 0
    for key, tensor in written().items():
        torch.testing.assert_close(tensor, start[key], rtol=0, atol=1e-7)


def test_a_file_that_matches_nothing_ends_the_run(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(AnimaNetworkTrainer, "load_models", lambda self: pytest.fail("a model was loaded"))
    save_file({"unet.down.0.lora_down.weight": torch.ones(1, 1)}, tmp_path / "other.safetensors")
    for name in ("network_weights", "base_weights"):
        path = str(tmp_path / "other.safetensors")
        assert main(config(**{name: path if name == "network_weights" else [path]})) == 1
        assert "unet.down.0.lora_down.weight" in capsys.readouterr().err


def test_samples_are_rendered_without_dropout(config, tiny_anima, monkeypatch):
    modes = []
    monkeypatch.setattr(AnimaNetworkTrainer, "render_samples", lambda self: modes.append(self.network.training))
    step = AnimaNetworkTrainer.step
    monkeypatch.setattr(
        AnimaNetworkTrainer, "step", lambda self, *given: (modes.append(self.network.training), step(self, *given))[1]
    )
    assert main(config(sample_prompts=tiny_anima / "sample_prompts.txt", sample_every_n_steps=1)) == 0
    assert modes == [True, False, False, True, False, False]  # each time without and with the adapter


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks_to_swap": 3}, "blocks_to_swap: 3 is more than the model's 2 blocks"),
        ({"blocks_to_swap": 1, "gradient_checkpointing": False}, "needs gradient checkpointing"),
        ({"network_module": LYCORIS, "network_args": ["algo=lokr", "dora_wd=true"]}, "dora_wd"),
        ({"network_module": LYCORIS, "train_norm": True}, "train_norm: for this project's network modules only"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_model_is_loaded(config, capsys, monkeypatch, settings, message):
    monkeypatch.setattr(AnimaNetworkTrainer, "load_models", lambda self: pytest.fail("a model was loaded"))
    assert main(config(**settings)) == 1
    assert message in capsys.readouterr().err
