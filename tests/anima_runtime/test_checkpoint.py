from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from library.anima_runtime.checkpoint import check_transformer_file, load_transformer
from library.anima_runtime.config import AnimaConfig, LLMAdapterConfig
from library.anima_runtime.transformer import AnimaTransformer
from library.errors import ModelFileError

PREFIXES = ["net.", "model.diffusion_model.", "diffusion_model.", "model.model.", "model.", ""]
SELF_ATTN_Q = "blocks.1.self_attn.q_proj.weight"


def make_config(depth=2, adapter_depth=1):
    return AnimaConfig(
        latent_channels=16,
        patch_size=2,
        width=32,
        depth=depth,
        head_size=16,
        mlp_width=96,
        context_width=24,
        adaln_rank=8,
        llm_adapter=LLMAdapterConfig(
            vocabulary=30,
            width=48,
            depth=adapter_depth,
            head_size=12,
            mlp_width=80,
            source_width=20,
            context_width=24,
        ),
    )


def make_tensors(config=None, seed=0):
    torch.manual_seed(seed)
    return {
        name: tensor.to(torch.bfloat16)
        for name, tensor in AnimaTransformer(config or make_config()).state_dict().items()
    }


def write(path, tensors, prefix="net."):
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "anima.safetensors"


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_are_read_behind_any_known_prefix(path, prefix):
    tensors = make_tensors()
    write(path, tensors | {"pos_embedder.dim_spatial_range": torch.zeros(3)}, prefix)
    transformer = load_transformer(path, torch.bfloat16, "cpu")
    loaded = transformer.state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(("depth", "adapter_depth"), [(1, 1), (2, 3), (3, 2)])
def test_all_sizes_are_read_from_the_file(path, depth, adapter_depth):
    config = make_config(depth, adapter_depth)
    write(path, make_tensors(config))
    assert check_transformer_file(path) == config
    assert load_transformer(path, torch.float32, "cpu").config == config


