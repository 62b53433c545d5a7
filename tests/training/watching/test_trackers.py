import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from library.errors import SettingError
from library.options import Secret
from library.training.watching.sinks import Sink
from library.training.watching.trackers import LoggingSettings, Tracker, check_trackers


class Listener(Sink):
    """Keeps what it is told; `broken` names the call that fails."""

    def __init__(self, broken=None):
        self.heard, self.broken = [], broken

    def log(self, values, step):
        self._hear("log", values["loss/current"], step)

    def event(self, kind, step, text):
        self._hear(kind, step, text)

    def close(self):
        self._hear("close")

    def _hear(self, call, *arguments):
        if call == self.broken:
            raise ConnectionError("no route to host")
        self.heard.append((call, *arguments))


class FakeWandb:
    """What of the package is used, and what it was told."""

    def __init__(self):
        self.logged, self.finished = [], False

    def init(self, entity=None, project=None, name=None, dir=None, config=None, tags=None, settings=None):
        self.told = {key: value for key, value in vars().items() if key != "self"}
        return SimpleNamespace(log=lambda values, step: self.logged.append((values, step)), finish=self._finish)

    def Settings(self, **settings):
        return settings

    def Image(self, picture, caption):
        return picture, caption

    def _finish(self):
        self.finished = True


@pytest.fixture
def tracker_for(tmp_path):
    def make(config=None, is_main_process=True, **settings):
        own = {"logging_dir": tmp_path, "auto_start_tensorboard": False, **settings}
        return Tracker(LoggingSettings(**own), "tiny", 2, config or {}, is_main_process)

    return make


@pytest.fixture
def fake_wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    return fake


def test_tensorboard_reads_curves_pictures_and_settings(tracker_for):
    tracker = tracker_for({"network_dim": 4}, log_config=True)
    tracker.log({"loss/current": 0.5, "lr/unet": 1e-4}, 1)
    tracker.log({"loss/current": 0.25}, 2)
    tracker.log_image("sample/0", Image.new("RGBA", (3, 2), (255, 0, 128)), 2)
    tracker.close()

    read = EventAccumulator(str(tracker.folder))
    read.Reload()
    assert [(point.step, point.value) for point in read.Scalars("loss/current")] == [(1, 0.5), (2, 0.25)]
    assert read.Scalars("lr/unet")[0].value == pytest.approx(1e-4)
    (picture,) = read.Images("sample/0")
    assert (picture.width, picture.height, picture.step) == (3, 2, 2)
    (text,) = read.Tensors("settings/text_summary")
    assert '"network_dim": 4' in text.tensor_proto.string_val[0].decode()


def test_settings_are_shown_only_when_asked_for(tracker_for):
    tracker = tracker_for({"network_dim": 4})
    tracker.close()
    read = EventAccumulator(str(tracker.folder))
    read.Reload()
    assert read.Tags()["tensors"] == []


def test_nothing_is_written_with_none_or_by_other_processes(tracker_for, tmp_path):
    for tracker in (tracker_for(log_with="none"), tracker_for(is_main_process=False)):
        tracker.log({"loss/current": 0.5}, 1)
        tracker.log_image("sample/0", Image.new("RGB", (3, 2)), 1)
        tracker.event("save", 1, "tiny.safetensors")
        tracker.close()
        assert tracker.folder is None
    assert list(tmp_path.iterdir()) == []


def test_wandb_is_told_what_the_settings_say(tracker_for, fake_wandb, tmp_path):
    file = tmp_path / "more.toml"
    file.write_text('[wandb]\ntags = ["anima"]\n[tensorboard]\nflush_secs = 5')
    tracker = tracker_for(
        {"network_dim": 4}, log_with="wandb", log_config=True, log_tracker_name="faces", log_tracker_config=file,
        wandb_api_key=Secret("0123"),
    )  # fmt: skip
    picture = Image.new("RGB", (3, 2))
    tracker.log({"loss/current": 0.5}, 7)
    tracker.log_image("sample/0", picture, 7, "a cat")
    tracker.close()

    told = fake_wandb.told
    assert (told["project"], told["name"], told["dir"]) == ("faces", tracker.folder.name, str(tracker.folder))
    assert (told["tags"], told["config"], told["settings"]["api_key"]) == (["anima"], {"network_dim": 4}, "0123")
    assert fake_wandb.logged == [({"loss/current": 0.5}, 7), ({"sample/0": (picture, "a cat")}, 7)]
    assert fake_wandb.finished


