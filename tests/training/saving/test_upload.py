"""Uploads against a stand-in for the service: what is sent where, again after failures, and never in a run's way."""

from pathlib import Path

import pytest

from library.errors import SettingError
from library.options import Secret
from library.training.saving.upload import HubSettings, Uploader, download_state


class FakeApi:
    """Fails so many times; remembers the rest."""

    def __init__(self, failures=0):
        self.failures = failures
        self.calls = []

    def create_repo(self, **arguments):
        self.calls.append(("create", arguments))

    def upload_file(self, **arguments):
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route\nsecond line")
        self.calls.append(("file", arguments))

    def upload_folder(self, **arguments):
        self.calls.append(("folder", arguments))


@pytest.fixture
def save(tmp_path):
    adapter, state = tmp_path / "a.safetensors", tmp_path / "a-state"
    adapter.touch()
    state.mkdir()
    return [adapter, state]


PLACE = {"repo_id": "me/a", "repo_type": "model"}


@pytest.mark.parametrize("later", [True, False])
def test_adapters_and_where_asked_states_are_sent(save, later):
    api = FakeApi()
    settings = HubSettings(huggingface_repo_id="me/a", huggingface_path_in_repo="x/y", async_upload=later)
    uploader = Uploader(settings, api)
    uploader.add(save)
    uploader.add(save)
    uploader.finish()
    file = ("file", {**PLACE, "path_or_fileobj": save[0], "path_in_repo": "x/y/a.safetensors"})
    assert api.calls == [("create", {**PLACE, "private": True, "exist_ok": True}), file, file]

    api.calls.clear()
    with_states = HubSettings(
        huggingface_repo_id="me/a", huggingface_repo_visibility="public", save_state_to_huggingface=True
    )
    Uploader(with_states, api).add(save)
    assert api.calls == [
        ("create", {**PLACE, "private": False, "exist_ok": True}),
        ("file", {**PLACE, "path_or_fileobj": save[0], "path_in_repo": "a.safetensors"}),
        ("folder", {**PLACE, "folder_path": save[1], "path_in_repo": "a-state"}),
    ]


@pytest.mark.parametrize(("failures", "pauses", "sent"), [(2, [2, 4], 1), (9, [2, 4, 8, 16], 0)])
def test_failures_are_tried_again_and_then_left(save, failures, pauses, sent, caplog):
    api, waited = FakeApi(failures), []
    settings = HubSettings(huggingface_repo_id="me/a", huggingface_token=Secret("hf_secret"))
    Uploader(settings, api, waited.append).add(save)
    assert waited == pauses
    assert [kind for kind, _ in api.calls].count("file") == sent
    assert "uploading a.safetensors to me/a failed (1 of 5 tries): ConnectionError: no route" in caplog.text
    assert ("a.safetensors was not uploaded; it lies in" in caplog.text) == (sent == 0)
    assert "hf_secret" not in caplog.text


def test_what_was_removed_meanwhile_is_left_out(save, caplog):
    save[0].unlink()
    Uploader(HubSettings(huggingface_repo_id="me/a"), FakeApi()).add(save[:1])
    assert "a.safetensors was removed before it could be uploaded" in caplog.text


class FakeHub:
    def __init__(self, folder):
        self.folder, self.asked = folder, None

    def snapshot_download(self, repository, **arguments):
        if self.folder is None:
            raise ConnectionError("no route")
        self.asked = (repository, arguments)
        return str(self.folder)


def test_a_state_is_fetched_by_its_address(tmp_path):
    (tmp_path / "runs" / "a-state").mkdir(parents=True)
    (tmp_path / "runs" / "a-state" / "run_state.json").touch()
    hub, settings = FakeHub(tmp_path), HubSettings(resume_from_huggingface=True)
    assert download_state(Path("me/a/runs/a-state:v1"), settings, hub) == tmp_path / "runs" / "a-state"
    arguments = {"repo_type": "model", "revision": "v1", "allow_patterns": ["runs/a-state/*"]}
    assert hub.asked == ("me/a", arguments)
    with pytest.raises(SettingError, match="me/a has no state other"):
        download_state(Path("me/a/other"), settings, hub)
    with pytest.raises(SettingError, match="owner/name/path"):
        download_state(Path("me/a"), settings, hub)
    with pytest.raises(SettingError, match="cannot be fetched from Hugging Face: no route"):
        download_state(Path("me/a/runs/a-state"), settings, FakeHub(None))
