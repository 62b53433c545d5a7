"""How a resumed run's differences are told."""

import json
import logging

import pytest

from library.errors import SettingError
from library.training.saving.snapshot import check_snapshot, digest_of, file_identity, make_snapshot, recorded_choices

SECTIONS = {
    "topology": {"network_dim": 4},
    "schedule": {"learning_rate": 1e-4, "number of steps": 10},
    "objective": {"anima_flow_shift": 3.0, "resolution": (64, 64)},
    "optimizer": {"optimizer_type": "AdamW", "max_grad_norm": 1.0},
}

CHOICES = {"gradient_checkpointing": True, "device": "CPU"}


@pytest.fixture
def state(tmp_path):
    (tmp_path / "resume_snapshot.json").write_text(json.dumps(make_snapshot(SECTIONS, {"seed": 42}, CHOICES)))
    return tmp_path


def changed(section, **values):
    return {**SECTIONS, section: {**SECTIONS[section], **values}}


@pytest.mark.parametrize("strict", [True, False])
def test_the_same_run_is_told_nothing(state, strict, caplog):
    caplog.set_level(logging.INFO)
    check_snapshot(state, SECTIONS, strict)
    check_snapshot(state, changed("objective", new_setting=5), strict)
    assert caplog.text == ""


@pytest.mark.parametrize("strict", [True, False])
def test_another_topology_stops(state, strict):
    with pytest.raises(SettingError, match="of another network or model: network_dim was 4, and is 8"):
        check_snapshot(state, changed("topology", network_dim=8), strict)


@pytest.mark.parametrize("strict", [True, False])
def test_rates_and_length_may_change(state, strict, caplog):
    caplog.set_level(logging.INFO)
    check_snapshot(state, {**changed("schedule", learning_rate=2e-4), "optimizer": {"optimizer_type": "Lion"}}, strict)
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage() == "resume: learning_rate was 0.0001, and is 0.0002; the run goes on with the new value"


def test_what_else_differs_warns_or_stops(state, caplog):
    other = changed("objective", anima_flow_shift=1.0)
    check_snapshot(state, other, strict=False)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "anima_flow_shift was 3.0, and is 1.0" in record.getMessage()
    with pytest.raises(SettingError, match=r"anima_flow_shift was 3\.0, and is 1\.0.*anima_resume_snapshot_strict"):
        check_snapshot(state, other, strict=True)


def test_snapshots_that_cannot_be_compared(tmp_path, state, caplog):
    path = state / "resume_snapshot.json"
    newer = {**json.loads(path.read_text()), "schema_version": 99}
    for content, message in ((json.dumps(newer), "newer version"), ("{}", "cannot be read"), ("[", "cannot be read")):
        path.write_text(content)
        with pytest.raises(SettingError, match=message):
            check_snapshot(state, SECTIONS, strict=False)
    path.unlink()
    check_snapshot(state, SECTIONS, strict=True)
    assert "has no resume_snapshot.json" in caplog.text


def test_it_holds_versions_and_settings_to_read(state):
    written = json.loads((state / "resume_snapshot.json").read_text())
    assert written["schema_version"] == 2 and written["settings"] == {"seed": 42}
    assert set(written["versions"]) >= {"python", "torch"}


def test_files_are_known_by_their_contents(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 0x100000 + b"tensors")
    (tmp_path / "b").write_bytes(b"x" * 0x100000 + b"others!")
    first, second = file_identity(tmp_path / "a"), file_identity(tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "c")
    assert first == file_identity(tmp_path / "c") != second
    (tmp_path / "short").write_bytes(b"tensors")
    first = file_identity(tmp_path / "short")
    (tmp_path / "short").write_bytes(b"others!")
    assert first["bytes"] == 7 and first != file_identity(tmp_path / "short")
    assert digest_of(["a", "b"]) != digest_of(["b", "a"])


def test_folders_are_known_by_their_files(tmp_path):
    one, same, other = (tmp_path / name for name in ("one/qwen", "two/another_name", "three/qwen"))
    for folder, content in ((one, b"tensors"), (same, b"tensors"), (other, b"others!")):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(content)
        (folder / "config.json").write_text(folder.name)
    assert file_identity(one) == file_identity(same) == file_identity(one / "model.safetensors")
    assert file_identity(one) != file_identity(other)
    for folder, names in ((one, "ab"), (other, "ba")):
        for name, content in zip(names, (b"tensors", b"others!"), strict=True):
            (folder / f"{name}.safetensors").write_bytes(content)
        (folder / "model.safetensors").unlink()
    assert file_identity(one) == file_identity(other) != file_identity(same)


def test_of_a_models_identity_that_is_compared_which_both_versions_know(state, caplog):
    then = {"qwen": {"folder": "qwen3"}, "vae": {"bytes": 10, "legacy_hash": "ab"}}
    path = state / "resume_snapshot.json"
    path.write_text(json.dumps(make_snapshot({**SECTIONS, "model": then}, {}, CHOICES)))
    qwen, vae = {"bytes": 5, "legacy_hash": "cd"}, {"bytes": 10, "legacy_hash": "ab", "first_mib": "ef"}
    check_snapshot(state, {**SECTIONS, "model": {"qwen": qwen, "vae": vae, "base_weights": ["12"]}}, strict=True)
    assert caplog.text == ""
    with pytest.raises(SettingError, match="vae was"):
        check_snapshot(state, {**SECTIONS, "model": {"vae": {**vae, "legacy_hash": "ba"}}}, strict=True)


def test_choices_are_given_back_and_those_of_earlier_states_are_not_known(state, caplog):
    assert recorded_choices(state) == CHOICES
    path = state / "resume_snapshot.json"
    earlier = {**json.loads(path.read_text()), "schema_version": 1}
    del earlier["choices"]
    path.write_text(json.dumps(earlier))
    check_snapshot(state, SECTIONS, strict=True)
    assert recorded_choices(state) == {}
    assert caplog.text == ""
    path.unlink()
    assert recorded_choices(state) == {}
