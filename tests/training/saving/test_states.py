"""States: what goes in comes out, and a folder is complete or absent."""

import hashlib
import json
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from library.errors import ModelFileError, SettingError
from library.training.run import RunState
from library.training.saving import states
from library.training.saving.states import Resumable, copy_state, load_state, write_state


def make_parts(width=3) -> Resumable:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(width, 4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW([{"name": "all", "params": list(network.parameters())}], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    return Resumable(network, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=True, init_scale=8.0))


def train(parts: Resumable, steps: int) -> None:
    for _ in range(steps):
        loss = parts.network(torch.ones(2, 3)).square().mean()
        parts.scaler.scale(loss).backward()
        parts.scaler.step(parts.optimizer)
        parts.scaler.update(4.0)
        parts.optimizer.zero_grad()
        parts.schedule.step()


def save_state(folder, parts: Resumable, state: RunState) -> None:
    """As a run does, but at once."""
    write_state(folder, copy_state(parts, lambda: state))


def test_a_resumed_run_goes_on_exactly(tmp_path):
    straight = make_parts()
    train(straight, 5)

    first = make_parts()
    train(first, 2)
    save_state(tmp_path / "state", first, RunState(step=2, epoch=1, step_in_epoch=1))
    second = make_parts()
    state = load_state(tmp_path / "state", second)
    assert second.scaler.get_scale() == 4.0
    train(second, 3)

    assert replace(state, saved_at=0.0) == RunState(step=2, epoch=1, step_in_epoch=1)
    assert 0 <= time.time() - state.saved_at < 60
    assert second.schedule.get_last_lr() == straight.schedule.get_last_lr()
    for name, tensor in straight.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[name], tensor)


def test_saving_again_replaces_the_folder(tmp_path):
    parts = make_parts()
    save_state(tmp_path / "state", parts, RunState(step=1))
    (tmp_path / "state" / "stale").write_text("x")
    save_state(tmp_path / "state", parts, RunState(step=2))
    assert RunState.load(tmp_path / "state" / "run_state.json").step == 2
    assert not (tmp_path / "state" / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_files_have_ordinary_permissions(tmp_path):
    save_state(tmp_path / "state", make_parts(), RunState())
    (tmp_path / "ordinary").touch()
    assert {path.stat().st_mode for path in (tmp_path / "state").iterdir()} == {(tmp_path / "ordinary").stat().st_mode}


def test_a_failed_save_leaves_the_old_state_and_no_rubbish(tmp_path, monkeypatch):
    parts = make_parts()
    save_state(tmp_path / "state", parts, RunState(step=1))
    monkeypatch.setattr(states, "write_checked", lambda folder, files: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_state(tmp_path / "state", parts, RunState(step=2))
    assert RunState.load(tmp_path / "state" / "run_state.json").step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_state_of_another_network_is_refused_by_name(tmp_path):
    save_state(tmp_path / "state", make_parts(width=3), RunState())
    with pytest.raises(ModelFileError, match=r"another network.*0\.weight"):
        load_state(tmp_path / "state", make_parts(width=5))


def test_what_is_no_state_is_refused(tmp_path):
    with pytest.raises(SettingError, match="not a state folder"):
        load_state(tmp_path, make_parts())


@pytest.mark.parametrize(
    "name", ["run_state.json", "network.safetensors", "optimizer.pt", "schedule.json", "scaler.pt"]
)
@pytest.mark.parametrize("content", [b"", b"xx", b'{"steps": 3}', None])
def test_a_damaged_state_is_refused_by_name(tmp_path, name, content):
    save_state(tmp_path / "state", make_parts(), RunState())
    if content is None:
        (tmp_path / "state" / name).unlink()
    else:
        (tmp_path / "state" / name).write_bytes(content)
    with pytest.raises((ModelFileError, SettingError), match=r"resume: .*state") as caught:
        load_state(tmp_path / "state", make_parts())
    assert "weights_only" not in str(caught.value)


def test_a_state_without_a_loss_scale_can_go_on_in_fp16(tmp_path):
    parts = make_parts()
    without_scale = replace(parts, scaler=torch.amp.GradScaler("cpu", enabled=False))
    save_state(tmp_path / "state", without_scale, RunState(step=2))
    assert load_state(tmp_path / "state", parts).step == 2
    assert parts.scaler.get_scale() == 8.0


def test_every_file_has_its_checksum(tmp_path):
    save_state(tmp_path / "state", make_parts(), RunState())
    manifest = json.loads((tmp_path / "state" / "manifest.json").read_text())
    files = [path for path in (tmp_path / "state").iterdir() if path.name != "manifest.json"]
    assert set(manifest) == {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert manifest[path.name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_one_wrong_bit_of_a_weight_is_found(tmp_path):
    """It would load without complaint."""
    save_state(tmp_path / "state", make_parts(), RunState())
    file = tmp_path / "state" / "network.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"network\.safetensors is not what was written"):
        load_state(tmp_path / "state", make_parts())


def test_a_state_is_what_was_copied_whatever_training_did_since(tmp_path):
    parts, other = make_parts(), make_parts()
    train(parts, 1)
    weights = {name: tensor.clone() for name, tensor in parts.network.state_dict().items()}
    moments = parts.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    copied = states.copy_state(parts, lambda: RunState(step=1))
    train(parts, 2)
    states.write_state(tmp_path / "state", copied)
    load_state(tmp_path / "state", other)
    for name, tensor in other.network.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert torch.equal(other.optimizer.state_dict()["state"][0]["exp_avg"], moments)
    assert other.schedule.last_epoch == 1


class Counter:
    def __init__(self, count):
        self.count = count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


def test_other_parts_are_saved_by_their_names(tmp_path, caplog):
    save_state(tmp_path / "state", replace(make_parts(), others={"one": Counter(5)}), RunState())
    one, two = Counter(0), Counter(0)
    load_state(tmp_path / "state", replace(make_parts(), others={"one": one, "two": two}))
    assert (one.count, two.count) == (5, 0)
    assert "has no two.pt: that part starts anew" in caplog.text
