"""Extracting adapters from two checkpoints, against what was merged into one of them and against plain maths."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from networks.adapter_files import load_adapter_file
from networks.comfyui_reader import read_as_comfyui
from tools.anima_shapes import TINY, transformer_shapes
from tools.extract_adapter import main
from tools.make_tiny_anima import random_weights

Q, MLP, NORM = "blocks.1.self_attn.q_proj", "llm_adapter.blocks.0.mlp.0", "blocks.0.cross_attn.k_norm"
MODULES = {
    name.removesuffix(".weight"): shape
    for name, shape in transformer_shapes(TINY, t5_vocabulary=40).items()
    if name.endswith(".weight")
}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights():
    return {name: w.float() for name, w in random_weights(transformer_shapes(TINY, 40), 0, "transformer").items()}


@pytest.fixture
def extract(tmp_path, capsys, weights):
    """Adds {tensor name: difference} to the tiny Anima and extracts; gives the adapter and what was printed."""
    base, tuned, target = (tmp_path / f"{name}.safetensors" for name in ("base", "tuned", "out"))

    def run(differences, *arguments, base_dtype=torch.float32):
        save_file({f"net.{name}": weight.to(base_dtype) for name, weight in weights.items()}, base)
        stored = {name: weight.to(base_dtype).float() for name, weight in weights.items()}
        changed = {name: weight + differences.get(name, 0) for name, weight in stored.items()}
        save_file({f"model.diffusion_model.{name}": weight for name, weight in changed.items()}, tuned)
        paths = ["--base", str(base), "--tuned", str(tuned), "--output", str(target)]
        code = main([*paths, "--device", "cpu", *arguments])
        printed = capsys.readouterr()
        if code:
            assert not target.exists()
            return code, printed.err
        assert read_as_comfyui(load_file(target), MODULES).problems == []
        adapters, _ = load_adapter_file(target, MODULES)
        return adapters, printed.out

    run.files = base, tuned, target
    return run


def lora_delta(own):
    down = own["lora_down.weight"].double()
    return float(own["alpha"]) / len(down) * own["lora_up.weight"].double() @ down


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.double().norm())


def test_a_merged_lora_gives_its_delta_back(extract):
    deltas = {
        f"{path}.weight": random(MODULES[path][0], 3) @ random(3, MODULES[path][1], seed=1) * 0.1 for path in (Q, MLP)
    }
    adapters, printed = extract(deltas, "--type", "lora", "--rank", "3")
    assert adapters.keys() == {Q, MLP}
    for path, own in adapters.items():
        assert own["lora_down.weight"].shape[0] == 3 and float(own["alpha"]) == 3
        assert relative_error(lora_delta(own), deltas[f"{path}.weight"]) < 1e-5
    assert "transformer: 1 modules, whole matrices -> rank 3, relative error 0.00 %" in printed
    assert "llm_adapter: 1 modules" in printed


def test_a_merged_lokr_of_whole_matrices_gives_its_delta_back(extract):
    """Factor 8 makes 64 of 8 · 8, 128 of 8 · 16 and 32 of 4 · 8."""
    deltas = {
        f"{Q}.weight": torch.kron(random(8, 8), random(8, 8, seed=1)) * 0.1,
        f"{MLP}.weight": torch.kron(random(8, 4), random(16, 8, seed=1)) * 0.1,
    }
    adapters, printed = extract(deltas, "--type", "lokr")
    assert adapters.keys() == {Q, MLP}
    assert (adapters[Q]["lokr_w1"].shape, adapters[MLP]["lokr_w1"].shape) == ((8, 8), (8, 4))
    for path, own in adapters.items():
        assert relative_error(torch.kron(own["lokr_w1"], own["lokr_w2"]), deltas[f"{path}.weight"]) < 1e-5
    assert "transformer: 1 modules, whole matrices, relative error 0.00 %" in printed


def test_the_factor_is_the_users(extract):
    delta = torch.kron(random(4, 4), random(16, 16, seed=1)) * 0.1
    adapters, _ = extract({f"{Q}.weight": delta}, "--type", "lokr", "--factor", "4")
    assert adapters[Q]["lokr_w1"].shape == (4, 4)
    assert relative_error(torch.kron(adapters[Q]["lokr_w1"], adapters[Q]["lokr_w2"]), delta) < 1e-5


def test_a_full_difference_leaves_the_tail_of_its_singular_values(extract):
    delta = random(64, 64) * 0.1
    adapters, printed = extract({f"{Q}.weight": delta}, "--type", "lora", "--rank", "10")
    values = torch.linalg.svdvals(delta.double())
    expected = float(values[10:].norm() / values.norm())
    assert relative_error(lora_delta(adapters[Q]), delta) == pytest.approx(expected, abs=1e-5)
    assert f"relative error {100 * expected:.2f} %" in printed


def test_energy_chooses_the_rank(extract):
    """Squared singular values 64, 16, 4, 1: 0.94 of them in two."""
    delta = torch.zeros(64, 64)
    delta[:4, :4] = torch.tensor([8.0, 4.0, 2.0, 1.0]).diag()
    adapters, _ = extract({f"{Q}.weight": delta}, "--type", "lora", "--energy", "0.9")
    assert adapters[Q]["lora_down.weight"].shape == (2, 64)


def test_norms_are_differences_and_the_rest_is_named(extract):
    difference = random(MODULES[NORM][0])
    differences = {
        f"{NORM}.weight": difference,
        f"{Q}.weight": torch.full((64, 64), 0.1),
        "llm_adapter.embed.weight": 0.1,
        f"{MLP}.bias": 0.1,
    }
    adapters, printed = extract(differences, "--type", "lora", "--rank", "1")
    assert adapters.keys() == {NORM, Q}
    torch.testing.assert_close(adapters[NORM]["w_norm"], difference, atol=1e-6, rtol=0)
    assert f"left out, as the file cannot hold them: {MLP}.bias, llm_adapter.embed.weight\n" in printed


def test_diffusers_gets_no_norms(extract):
    differences = {f"{NORM}.weight": 0.1, f"{Q}.weight": torch.full((64, 64), 0.1)}
    adapters, printed = extract(differences, "--type", "lora", "--rank", "1", "--format", "diffusers")
    assert adapters.keys() == {Q} and f"left out, as the file cannot hold them: {NORM}.weight" in printed


def test_number_formats_may_differ(extract):
    """The base in bfloat16, the tuned one in float32: the difference is exact, and no other module differs."""
    delta = random(64, 2) @ random(2, 64, seed=1) * 0.1
    adapters, _ = extract({f"{Q}.weight": delta}, "--type", "lora", "--rank", "2", base_dtype=torch.bfloat16)
    assert adapters.keys() == {Q} and relative_error(lora_delta(adapters[Q]), delta) < 1e-5


def test_scaled_float8_is_decoded(extract, weights):
    base, tuned, target = extract.files
    stored = weights[f"{Q}.weight"].to(torch.float8_e4m3fn)
    save_file({**weights, f"{Q}.weight": stored, f"{Q}.weight_scale": torch.tensor(0.5)}, base)
    delta = torch.full((64, 64), 0.1)
    save_file({**weights, f"{Q}.weight": stored.float() * 0.5 + delta}, tuned)
    paths = ["--base", str(base), "--tuned", str(tuned), "--output", str(target)]
    assert main([*paths, "--device", "cpu", "--type", "lora", "--rank", "1"]) == 0
    adapters, _ = load_adapter_file(target, MODULES)
    assert adapters.keys() == {Q} and relative_error(lora_delta(adapters[Q]), delta) < 1e-5


def test_the_metadata_tells_what_was_done(extract):
    extract({f"{Q}.weight": torch.full((64, 64), 0.1)}, "--type", "lora", "--rank", "2", "--precision", "bf16")
    with safe_open(extract.files[2], framework="pt") as file:
        metadata, dtype = file.metadata(), file.get_tensor(f"diffusion_model.{Q}.lora_up.weight").dtype
    told = {key: metadata[key] for key in ("ss_anima_depth", "ss_network_module", "ss_network_dim", "ss_network_alpha")}
    assert told == {
        "ss_anima_depth": "2",
        "ss_network_module": "networks.lora_anima",
        "ss_network_dim": "2",
        "ss_network_alpha": "2.0",
    }
    made = {"base": "base.safetensors", "tuned": "tuned.safetensors", "type": "lora", "rank": 2, "energy": None}
    assert json.loads(metadata["ss_anima_extracted"]) == made
    assert metadata["sshs_model_hash"] != "0" * 64 and dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("differences", "arguments", "message"),
    [
        ({}, ["--type", "lora", "--rank", "2"], "differ in nothing that an adapter can hold\n"),
        ({f"{MLP}.bias": 0.1}, ["--type", "lora", "--rank", "2"], f"only in {MLP}.bias"),
        ({f"{Q}.weight": torch.tensor(float("nan"))}, ["--type", "lora", "--rank", "2"], f"{Q}.weight is not finite"),
        ({}, ["--type", "lora"], "--rank N"),
        ({}, ["--type", "lora", "--rank", "2", "--factor", "4"], "--factor belongs to --type lokr"),
        ({}, ["--type", "lokr", "--rank", "2"], "tools/resize_adapter.py"),
        ({}, ["--type", "lokr", "--factor", "0"], "--factor 0"),
        ({}, ["--type", "lokr", "--format", "diffusers"], "choose --type lora"),
    ],
)
def test_what_cannot_be_extracted_is_an_error_and_writes_nothing(extract, differences, arguments, message):
    code, error = extract(differences, *arguments)
    assert code == 1 and message in error


def test_checkpoints_of_two_depths_are_refused(extract, weights, capsys):
    base, tuned, target = extract.files
    save_file(weights, base)
    save_file({name: weight for name, weight in weights.items() if not name.startswith("blocks.1.")}, tuned)
    paths = ["--base", str(base), "--tuned", str(tuned), "--output", str(target)]
    assert main([*paths, "--type", "lora", "--rank", "2"]) == 1
    assert "different sizes: depth 2 and 1" in capsys.readouterr().err and not target.exists()


def test_a_foreign_file_is_named(extract, weights, capsys):
    base, tuned, target = extract.files
    save_file(weights, base)
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tuned)
    paths = ["--base", str(base), "--tuned", str(tuned), "--output", str(target)]
    assert main([*paths, "--type", "lora", "--rank", "2"]) == 1
    assert "looks like an adapter file" in capsys.readouterr().err
