import pytest
import torch

from networks.saving import tensors_to_save


@pytest.mark.parametrize(("value", "dtype"), [(65504.0, torch.float16), (70000.0, torch.float32)])
def test_values_beyond_fp16_are_saved_as_float(value, dtype, caplog):
    tensors = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.full((8, 2), value)}
    saved = tensors_to_save({"blocks.0.mlp.layer1": {**tensors, "alpha": torch.tensor(2.0)}}, "comfy", torch.float16)
    weights = [tensor for key, tensor in saved.items() if not key.endswith("alpha")]
    assert {tensor.dtype for tensor in weights} == {dtype}
    assert max(tensor.max().item() for tensor in weights) == value
    assert ("up to 7e+04, too large for torch.float16" in caplog.text) == (dtype == torch.float32)
