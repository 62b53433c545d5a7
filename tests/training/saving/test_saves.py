"""What a save copies, and the files it becomes."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.training import machine
from library.training.host_copy import HostCopy
from library.training.optimization.ema import AdapterEma, EmaSettings
from library.training.run import RunState
from library.training.saving.saves import Save, copy_adapters, write_save
from library.training.saving.settings import SavingSettings
from library.training.saving.states import StateCopy


class Adapter(nn.Module):
    """One number."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.ones(1))

    def adapter_tensors(self):
        return {"block": {"down": self.down.detach()}}


def export(adapters, file_format, dtype):
    return {f"{file_format}.{path}.{name}": t.to(dtype) for path, own in adapters.items() for name, t in own.items()}


@pytest.fixture
def adapter():
    return Adapter()


@pytest.fixture
def optimizer(adapter):
    return torch.optim.SGD(adapter.parameters(), lr=1.0)


def test_training_no_longer_changes_a_copy(adapter, optimizer):
    copied = copy_adapters("a", adapter, optimizer, None)
    with torch.no_grad():
        adapter.down.fill_(5)
    assert {name: own.wait() for name, own in copied.items()} == {"a": {"block": {"down": torch.ones(1)}}}


def test_the_average_is_copied_beside_the_adapter_and_the_adapter_stays(adapter, optimizer):
    ema = AdapterEma(EmaSettings(ema_decay=0.5), adapter)
    ema.update(torch.tensor(True))
    with torch.no_grad():
        adapter.down.fill_(5)
    copied = copy_adapters("a", adapter, optimizer, ema)
    assert {name: own.wait()["block"]["down"].item() for name, own in copied.items()} == {"a": 5, "a-ema": 1}
    assert adapter.down.item() == 5


def test_each_adapter_is_written_in_each_format_and_the_state_beside_them(tmp_path):
    down = {"a": torch.ones(2), "a-ema": torch.zeros(2)}
    copies = {name: HostCopy({"block": {"down": tensor}}) for name, tensor in down.items()}
    state = StateCopy(HostCopy({"network": {"down": torch.ones(2)}}), lambda: RunState(step=3), {})
    save = Save("a", copies, {"ss_seed": "1"}, state)
    settings = SavingSettings(output_dir=tmp_path, save_precision="bf16")
    written = write_save(save, settings, ("comfy", "kohya"), export)
    names = ["a.safetensors", "a-kohya.safetensors", "a-ema.safetensors", "a-ema-kohya.safetensors", "a-state"]
    assert [path.name for path in written] == names
    assert all(path.exists() for path in written)
    found = load_file(tmp_path / "a-ema-kohya.safetensors")
    assert found.keys() == {"kohya.block.down"}
    assert torch.equal(found["kohya.block.down"], torch.zeros(2, dtype=torch.bfloat16))


def test_nothing_is_begun_on_a_disk_with_too_little_room(tmp_path, monkeypatch):
    """Two formats of 100 numbers in bf16, and 300 numbers of a state in float32."""
    moments = {"state": {0: [torch.ones(200)]}}
    state = StateCopy(HostCopy({"network": {"down": torch.ones(100)}, "optimizer": moments}), RunState, {})
    save = Save("a", {"a": HostCopy({"block": {"down": torch.ones(100)}})}, None, state)
    settings = SavingSettings(output_dir=tmp_path, save_precision="bf16")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1599))
    with pytest.raises(OSError, match="1600 bytes are needed, 1599 are free") as caught:
        write_save(save, settings, ("comfy", "kohya"), export)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1600))
    assert len(write_save(save, settings, ("comfy", "kohya"), export)) == 3
