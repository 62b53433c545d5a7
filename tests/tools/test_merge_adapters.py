"""Merging adapters from the command line."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from networks.comfyui_reader import check_comfyui_reads
from tools.merge_adapters import main

PATH = "blocks.0.mlp.layer1"
KEY = f"diffusion_model.{PATH}"
HASHES = {"sshs_model_hash": "a" * 64, "modelspec.hash_sha256": "0x" + "c" * 64}


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_lora(file, seed, metadata=None, path=KEY, rank=2):
    tensors = {"lora_down.weight": draw(rank, 6, seed=seed), "lora_up.weight": draw(8, rank, seed=seed + 1)}
    tensors["alpha"] = torch.tensor(1.0)
    save_file({f"{path}.{suffix}": tensor for suffix, tensor in tensors.items()}, file, metadata)
    return tensors["lora_up.weight"] @ tensors["lora_down.weight"] / rank


def write_lokr(file, metadata=None):
    tensors = {"lokr_w1": draw(2, 2, seed=8), "lokr_w2": draw(4, 3, seed=9), "alpha": torch.tensor(2.0)}
    save_file({f"{KEY}.{suffix}": tensor for suffix, tensor in tensors.items()}, file, metadata)
    return torch.kron(tensors["lokr_w1"], tensors["lokr_w2"])


def delta(file, name=KEY):
    tensors = load_file(file)
    up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
    return tensors[f"{name}.alpha"] / len(down) * up @ down


@pytest.fixture
def files(tmp_path):
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "out.safetensors"


def merge(*adapters, output, more=()):
    return main(["--adapters", *map(str, adapters), "--output", str(output), *map(str, more)])


def metadata_of(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def test_two_loras_become_one_that_comfyui_reads(files, capsys):
    a, b, output = files
    first, second = write_lora(a, 1), write_lora(b, 5, path="lora_unet_blocks_0_mlp_layer1", rank=3)
    assert merge(a, b, output=output, more=["--weights", "1.0", "-0.5"]) == 0
    assert capsys.readouterr().out == f"{output}: 1 lora (rank 5); no module is approximated\n"
    torch.testing.assert_close(delta(output), first - 0.5 * second)
    assert check_comfyui_reads(load_file(output), {PATH: (8, 6)}) == []


def test_other_types_need_a_rank_and_the_error_is_told(files, capsys):
    a, b, output = files
    total = write_lora(a, 1) + write_lokr(b)
    assert merge(a, b, output=output) == 1
    assert "--rank N" in capsys.readouterr().err and not output.exists()
    assert merge(a, b, output=output, more=["--rank", 3]) == 0
    s = torch.linalg.svdvals(total)
    error = float(s[3:].norm() / s.norm())
    told = f"1 modules approximated by LoRA, with a relative error of the difference of {error:.3g} in the median"
    assert told in capsys.readouterr().out
    assert float((delta(output) - total).norm() / total.norm()) == pytest.approx(error, rel=1e-3)


def test_formats_and_precisions_are_as_asked(files):
    a, b, output = files
    total = write_lora(a, 1) + write_lora(b, 5)
    assert merge(a, b, output=output, more=["--format", "diffusers", "--precision", "bf16"]) == 0
    tensors = load_file(output)
    assert set(tensors) == {f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    product = tensors[f"{KEY}.lora_B.weight"].float() @ tensors[f"{KEY}.lora_A.weight"].float()
    torch.testing.assert_close(product, total, atol=0.05, rtol=0)


def test_metadata_tells_what_was_merged_and_nothing_stale(files):
    a, b, output = files
    common = {
        "ss_anima_depth": "28",
        "ss_base_model_version": "anima",
        "modelspec.architecture": "anima/lora",
        **HASHES,
    }
    own = {"ss_steps": "10", "modelspec.title": "A", "ss_network_dim": "2", "ss_network_alpha": "1.0"}
    write_lora(a, 1, common | own | {"ss_network_module": "networks.lora_anima"})
    write_lora(b, 5, common | {"ss_steps": "20", "modelspec.title": "B", "ss_network_dim": "2"})
    assert merge(a, b, output=output, more=["--weights", "1", "0.5"]) == 0
    written = metadata_of(output)
    record = written.pop("merged_adapters")
    assert json.loads(record) == [{"file": a.name, "weight": 1.0}, {"file": b.name, "weight": 0.5}]
    assert {key: value for key, value in written.items() if key not in HASHES} == {
        "ss_anima_depth": "28",
        "ss_base_model_version": "anima",
        "modelspec.architecture": "anima/lora",
        "modelspec.title": "out",
        "ss_network_module": "networks.lora_anima",
        "ss_network_dim": "4",
        "ss_network_alpha": "4.0",
    }
    content = output.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert written["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert written["modelspec.hash_sha256"] == "0x" + written["sshs_model_hash"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--weights", "1"], "--weights: 1 numbers for 2 adapters"),
        (["--weights", "1", "0"], "leave an adapter out"),
        (["--weights", "1", "nan"], "leave an adapter out"),
        (["--rank", "-3"], "--rank: '-3' is no rank"),
        (["--rank", "all"], "--rank: 'all' is no rank"),
        (["--checkpoint", "x", "--rank", "4"], "--rank is for merging into one adapter"),
        (["--checkpoint", "x", "--format", "kohya"], "--format is for merging into one adapter"),
        (["--checkpoint", "missing.safetensors"], "missing.safetensors is missing"),
    ],
)
def test_what_makes_no_sense_is_an_error_and_writes_nothing(files, capsys, more, message):
    a, b, output = files
    write_lora(a, 1), write_lora(b, 5)
    assert merge(a, b, output=output, more=more) == 1
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_adapters_for_other_depths_are_refused(files, capsys):
    a, b, output = files
    write_lora(a, 1, {"ss_anima_depth": "28"}), write_lora(b, 5, {"ss_anima_depth": "36"})
    assert merge(a, b, output=output) == 1
    assert "28, 36 blocks" in capsys.readouterr().err


def test_an_existing_file_is_replaced_only_when_asked(files, capsys):
    a, _, output = files
    expected = write_lora(a, 1)
    output.write_text("precious")
    assert merge(a, output=output) == 1
    assert "--overwrite" in capsys.readouterr().err and output.read_text() == "precious"
    assert merge(a, output=output, more=["--overwrite"]) == 0
    torch.testing.assert_close(delta(output), expected)


def test_a_checkpoint_is_merged_and_says_so(tiny_anima, tmp_path, capsys):
    checkpoint = tiny_anima / "anima.safetensors"
    adapter, output = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    name = "net.blocks.1.mlp.layer2.weight"
    base = load_file(checkpoint)
    rows, columns = base[name].shape
    factors = {"lora_down.weight": torch.ones(1, columns), "lora_up.weight": torch.ones(rows, 1)}
    text = {"lora_down.weight": torch.ones(1, 3), "lora_up.weight": torch.ones(4, 1)}
    tensors = {f"lora_unet_blocks_1_mlp_layer2.{suffix}": tensor for suffix, tensor in factors.items()}
    save_file(tensors | {f"lora_te_layers_0_mlp_up_proj.{suffix}": tensor for suffix, tensor in text.items()}, adapter)
    more = ["--checkpoint", checkpoint, "--weights", 0.5]
    assert merge(adapter, output=output, more=more) == 0
    told = capsys.readouterr().out
    assert f"{output}: anima.safetensors with 1 modules changed" in told and "text encoder's file: 1 modules" in told
    merged = load_file(output)
    assert merged.keys() == base.keys()
    assert torch.equal(merged[name], (base[name].float() + 0.5).to(base[name].dtype))
    assert all(torch.equal(merged[other], base[other]) for other in base if other != name)
    assert json.loads(metadata_of(output)["merged_adapters"]) == [{"file": adapter.name, "weight": 0.5}]
