"""Adapter files against a model: what fits is used, what does not is named; writing keeps values or refuses."""

import json
import logging

import pytest
import torch
from lycoris.kohya import create_network_from_weights
from lycoris.modules.lokr import LokrModule
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from library.adapter_writing import write_adapter
from library.errors import ModelFileError
from networks.adapter_files import (
    export_tensors,
    fit_adapter_tensors,
    load_adapter_file,
    read_adapter_file,
)
from networks.key_formats import write_keys

PATHS = ("blocks.0.self_attn.q_proj", "blocks.1.mlp.layer1", "llm_adapter.out_proj")
SHAPES = {PATHS[0]: (6, 6), PATHS[1]: (8, 6), PATHS[2]: (4, 4), "t_embedding_norm": (6,)}
GENERATOR = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def lora(path, rank=2, alpha=3.0):
    out, in_ = SHAPES[path]
    return {"lora_down.weight": random(rank, in_), "lora_up.weight": random(out, rank), "alpha": torch.tensor(alpha)}


def adapters():
    return {
        PATHS[0]: lora(PATHS[0]),
        PATHS[1]: {"lokr_w1": random(2, 2), "lokr_w2": random(4, 3), "alpha": torch.tensor(2.0)},
        PATHS[2]: lora(PATHS[2], rank=4),
        "t_embedding_norm": {"w_norm": random(6)},
    }


def assert_equal(got, wanted):
    assert {path: set(own) for path, own in got.items()} == {path: set(own) for path, own in wanted.items()}
    for path, own in wanted.items():
        for suffix, tensor in own.items():
            assert torch.equal(got[path][suffix], tensor), f"{path}.{suffix}"


@pytest.mark.parametrize("file_format", ["comfy", "kohya"])
def test_a_saved_file_loads_as_it_was_and_says_what_it_is(tmp_path, caplog, file_format):
    start, file = adapters(), tmp_path / "adapter.safetensors"
    write_adapter(file, export_tensors(start, file_format, None), {"ss_anima_depth": "2", "note": "kept"})
    with caplog.at_level(logging.INFO, "networks"):
        loaded, metadata = load_adapter_file(file, SHAPES)
    assert_equal(loaded, start)
    assert metadata == {"ss_anima_depth": "2", "note": "kept"}
    spelled_by = {"comfy": "ComfyUI", "kohya": "Kohya"}[file_format]
    expected = f"2 lora (rank 2; rank 4), 1 lokr (full matrix, factor 2), 1 norm, names as {spelled_by}"
    assert [record.message for record in caplog.records] == [f"{file}: {expected}"]
    assert_equal(read_adapter_file(file)[0], start)


def file_of(tmp_path, tensors, metadata=None):
    file = tmp_path / "adapter.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata)
    return file


def test_a_foreign_file_is_refused_with_its_first_ten_keys(tmp_path):
    keys = [f"lora_unet_input_blocks_{i}_proj.lora_up.weight" for i in range(12)]
    file = file_of(tmp_path, {key: torch.ones(2, 2) for key in keys})
    for load in (lambda: load_adapter_file(file, SHAPES, allow_partial=True), lambda: read_adapter_file(file)):
        with pytest.raises(ModelFileError) as error:
            load()
        message = str(error.value)
        assert str(file) in message and "12 of 12 keys belong to no module" in message and "and 2 more" in message
        assert "allow_partial_weights" not in message  # it would not help
        assert sum(key in message for key in keys) == 10


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ModelFileError, match="a file without tensors"):
        load_adapter_file(file_of(tmp_path, {}), SHAPES)


def test_a_file_that_fits_in_part_is_refused_or_used_in_part_with_a_warning(tmp_path, caplog):
    tensors = write_keys(adapters(), "kohya")
    tensors["lora_te_layers_0_mlp_up_proj.lora_down.weight"] = torch.ones(2, 2)
    tensors["lora_unet_llm_adapter_out_proj.lora_up.weight"] = torch.ones(5, 4)
    file = file_of(tmp_path, tensors)
    with pytest.raises(ModelFileError) as error:
        load_adapter_file(file, SHAPES)
    unused = "1 of 11 keys belong to no module: lora_te_layers_0_mlp_up_proj.lora_down.weight"
    misfit = "tensors of another shape in 1 modules: llm_adapter.out_proj is for [5, 4], the model has [4, 4]"
    assert unused in str(error.value) and misfit in str(error.value)
    with caplog.at_level(logging.WARNING, "networks"):
        loaded, _ = load_adapter_file(file, SHAPES, allow_partial=True)
    assert set(loaded) == {PATHS[0], PATHS[1], "t_embedding_norm"}
    (warning,) = (record.message for record in caplog.records)
    assert unused in warning and misfit in warning


