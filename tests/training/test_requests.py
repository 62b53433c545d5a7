from library.training.requests import SaveRequests, Wish


def test_files_are_requests_once(tmp_path, caplog):
    (tmp_path / "save_stop").touch()
    requests = SaveRequests(tmp_path)
    assert "was there before the run began" in caplog.text
    assert requests.take() is Wish.NOTHING
    (tmp_path / "save").touch()
    assert [requests.take(), requests.take()] == [Wish.SAVE, Wish.NOTHING]
    (tmp_path / "save").touch()
    (tmp_path / "save_stop").touch()
    assert [requests.take(), requests.take()] == [Wish.SAVE_AND_STOP, Wish.NOTHING]
    assert list(tmp_path.iterdir()) == []
