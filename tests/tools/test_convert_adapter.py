"""Converting adapter files from the command line."""

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tools.convert_adapter import main

PATH = "blocks.0.mlp.layer1"


def write_kohya(file, metadata=None, **more):
    tensors = {"lora_down.weight": torch.ones(2, 3), "lora_up.weight": torch.ones(4, 2), "alpha": torch.tensor(4.0)}
    keys = {f"lora_unet_blocks_0_mlp_layer1.{suffix}": tensor for suffix, tensor in tensors.items()}
    save_file({**keys, **more}, file, metadata)


def convert(source, target, file_format, *more):
    return main(["--input", str(source), "--output", str(target), "--format", file_format, *more])


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.safetensors", tmp_path / "out.safetensors"


def metadata_of(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def test_a_file_goes_round_and_comes_back_equal(files, tmp_path, capsys):
    source, target = files
    write_kohya(source, {"ss_network_dim": "2"})
    assert convert(source, target, "comfy") == 0
    assert capsys.readouterr().out == f"{target}: 1 lora (rank 2); Kohya -> comfy\n"
    assert set(load_file(target)) == {
        f"diffusion_model.{PATH}.{suffix}" for suffix in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    back = tmp_path / "back.safetensors"
    assert convert(target, back, "kohya") == 0
    first, last = load_file(source), load_file(back)
    assert first.keys() == last.keys() and all(torch.equal(first[key], last[key]) for key in first)
    assert metadata_of(back) == {"ss_network_dim": "2"}


def test_diffusers_gets_the_strength_in_its_weights(files):
    source, target = files
    write_kohya(source)
    assert convert(source, target, "diffusers", "--precision", "bf16") == 0
    tensors = load_file(target)
    assert set(tensors) == {f"diffusion_model.{PATH}.lora_A.weight", f"diffusion_model.{PATH}.lora_B.weight"}
    assert torch.equal(tensors[f"diffusion_model.{PATH}.lora_B.weight"], torch.full((4, 2), 2.0, dtype=torch.bfloat16))


def test_an_existing_file_is_replaced_only_when_asked(files, capsys):
    source, target = files
    write_kohya(source)
    target.write_text("precious")
    assert convert(source, target, "comfy") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert target.read_text() == "precious"
    assert convert(source, target, "comfy", "--overwrite") == 0
    assert len(load_file(target)) == 3


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_input_blocks_1.lora_up.weight", "lora_unet_input_blocks_1.lora_up.weight"),
        ("lora_unet_blocks_0_mlp_layer2.oft_blocks", "OFT"),
        ("lora_unet_t_embedding_norm.w_norm", "--no-train_norm"),
    ],
)
def test_what_cannot_be_converted_is_an_error_and_writes_nothing(files, capsys, key, message):
    source, target = files
    write_kohya(source, **{key: torch.ones(2, 2)})
    assert convert(source, target, "diffusers") == 1
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_a_missing_file_is_an_error(files, capsys):
    assert convert(*files, "comfy") == 1
    assert str(files[0]) in capsys.readouterr().err


def test_hashes_in_the_metadata_are_of_the_new_file(files):
    source, target = files
    hashes = {"sshs_model_hash": "a" * 64, "sshs_legacy_hash": "b" * 8, "modelspec.hash_sha256": "0x" + "c" * 64}
    write_kohya(source, {**hashes, "note": "kept"})
    assert convert(source, target, "comfy") == 0
    content = target.read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    written = metadata_of(target)
    assert (written["sshs_model_hash"], written["modelspec.hash_sha256"]) == (digest, f"0x{digest}")
    assert written["note"] == "kept" and written["sshs_legacy_hash"] != "b" * 8


@pytest.mark.parametrize("prefix", ["net.", ""])
def test_absolute_norm_values_need_the_base_model(files, tmp_path, capsys, prefix):
    source, target = files
    base = tmp_path / "base.safetensors"
    norm = torch.tensor([1.0, 2.0, 3.0])
    save_file({f"{prefix}x_embedder.proj.1.weight": torch.ones(2, 2), f"{prefix}t_embedding_norm.weight": norm}, base)
    write_kohya(source, **{"__anima_norm__.t_embedding_norm.weight": torch.tensor([1.5, 2.0, 2.0])})
    assert convert(source, target, "comfy") == 1
    assert "--base_model" in capsys.readouterr().err
    assert convert(source, target, "comfy", "--base_model", str(base)) == 0
    assert load_file(target)["diffusion_model.t_embedding_norm.w_norm"].tolist() == [0.5, 0.0, -1.0]