def test_tensors_in_memory_are_held_to_the_same_rules():
    start = adapters()
    tensors = write_keys(start, "kohya")
    assert_equal(fit_adapter_tensors(tensors, SHAPES), start)
    tensors["lycoris_foreign.alpha"] = torch.ones(())
    with pytest.raises(ModelFileError, match=r"1 of 11 keys belong to no module: lycoris_foreign\.alpha"):
        fit_adapter_tensors(tensors, SHAPES)
    assert_equal(fit_adapter_tensors(tensors, SHAPES, allow_partial=True), start)


def test_a_model_given_as_an_adapter_is_called_by_its_name(tmp_path):
    keys = ("net.blocks.0.adaln_modulation_self_attn.1.weight", "net.llm_adapter.out_proj.weight")
    file = file_of(tmp_path, {key: torch.ones(2, 2) for key in keys})
    for load in (lambda: load_adapter_file(file, SHAPES), lambda: read_adapter_file(file)):
        with pytest.raises(ModelFileError, match="looks like an Anima transformer"):
            load()


@pytest.mark.parametrize(
    ("key", "shape", "fits"),
    [
        ("llm_adapter.out_proj.diff_b", (4,), True),
        ("llm_adapter.out_proj.diff_b", (5,), False),
        ("blocks.0.self_attn.q_proj.diff_b", (6,), False),
        ("t_embedding_norm.b_norm", (6,), False),
    ],
)
def test_a_bias_is_changed_only_where_the_model_has_one(tmp_path, key, shape, fits):
    file = file_of(tmp_path, {f"diffusion_model.{key}": torch.ones(shape)})
    if fits:
        assert list(load_adapter_file(file, SHAPES)[0]) == ["llm_adapter.out_proj"]
    else:
        with pytest.raises(ModelFileError, match=r"bias of .* which the model has not"):
            load_adapter_file(file, SHAPES)


def test_a_deeper_file_is_named_by_its_depth(tmp_path):
    deeper = {**adapters(), "blocks.39.mlp.layer1": lora(PATHS[1])}
    file = file_of(tmp_path, write_keys(deeper, "comfy"))
    with pytest.raises(ModelFileError, match="trained for 40 blocks or more, this model has 2\n"):
        load_adapter_file(file, SHAPES)
    file = file_of(tmp_path, write_keys(deeper, "comfy"), {"ss_anima_depth": "52"})
    with pytest.raises(ModelFileError, match="trained for 52 blocks, this model has 2\n"):
        load_adapter_file(file, SHAPES)


def test_a_file_of_recorded_other_depth_is_refused_though_its_keys_fit(tmp_path):
    file = file_of(tmp_path, write_keys(adapters(), "comfy"), {"ss_anima_depth": "1"})
    with pytest.raises(ModelFileError, match=r"trained for 1 blocks, this model has 2$"):
        load_adapter_file(file, SHAPES)
    assert len(load_adapter_file(file, SHAPES, allow_partial=True)[0]) == 4


@pytest.mark.parametrize("kept", ["lora_down.weight", "alpha"])
def test_an_incomplete_module_is_named_with_its_file(tmp_path, kept):
    file = file_of(
        tmp_path, {f"diffusion_model.{PATHS[0]}.{kept}": torch.ones(2, 6) if "down" in kept else torch.ones(())}
    )
    with pytest.raises(ModelFileError, match=rf"adapter.safetensors: {PATHS[0]} has only {kept}"):
        load_adapter_file(file, SHAPES)


def test_alphas_come_from_the_config_beside_a_peft_file(tmp_path):
    own = lora(PATHS[0])
    names = {"lora_A": own["lora_down.weight"], "lora_B": own["lora_up.weight"]}
    file = file_of(tmp_path, {f"base_model.model.{PATHS[0]}.{name}.weight": tensor for name, tensor in names.items()})
    assert load_adapter_file(file, SHAPES)[0][PATHS[0]]["alpha"].item() == 2.0
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 7}))
    assert load_adapter_file(file, SHAPES)[0][PATHS[0]]["alpha"].item() == 7.0
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"adapter_config\.json, which tells the alphas"):
        load_adapter_file(file, SHAPES)


