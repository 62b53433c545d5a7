"""Hashes are those of the very bytes in the file."""

from __future__ import annotations

import hashlib
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.model_hashes import BLANK_HASHES, fill_hashes, start_hashing


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("megabytes", [0, 3])
def test_filled_in_hashes_are_those_of_the_file(tmp_path, megabytes):
    path = tmp_path / "a.safetensors"
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(megabytes * 2**20, dtype=torch.int32).to(torch.uint8)}
    others = {"ss_training_comment": 'naïve "sshs_legacy_hash":"00000000" \n\x01 猫', "ss_x": "0" * 64}
    save_file(tensors, path, {**others, **BLANK_HASHES})
    size = path.stat().st_size
    fill_hashes(path)

    written = path.read_bytes()
    data = written[8 + int.from_bytes(written[:8], "little") :]
    digest = hashlib.sha256(data).hexdigest()
    assert metadata_of(path) == {
        **others,
        "sshs_model_hash": digest,
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_legacy_hash": hashlib.sha256(written[1048576 : 1048576 + 65536]).hexdigest()[:8],
    }
    assert len(written) == size
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())


def test_the_hash_of_the_tensors_does_not_depend_on_the_metadata(tmp_path):
    tensors = {"a": torch.arange(1000.0)}
    for name, comment in (("short", "a"), ("long", "b" * 1000)):
        save_file(tensors, tmp_path / name, {"ss_training_comment": comment, **BLANK_HASHES})
        fill_hashes(tmp_path / name)
    assert metadata_of(tmp_path / "short")["sshs_model_hash"] == metadata_of(tmp_path / "long")["sshs_model_hash"]


def test_a_file_without_blanks_stays_as_it_is(tmp_path):
    for metadata in (None, {"sshs_model_hash": "0x12", "ss_seed": "1"}):
        path = tmp_path / "a.safetensors"
        save_file({"a": torch.zeros(2)}, path, metadata)
        before = path.read_bytes()
        fill_hashes(path)
        assert path.read_bytes() == before


def test_hashes_of_the_models_files(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "model").write_bytes(content)
    (tmp_path / "folder").mkdir()
    hashes = start_hashing({"sd_model": tmp_path / "model", "vae": tmp_path / "folder"})
    assert hashes["sd_model_hash"] == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    give_up = time.monotonic() + 30
    while len(hashes) < 2 and time.monotonic() < give_up:
        time.sleep(0.01)
    assert hashes == {
        "sd_model_hash": hashes["sd_model_hash"],
        "new_sd_model_hash": hashlib.sha256(content).hexdigest(),
    }
