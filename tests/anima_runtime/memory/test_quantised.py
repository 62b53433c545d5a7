from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from library.anima_runtime.model_files import load_into
from library.errors import ModelFileError


def load_linear(path, tensors, dtype=torch.float32):
    save_file(tensors, path)
    with torch.device("meta"):
        module = nn.ModuleDict({"layer": nn.Linear(3, 4, bias=False), "norm": nn.LayerNorm(3, bias=False)})
    load_into(module, path, lambda name: name.removeprefix("net."), dtype, "cpu", "a test model")
    return module["layer"].weight


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def make_weight(fp8=torch.float8_e4m3fn):
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(fp8)
    return values, {"net.layer.weight": values, "net.norm.weight": torch.ones(3)}


def format_tensor(name):
    return torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale_name", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_the_tensor(path, fp8, scale_name, shape):
    values, tensors = make_weight(fp8)
    weight = load_linear(path, tensors | {f"net.layer.{scale_name}": torch.full(shape, 0.0123)})
    assert torch.equal(weight, values.float() * torch.tensor(0.0123))
    assert not torch.equal(weight, values.float())


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_scale_for_each_row(path, shape):
    values, tensors = make_weight()
    scales = torch.tensor([0.5, 0.01, 3.0, 0.2])
    weight = load_linear(path, tensors | {"net.layer.weight_scale": scales.reshape(shape)})
    expected = [[v.float() * scales[row] for v in values[row]] for row in range(4)]
    assert torch.equal(weight, torch.tensor(expected))


def test_the_product_is_taken_before_rounding_to_the_target_dtype(path):
    values, tensors = make_weight()
    scale = torch.tensor(0.0123)
    weight = load_linear(path, tensors | {"net.layer.weight_scale": scale}, torch.bfloat16)
    assert torch.equal(weight, (values.float() * scale).bfloat16())
    assert not torch.equal(weight, values.bfloat16() * scale.bfloat16())


def test_plain_float8_weights_are_cast(path):
    values, tensors = make_weight()
    assert torch.equal(load_linear(path, tensors), values.float())


@pytest.mark.parametrize("prefix", ["", "net."])
def test_markers_and_input_scales_beside_a_weight_scale_are_left_out(path, prefix):
    values, tensors = make_weight()
    extra = {
        "net.layer.weight_scale": torch.tensor(0.5),
        "net.layer.input_scale": torch.tensor(2.0),
        "net.layer.comfy_quant": format_tensor("float8_e4m3fn"),
        f"{prefix}scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    assert torch.equal(load_linear(path, tensors | extra), values.float() * 0.5)


REFUSED = [
    ({"net.layer.comfy_quant": format_tensor("nvfp4")}, "net.layer.comfy_quant (nvfp4)"),
    ({"net.layer.comfy_quant": torch.ones(3, dtype=torch.uint8)}, "net.layer.comfy_quant"),
    ({"net.layer.weight": torch.ones(4, 3, dtype=torch.int8)}, "net.layer.weight (I8)"),
    ({"net.layer.weight": torch.ones(6, 1, dtype=torch.uint8), "net.layer.weight.absmax": torch.ones(1)}, "(U8)"),
    ({"net.layer.weight_scale": torch.ones(1, 3)}, "net.layer.weight_scale of shape [1, 3]"),
    ({"net.layer.weight_scale": torch.ones(2, 3)}, "net.layer.weight_scale of shape [2, 3]"),
]
if hasattr(torch, "float8_e8m0fnu"):  # from torch 2.7 on
    REFUSED.append(
        ({"net.layer.weight_scale": torch.ones(4, 1).to(torch.float8_e8m0fnu)}, "net.layer.weight_scale (F8_E8M0)")
    )


@pytest.mark.parametrize(("extra", "named"), REFUSED)
def test_other_formats_are_refused_by_name(path, extra, named):
    _, tensors = make_weight()
    with pytest.raises(ModelFileError) as error:
        load_linear(path, tensors | extra)
    assert str(path) in str(error.value)
    assert named in str(error.value)
    assert "cannot be decoded exactly" in str(error.value)


@pytest.mark.parametrize("name", ["net.other.weight_scale", "net.layer.input_scale", "net.layer.weight_scale_2"])
def test_a_scale_whose_weight_is_not_scaled_is_never_dropped(path, name):
    _, tensors = make_weight()
    with pytest.raises(ModelFileError, match=f"1 unknown tensors: {name}"):
        load_linear(path, tensors | {name: torch.ones(())})
