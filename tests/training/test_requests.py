from library.training.requests import SaveRequests


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