def test_the_sizes_of_the_official_file():
    """2,091,068,928 parameters in 685 tensors."""
    config = AnimaConfig(
        latent_channels=16,
        patch_size=2,
        width=2048,
        depth=28,
        head_size=128,
        mlp_width=8192,
        context_width=1024,
        adaln_rank=256,
        llm_adapter=LLMAdapterConfig(32128, 1024, 6, 64, 4096, 1024, 1024),
    )
    with torch.device("meta"):
        tensors = AnimaTransformer(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert len(shapes) == 685
    assert sum(tensor.numel() for tensor in tensors.values()) == 2_091_068_928
    assert AnimaConfig.from_shapes(shapes) == config
    assert shapes["x_embedder.proj.1.weight"] == (2048, 68)
    assert shapes["t_embedder.1.linear_2.weight"] == (6144, 2048)
    assert shapes["blocks.27.adaln_modulation_mlp.2.weight"] == (6144, 256)
    assert shapes["final_layer.adaln_modulation.2.weight"] == (4096, 256)
    assert shapes["llm_adapter.blocks.5.mlp.2.bias"] == (1024,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loaded_model_is_frozen_in_eval_mode_and_in_the_dtype_asked_for(path, dtype):
    tensors = make_tensors()
    transformer = load_transformer(write(path, tensors), dtype, "cpu")
    assert not transformer.training
    assert transformer.dtype == dtype
    for name, parameter in transformer.named_parameters():
        assert parameter.dtype == dtype
        assert not parameter.requires_grad
        assert not parameter.is_meta
        assert torch.equal(parameter, tensors[name].to(dtype))


def test_loading_draws_no_random_numbers(path):
    write(path, make_tensors())
    before = torch.get_rng_state()
    load_transformer(path, torch.float32, "cpu")
    assert torch.equal(before, torch.get_rng_state())


def test_the_loaded_model_does_not_depend_on_the_file(path):
    tensors = make_tensors()
    transformer = load_transformer(write(path, tensors), torch.bfloat16, "cpu")
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(transformer.state_dict()[SELF_ATTN_Q], tensors[SELF_ATTN_Q])


def message_for(path):
    with pytest.raises(ModelFileError) as checked:
        check_transformer_file(path)
    with pytest.raises(ModelFileError) as loaded:
        load_transformer(path, torch.float32, "cpu")
    assert str(checked.value) == str(loaded.value)
    assert str(path) in str(checked.value)
    return str(checked.value)


def test_missing_unknown_and_misshaped_tensors_are_named(path):
    tensors = make_tensors()
    del tensors["blocks.1.mlp.layer2.weight"]
    tensors["blocks.0.self_attn.v_norm.weight"] = torch.ones(16)
    tensors[SELF_ATTN_Q] = torch.ones(32, 31)
    message = message_for(write(path, tensors))
    assert "given as an Anima transformer, and looks like an Anima transformer" in message
    assert "1 missing tensors: blocks.1.mlp.layer2.weight" in message
    assert "1 unknown tensors: net.blocks.0.self_attn.v_norm.weight" in message
    assert f"1 tensors of another shape: net.{SELF_ATTN_Q} [32, 31] instead of [32, 32]" in message


def test_an_llm_adapter_for_another_context_width_is_refused(path):
    message = message_for(write(path, make_tensors() | {"llm_adapter.out_proj.weight": torch.ones(23, 48)}))
    assert "1 tensors of another shape: net.llm_adapter.out_proj.weight [23, 48] instead of [24, 48]" in message


def test_only_the_first_ten_of_many_are_named(path):
    extra = {f"extra_{i:02}": torch.ones(1) for i in range(25)}
    message = message_for(write(path, make_tensors() | extra))
    assert "25 unknown tensors: net.extra_00," in message
    assert "net.extra_09, and 15 more" in message
    assert "net.extra_10" not in message


def test_a_gap_among_the_blocks_is_not_read_as_a_shallower_model(path):
    tensors = {name: t for name, t in make_tensors(make_config(depth=3)).items() if not name.startswith("blocks.1.")}
    message = message_for(write(path, tensors))
    assert "missing tensors: blocks.1.self_attn.q_proj.weight" in message
    assert "unknown tensors: net.blocks.2." in message


def test_a_tensor_present_with_and_without_prefix_is_refused(path):
    tensors = {f"net.{name}": tensor for name, tensor in make_tensors().items()}
    write(path, tensors | {SELF_ATTN_Q: torch.ones(32, 32)}, prefix="")
    assert "1 unknown tensors" in message_for(path)


WRONG_FILES = [
    (["encoder.conv1.weight", "decoder.head.0.gamma"], "a Qwen-Image VAE with the original (Wan) names"),
    (["encoder.conv_in.weight", "decoder.norm_out.gamma"], "a Qwen-Image VAE with diffusers names"),
    (["model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.q_norm.weight"], "a Qwen3 language model"),
    (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5 text encoder"),
    (["diffusion_model.blocks.0.self_attn.q_proj.lora_down.weight"], "an adapter file (LoRA)"),
    (["a.weight", "b.weight"], "an unknown kind of file, with tensors such as a.weight, b.weight"),
    (
        ["net.t_embedder.1.linear_1.weight"],
        "an unknown kind of file, with tensors such as net.t_embedder.1.linear_1.weight",
    ),
]


@pytest.mark.parametrize(("names", "kind"), WRONG_FILES)
def test_a_wrong_file_is_called_by_its_name(path, names, kind):
    save_file({name: torch.ones(2, 2) for name in names}, path)
    assert f"given as an Anima transformer, and looks like {kind}" in message_for(path)


def test_a_cosmos_transformer_without_the_llm_adapter_is_told_apart(path):
    tensors = {name: tensor for name, tensor in make_tensors().items() if not name.startswith("llm_adapter.")}
    message = message_for(write(path, tensors))
    assert "It has no llm_adapter tensors: it is a Cosmos-Predict2 transformer, not Anima." in message


BROKEN_SIZES = {
    "x_embedder.proj.1.weight": (32, 67),
    "final_layer.linear.weight": (64,),
    "blocks.0.self_attn.q_norm.weight": (20,),
    "llm_adapter.embed.weight": (30, 0),
}


@pytest.mark.parametrize("name", BROKEN_SIZES)
def test_shapes_that_tell_no_sizes_are_refused_by_name(path, name):
    message = message_for(write(path, make_tensors() | {name: torch.ones(BROKEN_SIZES[name])}))
    assert name in message


MEASURE_LOADING = """
import sys, torch
from pathlib import Path
from library.anima_runtime.checkpoint import load_transformer

def peak_kilobytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])

load_transformer(Path(sys.argv[1]), torch.bfloat16, "cpu")
baseline = peak_kilobytes()
transformer = load_transformer(Path(sys.argv[2]), torch.bfloat16, "cpu")
print(1024 * (peak_kilobytes() - baseline))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
def test_peak_host_memory_is_at_most_a_fifth_more_than_the_file(tmp_path):
    large_config = replace(make_config(depth=7), width=1024, mlp_width=4096, adaln_rank=64)
    with torch.device("meta"):
        tensors = AnimaTransformer(large_config).state_dict()
    tensors = {name: torch.full(tensor.shape, 0.1, dtype=torch.bfloat16) for name, tensor in tensors.items()}
    large = write(tmp_path / "large.safetensors", tensors)
    small = write(tmp_path / "small.safetensors", make_tensors())
    size = large.stat().st_size
    assert 200e6 < size < 300e6
    run = subprocess.run(
        [sys.executable, "-c", MEASURE_LOADING, small, large], capture_output=True, text=True, check=True
    )
    assert 0.9 < int(run.stdout) / size <= 1.2
