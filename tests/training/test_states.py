"""States: what goes in comes out, and a folder is complete or absent."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from library.errors import ModelFileError, SettingError
from library.training.run import RunState
from library.training.states import Resumable, load_state, save_state


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

    assert state == RunState(step=2, epoch=1, step_in_epoch=1)
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
    monkeypatch.setattr(RunState, "save", lambda self, path: (_ for _ in ()).throw(OSError("disk full")))
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


@pytest.mark.parametrize("name", ["run_state.json", "network.safetensors", "optimizer.pt", "schedule.pt", "scaler.pt"])
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
