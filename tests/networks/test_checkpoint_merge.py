"""Merging into checkpoint files: against the live adapter, by plain maths, and within little memory."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.anima_runtime.checkpoint import load_transformer
from library.anima_runtime.config import AnimaConfig, LLMAdapterConfig
from library.anima_runtime.transformer import AnimaTransformer
from library.errors import ModelFileError
from networks import loha_anima, lokr_anima, lora_anima
from networks.checkpoint_merge import plan_merge
from networks.network import AdapterNetwork

CONFIG = AnimaConfig(
    latent_channels=16, patch_size=2, width=64, depth=2, head_size=32, mlp_width=128, context_width=32, adaln_rank=8,
    llm_adapter=LLMAdapterConfig(
        vocabulary=64, width=32, depth=1, head_size=16, mlp_width=48, source_width=24, context_width=32
    ),
)  # fmt: skip
Q_PROJ = "blocks.0.self_attn.q_proj"


def make_checkpoint(file, dtype=torch.float32, prefix="net.", config=CONFIG):
    torch.manual_seed(0)
    model = AnimaTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1).add_(1.0 if parameter.ndim == 1 else 0.0)
    tensors = {f"{prefix}{name}": tensor.to(dtype) for name, tensor in model.state_dict().items()}
    tensors[f"{prefix}pos_embedder.seq"] = torch.arange(5.0)
    save_file(tensors, file, {"note": "kept by the caller"})
    return file


def make_adapter(file, model, module, seed, file_format="comfy", **arguments) -> AdapterNetwork:
    network = module.create_network(1.0, 4, 2.0, None, None, model, **arguments)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + 0.1 * noise) if "dora" in name else parameter.copy_(0.15 * noise)
    network.save_weights(file, None, None, file_format)
    return network


def merge(checkpoint, adapter_files, output):
    plan = plan_merge(checkpoint, adapter_files)
    plan.write(output, {"a": "b"})
    return plan


def run(model):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 16, 1, 8, 6, generator=generator)
    states = torch.randn(2, 5, 24, generator=generator)
    mask = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    context = model.encode_context(states, mask[0], torch.arange(8).view(2, 4), mask[1])
    return model(latents, torch.tensor([0.3, 0.8]), context)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (lora_anima, {}),
        (lora_anima, {"dora": "true"}),
        (lokr_anima, {"full_matrix": "true"}),
        (lokr_anima, {"factor": "4"}),
        (loha_anima, {}),
    ],
    ids=["lora", "dora", "whole lokr", "lokr", "loha"],
)
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_the_merged_model_gives_the_live_adapters_output(tmp_path, module, arguments, strength):
    checkpoint = make_checkpoint(tmp_path / "base.safetensors")
    model = load_transformer(checkpoint, torch.float32, "cpu")
    base = run(model)
    network = make_adapter(tmp_path / "a.safetensors", model, module, 1, **arguments)
    merge(checkpoint, [(tmp_path / "a.safetensors", strength)], tmp_path / "out.safetensors")
    network.multiplier = strength
    network.apply_to(None, model)
    live = run(model)
    merged = run(load_transformer(tmp_path / "out.safetensors", torch.float32, "cpu"))
    assert (live - base).norm() > 0.02 * base.norm()
    assert (merged - live).norm() <= 1e-5 * live.norm()


@pytest.mark.parametrize("prefix", ["net.", "", "model.diffusion_model."])
def test_every_name_tensor_and_dtype_stays_and_deltas_are_rounded_once(tmp_path, prefix):
    """Two adapters whose steps are each below half a bfloat16 step: rounding in between would lose them."""
    checkpoint = make_checkpoint(tmp_path / "base.safetensors", torch.bfloat16, prefix)
    base = load_file(checkpoint)
    files = []
    for i in (1, 2):
        tensors = {"lora_down.weight": torch.ones(1, 64), "lora_up.weight": torch.full((64, 1), 3e-4 * i)}
        files.append((tmp_path / f"{i}.safetensors", 1.0))
        save_file({f"lora_unet_{Q_PROJ.replace('.', '_')}.{name}": t for name, t in tensors.items()}, files[-1][0])
    plan = merge(checkpoint, files, tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    assert merged.keys() == base.keys() and plan.left_out == ()
    changed = f"{prefix}{Q_PROJ}.weight"
    assert all(merged[name].dtype == base[name].dtype for name in base)
    assert all(torch.equal(merged[name], base[name]) for name in base if name != changed)
    assert torch.equal(merged[changed], (base[changed].float() + 9e-4).bfloat16())
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"a": "b"}


def test_norms_biases_and_old_norm_values_are_merged(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "base.safetensors")
    adapter = tmp_path / "a.safetensors"
    bias = "llm_adapter.blocks.0.mlp.0"
    tensors = {
        f"diffusion_model.{bias}.diff_b": torch.full((48,), 2.0),
        "diffusion_model.t_embedding_norm.w_norm": torch.full((64,), -1.0),
        "__anima_norm__.llm_adapter.norm.weight": torch.full((32,), 5.0),
    }
    save_file(tensors, adapter)
    merge(checkpoint, [(adapter, 0.5)], tmp_path / "out.safetensors")
    base, merged = load_file(checkpoint), load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(merged[f"net.{bias}.bias"], base[f"net.{bias}.bias"] + 1.0)
    assert torch.equal(merged[f"net.{bias}.weight"], base[f"net.{bias}.weight"])
    torch.testing.assert_close(merged["net.t_embedding_norm.weight"], base["net.t_embedding_norm.weight"] - 0.5)
    old_norm = base["net.llm_adapter.norm.weight"]
    torch.testing.assert_close(merged["net.llm_adapter.norm.weight"], (old_norm + 5.0) / 2)


def lora_file(file, path, out_features, in_features, scale=1.0):
    tensors = {"lora_down.weight": torch.ones(1, in_features), "lora_up.weight": scale * torch.ones(out_features, 1)}
    save_file({f"{path}.{suffix}": tensor for suffix, tensor in tensors.items()}, file)
    return file


def test_the_text_encoders_part_is_left_out_and_told(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "base.safetensors")
    text = lora_file(tmp_path / "text.safetensors", "lora_te_layers_0_mlp_up_proj", 9, 7)
    with pytest.raises(ModelFileError, match="text encoder only"):
        plan_merge(checkpoint, [(text, 1.0)])
    both = tmp_path / "both.safetensors"
    model = lora_file(tmp_path / "a.safetensors", f"diffusion_model.{Q_PROJ}", 64, 64)
    save_file(load_file(text) | load_file(model), both)
    plan = merge(checkpoint, [(both, 1.0)], tmp_path / "out.safetensors")
    assert plan.left_out == ("text_encoder.layers.0.mlp.up_proj",)
    name = f"net.{Q_PROJ}.weight"
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")[name], load_file(checkpoint)[name] + 1.0)


@pytest.mark.parametrize(
    ("path", "sizes", "message"),
    [
        ("diffusion_model.blocks.2.mlp.layer1", (128, 64), "3 blocks or more, this model has 2"),
        (f"diffusion_model.{Q_PROJ}", (64, 63), "tensors of another shape in 1 modules"),
    ],
)
def test_an_adapter_for_another_model_is_refused(tmp_path, path, sizes, message):
    checkpoint = make_checkpoint(tmp_path / "base.safetensors")
    with pytest.raises(ModelFileError, match=message):
        plan_merge(checkpoint, [(lora_file(tmp_path / "a.safetensors", path, *sizes), 1.0)])


def test_a_quantised_checkpoint_is_refused_by_name(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "base.safetensors")
    name = f"net.{Q_PROJ}.weight"
    tensors = load_file(checkpoint)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors | {f"net.{Q_PROJ}.weight_scale": torch.tensor(1.0)}, checkpoint)
    adapter = lora_file(tmp_path / "a.safetensors", f"diffusion_model.{Q_PROJ}", 64, 64)
    with pytest.raises(ModelFileError, match=rf"8-bit weights \({name}.*bfloat16 file"):
        plan_merge(checkpoint, [(adapter, 1.0)])


def test_values_beyond_float16_are_refused_by_name(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "base.safetensors", torch.float16)
    adapter = lora_file(tmp_path / "a.safetensors", f"diffusion_model.{Q_PROJ}", 64, 64, 7e4)
    with pytest.raises(ModelFileError, match=f"net.{Q_PROJ}.weight: the merged values are not finite"):
        merge(checkpoint, [(adapter, 1.0)], tmp_path / "out.safetensors")


MEASURE_MERGING = """
import sys
from pathlib import Path
from networks.checkpoint_merge import plan_merge

