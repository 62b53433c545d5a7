from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from library.anima_runtime.text.qwen3 import check_qwen_file, load_qwen3
from library.errors import ModelFileError

IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def hidden(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).last_hidden_state


def write_single_file(qwen, path, prefix, **changes):
    tensors = {f"{prefix}{name}": tensor for name, tensor in qwen.model.state_dict().items()}
    save_file({name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}, path)
    return path


@pytest.mark.parametrize("layout", ["model.layers", "layers", "with_lm_head", "folder", "sharded", "headless_folder"])
def test_every_layout_gives_transformers_own_states(tmp_path, qwen, layout):
    path = tmp_path / "qwen3.safetensors"
    if layout == "model.layers":
        write_single_file(qwen, path, "model.")
    elif layout == "layers":
        write_single_file(qwen, path, "")
    elif layout == "with_lm_head":
        write_single_file(qwen, path, "model.", **{"lm_head.weight": qwen.lm_head.weight.detach().clone()})
    else:
        path = tmp_path / "qwen3"
        (qwen.model if layout == "headless_folder" else qwen).save_pretrained(
            path, max_shard_size="20KB" if layout == "sharded" else "1GB"
        )
        assert (len(list(path.glob("*.safetensors"))) > 1) == (layout == "sharded")
    check_qwen_file(path)
    loaded = load_qwen3(path, torch.float32, "cpu")
    assert isinstance(loaded, Qwen3Model)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(hidden(loaded), hidden(qwen.model))


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_rotary_frequencies_stay_float32_in_bfloat16(tmp_path, qwen, layout):
    path = tmp_path / "qwen3.safetensors"
    if layout == "file":
        write_single_file(qwen, path, "model.")
    else:
        path = tmp_path / "qwen3"
        qwen.save_pretrained(path)
    loaded = load_qwen3(path, torch.bfloat16, "cpu")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    expected = 1e6 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    assert loaded.rotary_emb.inv_freq.dtype == torch.float32
    torch.testing.assert_close(loaded.rotary_emb.inv_freq.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.layers.1.mlp.up_proj.weight": None},
        {"model.layers.1.mlp.up_proj.weight": torch.zeros(4, 4)},
        {"model.layers.1.mlp.up_proj.bias": torch.zeros(4)},
    ],
    ids=["missing", "misshaped", "unknown"],
)
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_tensors_that_do_not_fit_are_named(tmp_path, qwen, changes, layout):
    if layout == "file":
        path = write_single_file(qwen, tmp_path / "qwen3.safetensors", "model.", **changes)
        with pytest.raises(ModelFileError, match=r"layers\.1\.mlp\.up_proj"):
            check_qwen_file(path)
    else:
        path = tmp_path
        qwen.save_pretrained(path)
        write_single_file(qwen, path / "model.safetensors", "model.", **changes)
    with pytest.raises(ModelFileError, match=r"layers\.1\.mlp\.up_proj"):
        load_qwen3(path, torch.float32, "cpu")


def test_wrong_files_say_what_they_look_like(tmp_path, qwen):
    path = tmp_path / "wrong.safetensors"
    save_file({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelFileError, match="looks like a T5 text encoder"):
        check_qwen_file(path)
    with pytest.raises(ModelFileError, match=r"config\.json cannot be read"):
        check_qwen_file(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelFileError, match="says 't5'"):
        check_qwen_file(tmp_path)
    with pytest.raises(ModelFileError, match="is missing"):
        check_qwen_file(tmp_path / "nothing.safetensors")


def test_a_missing_or_cut_shard_is_named(tmp_path, qwen):
    qwen.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match=f"{shard.name} is not a whole"):
        check_qwen_file(tmp_path)
    shard.unlink()
    with pytest.raises(ModelFileError, match=f"{shard.name} is missing"):
        check_qwen_file(tmp_path)
