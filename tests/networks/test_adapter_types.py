"""Types, ranks and shapes told from tensors, and what makes them whole."""

import pytest
import torch

from library.errors import ModelFileError
from networks.adapter_types import AdapterType, describe_adapters, infer_types, normalised, tensor_shapes, weight_shape
from networks.loha import LoHa
from networks.lokr import LoKr
from networks.lora import LoRA

PATH = "blocks.0.mlp.layer1"
LOHA = {f"hada_{name}": torch.ones(4, 4) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
LORA = {"lora_down.weight": torch.ones(4, 16), "lora_up.weight": torch.ones(32, 4), "alpha": torch.tensor(1.0)}


def lokr(in_features=2048, out_features=8192, rank=4, **options):
    with torch.device("meta"):
        return LoKr.for_linear(in_features, out_features, rank, 1.0, **options)


def shapes_on_meta(adapter):
    return {name: torch.empty(parameter.shape, device="meta") for name, parameter in adapter.named_parameters()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"factor": 8}, AdapterType("lokr", rank=4, factor=8)),
        ({"factor": 4}, AdapterType("lokr", rank=4, factor=4)),
        ({"factor": 16}, AdapterType("lokr", rank=4, factor=16)),
        ({"factor": -1}, AdapterType("lokr", rank=4, factor=-1)),
        ({"factor": 8, "full_matrix": True}, AdapterType("lokr", factor=8, full_matrix=True)),
        ({"factor": 8, "rank": 100_000}, AdapterType("lokr", factor=8, full_matrix=True)),
        ({"factor": 16, "rank": 2, "decompose_both": True}, AdapterType("lokr", 2, 16, decompose_both=True)),
    ],
)
def test_lokr_is_told_at_the_real_sizes(options, expected):
    sizes = {"q": (2048, 2048), "mlp": (2048, 8192), "k": (1024, 2048), "llm": (1024, 1024)}
    adapters = {path: shapes_on_meta(lokr(*size, **options)) for path, size in sizes.items()}
    assert infer_types(adapters) == dict.fromkeys(sizes, expected)
    for path, (in_features, out_features) in sizes.items():
        assert weight_shape(path, tensor_shapes(adapters[path])) == (out_features, in_features)


def test_the_other_types_are_told():
    adapters = {
        "a": LoRA(16, 32, 4, 1.0).tensors(),
        "b": LoHa(16, 32, 3, 1.0).tensors(),
        "c": {**LORA, "dora_scale": torch.ones(32, 1)},
        "d": {"w_norm": torch.ones(8)},
        "e": {"norm_value": torch.ones(8)},
        "f": {"diff": torch.ones(32, 16)},
    }
    assert infer_types(adapters) == {
        "a": AdapterType("lora", rank=4),
        "b": AdapterType("loha", rank=3),
        "c": AdapterType("lora", rank=4, dora=True),
        "d": AdapterType("norm"),
        "e": AdapterType("norm"),
        "f": AdapterType("diff"),
    }
    shapes = [weight_shape(path, tensor_shapes(own)) for path, own in adapters.items()]
    assert shapes == [(32, 16)] * 3 + [(8,)] * 2 + [(32, 16)]
    text = describe_adapters(adapters)
    assert text == "2 lora (rank 4; rank 4, DoRA), 1 loha (rank 3), 2 norm, 1 diff"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"lora_down.weight": torch.ones(4, 16)}, "only lora_down.weight"),
        ({"alpha": torch.tensor(1.0)}, "only alpha"),
        ({"dora_scale": torch.ones(4, 1)}, "only dora_scale"),
        ({"w_norm": torch.ones(4), "dora_scale": torch.ones(4, 1)}, "only dora_scale, w_norm"),
        ({"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(2, 2)}, "only lokr_w1, lokr_w2_a"),
        ({**LORA, "lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 2)}, "lokr and lora at once"),
        ({**LORA, "lora_up.weight": torch.ones(32, 5)}, "do not fit each other"),
        ({**LORA, "lora_down.weight": torch.ones(4, 16, 1, 1)}, "do not fit each other"),
        ({**LOHA, "hada_w2_b": torch.ones(4, 5)}, "products differ in shape"),
        ({**LORA, "alpha": torch.ones(2)}, "one number is expected"),
    ],
)
def test_what_is_no_whole_adapter_is_named(own, message):
    with pytest.raises(ModelFileError, match=message) as error:
        normalised(PATH, own)
    assert PATH in str(error.value)


@pytest.mark.parametrize("shape", [(32, 1), (32,), (1, 32)])
def test_doras_scales_become_a_column_where_they_can_only_be_one(shape):
    scale = torch.arange(32.0)
    read = normalised(PATH, {**LORA, "dora_scale": scale.reshape(shape)})["dora_scale"]
    assert torch.equal(read, scale.reshape(32, 1))


@pytest.mark.parametrize(("shape", "out"), [((1, 16), 32), ((16,), 32), ((1, 16), 16), ((16,), 16), ((2, 16), 32)])
def test_doras_scales_over_inputs_are_refused(shape, out):
    own = {**LORA, "lora_up.weight": torch.ones(out, 4), "dora_scale": torch.ones(shape)}
    with pytest.raises(ModelFileError, match=rf"{PATH}.dora_scale .*\[{out}, 1\]"):
        normalised(PATH, own)