def peak_kilobytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])

def merge(checkpoint, adapter):
    plan_merge(Path(checkpoint), [(Path(adapter), 1.0)]).write(Path(checkpoint).with_suffix(".out"), {})

merge(*sys.argv[1:3])
baseline = peak_kilobytes()
merge(*sys.argv[3:])
print(1024 * (peak_kilobytes() - baseline))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
def test_memory_stays_near_one_tensor(tmp_path):
    """The largest tensor takes 8 MiB in bfloat16 and 16 in float32, of which a handful are needed at once."""
    arguments = []
    for size, width, depth in (("small", 64, 1), ("large", 1024, 7)):
        config = AnimaConfig(16, 2, width, depth, 32, 4 * width, 32, 64, LLMAdapterConfig(64, 32, 1, 16, 48, 24, 32))
        checkpoint, adapter = tmp_path / f"{size}.safetensors", tmp_path / f"{size}.adapter.safetensors"
        with torch.device("meta"):
            model = AnimaTransformer(config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        save_file({f"net.{name}": torch.full(shape, 0.1).bfloat16() for name, shape in shapes.items()}, checkpoint)
        save_file(
            {
                f"diffusion_model.{name.removesuffix('.weight')}.{suffix}": torch.ones(factor)
                for name, shape in shapes.items()
                if ".mlp.layer" in name
                for suffix, factor in (("lora_down.weight", (1, shape[1])), ("lora_up.weight", (shape[0], 1)))
            },
            adapter,
        )
        arguments += [checkpoint, adapter]
    file_size = arguments[2].stat().st_size
    assert 200e6 < file_size < 300e6
    # So that glibc gives freed blocks back at once, and the peak is what is needed rather than what lies fragmented.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE_MERGING, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert load_file(tmp_path / "large.out")["net.blocks.6.mlp.layer2.weight"][0, 0] == torch.tensor(1.1).bfloat16()
    assert int(run.stdout) < 80 * 2**20