def test_all_writes_to_both_and_wandbs_own_table_wins(tracker_for, fake_wandb, tmp_path):
    file = tmp_path / "more.toml"
    file.write_text('[wandb]\nname = "mine"')
    tracker = tracker_for(log_with="all", log_tracker_config=file)
    tracker.log({"loss/current": 0.5}, 7)
    tracker.close()
    assert (fake_wandb.told["name"], fake_wandb.told["project"], fake_wandb.told["config"]) == ("mine", "anima", None)
    assert "api_key" not in fake_wandb.told["settings"]
    assert fake_wandb.logged == [({"loss/current": 0.5}, 7)]
    assert list(tracker.folder.glob("events.out.tfevents.*"))


def test_the_real_wandb_takes_it_offline_and_writes_no_key(tracker_for, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    key = "0123456789abcdef" * 2 + "01234567"
    tracker = tracker_for({"network_dim": 4}, log_with="wandb", log_config=True, wandb_api_key=Secret(key))
    tracker.log({"loss/current": 0.5}, 1)
    tracker.log_image("sample/0", Image.fromarray(np.zeros((2, 3, 3), np.uint8)), 1)
    tracker.close()
    files = [path for path in tracker.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any(path.suffix == ".png" for path in files)
    assert not any(key.encode() in path.read_bytes() for path in files)


def test_a_failing_sink_is_left_out_and_the_others_go_on(tracker_for, caplog):
    broken, sound = Listener(broken="log"), Listener()
    tracker = tracker_for(log_with="none")
    tracker.add(lambda: broken)
    tracker.add(lambda: sound)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            tracker.log({"loss/current": 0.5}, step)
        tracker.event("save", 2, "tiny.safetensors")
        tracker.close()
    assert [record.getMessage() for record in caplog.records] == [
        "Listener stopped, and is left out of the rest of the run: ConnectionError: no route to host"
    ]
    assert broken.heard == []
    assert sound.heard == [
        ("log", 0.5, 1),
        ("log", 0.5, 2),
        ("save", 2, "tiny.safetensors"),
        ("close",),
    ]


def test_wandb_that_cannot_start_is_left_out(tracker_for, fake_wandb, caplog):
    def fail(**_):
        raise ConnectionError("no route to host")

    fake_wandb.init = fail
    with caplog.at_level(logging.WARNING):
        tracker = tracker_for(log_with="wandb")
    tracker.log({"loss/current": 0.5}, 1)
    tracker.close()
    assert "left out: ConnectionError: no route to host" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[wandb", "cannot be read"),
        ("[mlflow]\na = 1", "mlflow is no table [tensorboard] or [wandb]"),
        ("wandb = 1", "wandb is no table"),
        ("[tensorboard]\nflush_sec = 5", "has no argument flush_sec; did you mean flush_secs?"),
        ("[tensorboard]\nlog_dir = 'x'", "has no argument log_dir"),
        ("[wandb]\ntag = 5", "[wandb] has no argument tag; did you mean tags?"),
    ],
)
def test_files_that_cannot_be_used_are_refused(text, message, tmp_path, fake_wandb):
    file = tmp_path / "more.toml"
    file.write_text(text)
    with pytest.raises(SettingError) as error:
        check_trackers(LoggingSettings(log_with="all", log_tracker_config=file))
    assert "log_tracker_config: " in str(error.value)
    assert str(file) in str(error.value)
    assert message in str(error.value)


def test_a_missing_package_or_file_is_told(monkeypatch, tmp_path):
    with pytest.raises(SettingError, match=r"absent\.toml cannot be read"):
        check_trackers(LoggingSettings(log_tracker_config=tmp_path / "absent.toml"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match="pip install wandb"):
        check_trackers(LoggingSettings(log_with="wandb"))
    check_trackers(LoggingSettings())
