from library.training.requests import SaveRequests


def test_the_folder_is_there_to_ask_in(tmp_path):
    requests = SaveRequests(tmp_path / "not" / "yet")
    (tmp_path / "not" / "yet" / "save").touch()
    assert requests.take() == "save"


def test_files_are_requests_once(tmp_path, caplog):
    (tmp_path / "save_stop").touch()
    requests = SaveRequests(tmp_path)
    assert "was there before the run began" in caplog.text
    assert requests.take() is None
    (tmp_path / "save").touch()
    assert [requests.take(), requests.take()] == ["save", None]
    (tmp_path / "save").touch()
    (tmp_path / "save_stop").touch()
    assert [requests.take(), requests.take()] == ["save_stop", None]
    assert list(tmp_path.iterdir()) == []
