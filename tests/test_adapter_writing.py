"""An adapter file is proven to hold what was to be saved."""

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library import adapter_writing
from library.adapter_writing import write_adapter
from library.model_hashes import BLANK_HASHES, fill_hashes


def test_values_come_back_bit_for_bit_with_the_hash_of_their_bytes(tmp_path):
    tensors = {"a": torch.randn(3, 4).bfloat16(), "alpha": torch.tensor(2.0), "b": torch.tensor([float("nan"), -0.0])}
    write_adapter(tmp_path / "a.safetensors", tensors, dict(BLANK_HASHES))
    read = load_file(tmp_path / "a.safetensors")
    assert torch.equal(read["a"], tensors["a"]) and read["alpha"].shape == ()
    content = (tmp_path / "a.safetensors").read_bytes()
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert (
            file.metadata()["sshs_model_hash"]
            == hashlib.sha256(content[8 + content[0] + 256 * content[1] :]).hexdigest()
        )


def test_a_file_that_reads_back_otherwise_is_not_kept(tmp_path, monkeypatch):
    def spoil(file):
        fill_hashes(file)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    path = tmp_path / "a.safetensors"
    write_adapter(path, {"a": torch.ones(2)}, None)
    monkeypatch.setattr(adapter_writing, "fill_hashes", spoil)
    with pytest.raises(OSError, match=r"a\.safetensors reads back other than it was written \(b\)"):
        write_adapter(path, {"b": torch.zeros(2)}, None)
    assert list(load_file(path)) == ["a"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
