"""Files written tensor by tensor, read by safetensors itself."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import ModelFileError
from library.tensor_files import TensorSpec, TensorSpool, write_tensors

TENSORS = {
    "odd.bytes": torch.arange(3, dtype=torch.uint8),
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(7, 3).bfloat16(),
    "number": torch.tensor(2.5),
    "turned": torch.arange(6.0).reshape(2, 3).t(),
    "none": torch.empty(0, 4),
    "wide": torch.tensor([1.5], dtype=torch.float64),
    "flags": torch.tensor([True, False]),
    "ünïcode": torch.tensor([1, 2], dtype=torch.int64),
}
NAMES = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"} | {
    torch.float64: "F64", torch.bool: "BOOL", torch.int64: "I64"
}  # fmt: skip
SPECS = {name: TensorSpec(tuple(tensor.shape), NAMES[tensor.dtype]) for name, tensor in TENSORS.items()}


def test_safetensors_reads_what_was_written(tmp_path):
    file = tmp_path / "out.safetensors"
    write_tensors(file, SPECS, TENSORS.__getitem__, {"note": 'with "quotes" and ü'})
    read = load_file(file)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"note": 'with "quotes" and ü'}


def test_the_bytes_are_safetensors_own(tmp_path):
    """Same length, and the same data: safetensors orders tensors of one width by name."""
    tensors = {name: torch.randn(4, 3) for name in ("a", "b", "c")}
    save_file(tensors, tmp_path / "theirs.safetensors", {"k": "v"})
    specs = {name: TensorSpec((4, 3), "F32") for name in tensors}
    write_tensors(tmp_path / "ours.safetensors", specs, tensors.__getitem__, {"k": "v"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_one_tensor_is_asked_for_at_a_time(tmp_path):
    asked = []

    def tensor_of(name):
        asked.append((name, (tmp_path / "out").stat().st_size))
        return torch.zeros(2**18)

    write_tensors(tmp_path / "out", dict.fromkeys(("a", "b", "c"), TensorSpec((2**18,), "F32")), tensor_of)
    assert [name for name, _ in asked] == ["a", "b", "c"]
    assert [size // 2**20 for _, size in asked] == [0, 1, 2]


@pytest.mark.parametrize("tensor", [torch.zeros(2, 2), torch.zeros(3, dtype=torch.float16)])
def test_a_tensor_unlike_its_header_is_refused(tmp_path, tensor):
    with pytest.raises(ModelFileError, match="of F32"):
        write_tensors(tmp_path / "out", {"a": TensorSpec((3,), "F32")}, lambda _: tensor)


def test_unknown_number_formats_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ModelFileError, match=r"a \(F4\)"):
        write_tensors(tmp_path / "out", {"a": TensorSpec((3,), "F4")}, lambda _: torch.zeros(3))
    assert not (tmp_path / "out").exists()


def test_a_spool_gives_back_what_was_added_and_leaves_no_file(tmp_path):
    tensors = {**TENSORS, "eight": torch.randn(3, 2).to(torch.float8_e4m3fn)}
    spool = TensorSpool(tmp_path / "new")
    for name, tensor in tensors.items():
        spool.add(name, tensor)
    for name in sorted(tensors):
        read = spool.read(name)
        assert read.dtype == tensors[name].dtype and torch.equal(read.float(), tensors[name].float())
    write_tensors(tmp_path / "out.safetensors", spool.specs, spool.read)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["turned"], TENSORS["turned"])
    spool.close()
    assert list((tmp_path / "new").iterdir()) == []


def test_a_spool_refuses_unknown_number_formats(tmp_path):
    with pytest.raises(ModelFileError, match="complex64"):
        TensorSpool(tmp_path).add("a", torch.zeros(1, dtype=torch.complex64))