def test_header_alphas_do_not_come_back_after_they_were_taken_in(tmp_path):
    own = lora(PATHS[0])
    names = {"lora_A": own["lora_down.weight"], "lora_B": own["lora_up.weight"]}
    tensors = {f"transformer.transformer_blocks.0.attn1.to_q.{name}.weight": tensor for name, tensor in names.items()}
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 7, "transformer.r": 2}), "note": "kept"}
    loaded, metadata = load_adapter_file(file_of(tmp_path, tensors, header), SHAPES)
    assert (loaded[PATHS[0]]["alpha"].item(), metadata) == (7.0, {"note": "kept"})


# --- writing ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_alpha_stays_float32_in_every_precision(tmp_path, dtype):
    start = adapters()
    start[PATHS[0]]["alpha"] = torch.tensor(70_000.0)
    file = tmp_path / "adapter.safetensors"
    write_adapter(file, export_tensors(start, "comfy", dtype), None)
    for key, tensor in load_file(file).items():
        assert tensor.dtype == (torch.float32 if key.endswith(".alpha") else dtype)
    assert load_adapter_file(file, SHAPES)[0][PATHS[0]]["alpha"].item() == 70_000.0


def test_values_too_large_for_fp16_are_refused_by_name_and_nothing_is_written(tmp_path):
    start, file = adapters(), tmp_path / "adapter.safetensors"
    start[PATHS[1]]["lokr_w2"][0, 0] = 1e5
    with pytest.raises(ModelFileError, match=rf"diffusion_model.{PATHS[1]}.lokr_w2 has values up to 1e\+05"):
        write_adapter(file, export_tensors(start, "comfy", torch.float16), None)
    assert list(tmp_path.iterdir()) == []
    assert export_tensors(start, "comfy", torch.bfloat16)


def test_metadata_is_written_and_may_be_left_out(tmp_path):
    for metadata in ({"a": "1"}, {}, None):
        write_adapter(tmp_path / "adapter.safetensors", export_tensors(adapters(), "comfy", None), metadata)
        with safe_open(tmp_path / "adapter.safetensors", framework="pt") as file:
            assert (file.metadata() or {}) == (metadata or {})


# --- LyCORIS reads what is written here ---


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(6, 6, bias=False)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Attention()
        self.mlp = nn.ModuleDict({"layer1": nn.Linear(6, 8, bias=False)})


class TinyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.llm_adapter = nn.ModuleDict({"out_proj": nn.Linear(4, 4)})


def for_lycoris():
    first = {"lokr_w1": random(2, 2), "lokr_w2_a": random(3, 1), "lokr_w2_b": random(1, 3), "alpha": torch.tensor(3.0)}
    return {
        PATHS[0]: first,
        PATHS[1]: {"lokr_w1": random(2, 2), "lokr_w2": random(4, 3), "alpha": torch.tensor(1e5)},
        PATHS[2]: lora(PATHS[2], rank=2, alpha=3.0),
    }


def test_lycoris_loads_a_kohya_file_at_its_strength(tmp_path):
    start, file, model = for_lycoris(), tmp_path / "adapter.safetensors", TinyModel()
    write_adapter(file, export_tensors(start, "kohya", None), None)
    network, _ = create_network_from_weights(1.0, str(file), None, None, model)
    by_name = {module.lora_name: module for module in network.unet_loras}
    factors = {path: {suffix: tensor.double() for suffix, tensor in own.items()} for path, own in start.items()}
    low, whole, thin = factors.values()
    expected = {
        "lora_unet_blocks_0_self_attn_q_proj": torch.kron(low["lokr_w1"], low["lokr_w2_a"] @ low["lokr_w2_b"]) * 3,
        "lora_unet_blocks_1_mlp_layer1": torch.kron(whole["lokr_w1"], whole["lokr_w2"]),
        "lora_unet_llm_adapter_out_proj": thin["lora_up.weight"] @ thin["lora_down.weight"] * 1.5,
    }
    assert set(by_name) == set(expected)
    assert isinstance(by_name["lora_unet_blocks_1_mlp_layer1"], LokrModule)
    for name, delta in expected.items():
        original = by_name[name].org_module[0]
        x = random(5, original.in_features)
        change = by_name[name](x) - original(x)
        torch.testing.assert_close(change.double(), x.double() @ delta.T, rtol=1e-5, atol=1e-5)
