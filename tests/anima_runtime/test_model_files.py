"""What is no whole safetensors file is refused; matching and loading are tested through each model's own reader."""

import pytest
import torch
from safetensors.torch import save_file

from library.anima_runtime.model_files import read_header
from library.errors import ModelFileError


def test_files_that_are_no_safetensors_files(tmp_path):
    path = tmp_path / "anima.safetensors"
    with pytest.raises(ModelFileError, match=r"anima\.safetensors is missing"):
        read_header(path)
    with pytest.raises(ModelFileError, match=r"is a folder; a \.safetensors file is needed"):
        read_header(tmp_path)
    path.write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(ModelFileError, match=r"anima\.safetensors is not a whole \.safetensors file"):
        read_header(path)
    path.write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"anima\.safetensors is not a whole \.safetensors file"):
        read_header(path)
    save_file({"weight": torch.ones(4)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match=r"anima\.safetensors is not a whole \.safetensors file"):
        read_header(path)
