from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece
from huggingface_hub import constants

from anima_train_network import main
from library.anima_runtime.text import tokenizer_download
from library.anima_runtime.text.tokenizer_plans import check_tokenizer, plan_qwen_tokenizer, plan_t5_tokenizer
from library.anima_runtime.text.tokenizer_sources import TokenizerSettings
from library.anima_runtime.text.tokenizers import (
    load_qwen_tokenizer,
    load_t5_tokenizer,
    provide_qwen_tokenizer,
    provide_t5_tokenizer,
)
from library.errors import ModelFileError

NEEDED = ("config.json", "spiece.model", "tokenizer.json")
HTML = b"<!doctype html><title>Sign in</title>"
HF_ROOT, HF_FOLDER = "/google/t5-v1_1-base/resolve/main/", "/google/t5-v1_1-base/resolve/main/tokenizer/"
MS_API = "/api/v1/models/nv-community/Cosmos-Predict2-2B-Text2Image/repo?Revision=master&FilePath="
MS_FOLDER = f"{MS_API}tokenizer%2F"


@pytest.fixture
def t5(tiny_anima) -> dict[str, bytes]:
    return {name: (tiny_anima / "t5" / name).read_bytes() for name in NEEDED}


def put(hub, prefix, files):
    hub.answers.update({prefix + name: content for name, content in files.items()})


def provide(folder, **settings):
    plan = plan_t5_tokenizer(folder, TokenizerSettings(**settings))
    provide_t5_tokenizer(plan, settings.get("t5_tokenizer_validate_strict", False))
    return plan.folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".download.lock"}


def failure_of(folder, **settings) -> str:
    with pytest.raises(ModelFileError) as caught:
        provide(folder, **settings)
    if folder is not None and folder.is_dir():
        assert contents(folder) == {}
    return str(caught.value)


@pytest.mark.parametrize("prefix", [HF_FOLDER, HF_ROOT])
def test_hugging_face_first_its_subfolder_then_its_root(hubs, t5, tmp_path, prefix):
    hugging_face, modelscope = hubs
    put(hugging_face, prefix, {**t5, "special_tokens_map.json": b"{}"})
    assert provide(tmp_path / "new" / "t5") == tmp_path / "new" / "t5"
    assert contents(tmp_path / "new" / "t5") == {**t5, "special_tokens_map.json": b"{}"}
    assert hugging_face.asked[0] == f"{HF_FOLDER}config.json"
    assert hugging_face.tokens == {"Bearer hf_secret"}
    assert modelscope.asked == []
    asked = len(hugging_face.asked)
    provide(tmp_path / "new" / "t5")
    assert len(hugging_face.asked) == asked, "what is there is not downloaded again"


@pytest.mark.parametrize("prefix", [MS_FOLDER, MS_API])
def test_modelscope_when_hugging_face_has_nothing(hubs, t5, tmp_path, prefix):
    modelscope = hubs[1]
    put(modelscope, prefix, t5)
    provide(tmp_path / "t5")
    assert contents(tmp_path / "t5") == t5
    assert modelscope.tokens == {None}, "the token is for Hugging Face only"
    reference = sentencepiece.SentencePieceProcessor(model_proto=t5["spiece.model"])
    assert load_t5_tokenizer(tmp_path / "t5")("red circle").input_ids == [*reference.encode("red circle"), 1]


def truncated(content):
    def answer(request):
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content[: len(content) // 2])

    return answer


def cut_chunks(content):
    """A transfer of unknown length that breaks before its end."""

    def answer(request):
        request.protocol_version = "HTTP/1.1"
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        request.wfile.write(f"{len(content):x}\r\n".encode() + content[:10])

    return answer


def silent(_):
    time.sleep(1.5)


def dripping(request):
    request.send_response(200)
    request.send_header("Content-Length", "1000000")
    request.end_headers()
    try:
        for _ in range(30):
            request.wfile.write(b" " * 4096)
            time.sleep(0.05)
    except OSError:
        return


FAILURES = [
    ("config.json", 401, r"config\.json: access denied \(401\).*set HF_TOKEN"),
    ("config.json", 403, r"config\.json: access denied \(403\)"),
    ("spiece.model", 404, r"has no spiece\.model"),
    ("tokenizer.json", 404, r"has no tokenizer\.json"),
    ("tokenizer.json", 500, r"tokenizer\.json: 500 Server Error"),
    ("spiece.model", truncated(b"x" * 5000), r"spiece\.model: .*2500"),
    ("tokenizer.json", cut_chunks(b"{}" * 500), r"tokenizer\.json: "),
    ("spiece.model", silent, r"spiece\.model: .*timed out"),
    ("spiece.model", dripping, r"spiece\.model did not arrive within 0\.3 s"),
    ("config.json", HTML, r"config\.json is not JSON, it begins with '<!doctype html>"),
    ("config.json", b"[1]", r"config\.json is not JSON"),
    ("tokenizer.json", HTML, r"tokenizer\.json is not JSON"),
    ("spiece.model", HTML, r"spiece\.model is not a sentencepiece model, it begins with '<!doctype"),
    ("tokenizer.json", b"{}", r"T5 tokenizer cannot be read"),
    ("special_tokens_map.json", HTML, r"special_tokens_map\.json is not JSON"),
]


@pytest.fixture
def short_patience(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(tokenizer_download, "_SECONDS_PER_FILE", 0.3)


@pytest.mark.parametrize(("name", "answer", "reason"), FAILURES)
def test_whatever_fails_on_hugging_face_modelscope_helps(
    hubs, t5, tmp_path, short_patience, caplog, name, answer, reason
):
    hugging_face, modelscope = hubs
    caplog.set_level("INFO")
    put(hugging_face, HF_FOLDER, {**t5, name: answer})
    put(modelscope, MS_FOLDER, {**t5, "config.json": b'{"model_type": "t5", "from": "ModelScope"}'})
    provide(tmp_path / "t5")
    assert contents(tmp_path / "t5").keys() == set(NEEDED)
    assert json.loads((tmp_path / "t5" / "config.json").read_text())["from"] == "ModelScope"
    assert any(re.search(reason, record.getMessage()) for record in caplog.records), caplog.text


@pytest.mark.parametrize(("name", "answer", "reason"), FAILURES)
def test_both_reasons_are_told(hubs, t5, tmp_path, short_patience, name, answer, reason):
    put(hubs[0], HF_FOLDER, {**t5, name: answer})
    put(hubs[1], MS_FOLDER, {**t5, "spiece.model": HTML})
    if name == "tokenizer.json" and answer == 404:
        return  # it can be made from spiece.model, see below
    message = failure_of(tmp_path / "t5")
    start = f"{tmp_path / 't5'}: the T5 tokenizer lacks config.json, spiece.model, tokenizer.json, and could not be"
    assert message.startswith(start)
    assert re.search(f"Hugging Face google/t5-v1_1-base.*{reason}", message), message
    assert re.search("ModelScope nv-community/.*spiece.model is not a sentencepiece model", message), message


def test_modelscope_is_not_asked_when_not_allowed(hubs, t5, tmp_path):
    put(hubs[1], MS_FOLDER, t5)
    message = failure_of(tmp_path / "t5", t5_tokenizer_modelscope_fallback=False)
    assert "google/t5-v1_1-base/tokenizer (main) has no config.json, spiece.model, tokenizer.json" in message
    assert "google/t5-v1_1-base (main) has no config.json" in message
    assert hubs[1].asked == []


def test_no_server_at_all(hubs, monkeypatch, tmp_path):
    for hub in hubs:
        hub.server.server_close()
    message = failure_of(tmp_path / "t5")
    assert message.count("config.json: ") == 2
    assert "Hugging Face" in message and "ModelScope" in message


@pytest.mark.parametrize("missing", [{"tokenizer.json"}, {"config.json"}, {"tokenizer.json", "config.json"}])
def test_what_both_hubs_lack_is_made_from_the_sentencepiece_model(hubs, t5, tmp_path, caplog, missing):
    put(hubs[0], HF_ROOT, {name: content for name, content in t5.items() if name not in missing})
    provide(tmp_path / "t5")
    assert contents(tmp_path / "t5").keys() == set(NEEDED)
    reference = sentencepiece.SentencePieceProcessor(model_proto=t5["spiece.model"])
    tokenizer = load_t5_tokenizer(tmp_path / "t5", strict=True)
    for text in ("red circle, simple background", "  two   spaces\n(blue:1.2) 猫"):
        assert tokenizer(text).input_ids == [*reference.encode(text), 1]
    assert f"made {' and '.join(sorted(missing))} of the T5 tokenizer" in caplog.text


def test_a_complete_source_is_preferred_to_making_files(hubs, t5, tmp_path):
    put(hubs[0], HF_ROOT, {"config.json": t5["config.json"], "spiece.model": t5["spiece.model"]})
    put(hubs[1], MS_FOLDER, {**t5, "config.json": b'{"model_type": "t5", "from": "ModelScope"}'})
    provide(tmp_path / "t5")
    assert contents(tmp_path / "t5")["config.json"] == b'{"model_type": "t5", "from": "ModelScope"}'


def test_redirects_do_not_carry_the_token_to_another_host(hubs, t5, tmp_path):
    """Hugging Face keeps large files on another host."""
    hugging_face, storage = hubs

    def elsewhere(request):
        request.send_response(302)
        request.send_header("Location", f"{storage.address.replace('127.0.0.1', 'localhost')}/blob")
        request.send_header("Content-Length", "0")
        request.end_headers()

    put(hugging_face, HF_FOLDER, {**t5, "spiece.model": elsewhere})
    storage.answers["/blob"] = t5["spiece.model"]
    provide(tmp_path / "t5")
    assert contents(tmp_path / "t5") == t5
    assert (storage.asked, storage.tokens) == (["/blob"], {None})


def test_a_source_in_another_place(hubs, t5, tmp_path):
    put(hubs[1], "/api/v1/models/a/b/repo?Revision=v2&FilePath=x%2Fy%2F", t5)
    provide(tmp_path / "t5", t5_tokenizer_repo_id=f"{hubs[1].address}/models/a/b/tree/v2/x/y")
    assert contents(tmp_path / "t5") == t5
    assert hubs[0].asked == []


def test_what_lies_in_the_folder_is_kept_and_the_rest_added(hubs, t5, tmp_path):
    own = b'{"model_type": "t5", "mine": true}'
    (tmp_path / "config.json").write_bytes(own)
    (tmp_path / "notes.txt").write_bytes(b"mine")
    put(hubs[0], HF_FOLDER, t5)
    provide(tmp_path)
    assert {name: contents(tmp_path)[name] for name in (*NEEDED, "notes.txt")} == {
        **t5,
        "config.json": own,
        "notes.txt": b"mine",
    }


def test_nothing_is_added_to_a_folder_of_another_tokenizer(hubs, t5, tiny_anima, tmp_path):
    folder = tmp_path / "qwen3"
    shutil.copytree(tiny_anima / "qwen3", folder)
    before = contents(folder)
    put(hubs[0], HF_FOLDER, t5)
    with pytest.raises(ModelFileError, match=r"qwen3: its .*tokenizer\.json.* do not go with the T5 tokenizer"):
        provide(folder)
    assert contents(folder) == before


def test_without_a_folder_each_source_has_one_in_the_cache(hubs, t5, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(hubs[0], HF_FOLDER, t5)
    folder = provide(None)
    assert folder.is_relative_to(tmp_path / "hf_home")
    assert contents(folder) == t5
    put(hubs[0], "/a/b/resolve/main/tokenizer/", t5)
    other = provide(None, t5_tokenizer_repo_id="a/b")
    assert other != folder
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == ["hf_home"]


@pytest.mark.parametrize(
    ("settings", "offline", "remedy"),
    [
        ({"auto_download_t5_tokenizer": False}, False, "auto_download_t5_tokenizer to true"),
        ({}, True, "unset HF_HUB_OFFLINE"),
    ],
)
def test_off_or_offline_the_missing_files_are_named(hubs, t5, tmp_path, monkeypatch, settings, offline, remedy):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "spiece.model").write_bytes(t5["spiece.model"])
    plan = plan_t5_tokenizer(tmp_path / "t5", TokenizerSettings(**settings))
    for act in (check_tokenizer, provide_t5_tokenizer):
        with pytest.raises(ModelFileError) as caught:
            act(plan)
        assert str(caught.value).startswith(
            f"{tmp_path / 't5'}: the T5 tokenizer lacks config.json, tokenizer.json; set"
        )
        assert remedy in str(caught.value)
    put(hubs[0], HF_FOLDER, t5)
    assert hubs[0].asked == hubs[1].asked == []
    for name, content in t5.items():
        (tmp_path / "t5" / name).write_bytes(content)
    check_tokenizer(plan)
    assert provide_t5_tokenizer(plan)("").input_ids == [1]


def test_the_check_downloads_nothing_and_says_what_will_be(hubs, t5, tmp_path, caplog):
    put(hubs[0], HF_FOLDER, t5)
    caplog.set_level("INFO")
    check_tokenizer(plan_t5_tokenizer(tmp_path / "t5", TokenizerSettings()))
    place = "Hugging Face google/t5-v1_1-base/tokenizer (main), or else ModelScope"
    assert f"the T5 tokenizer will be downloaded to {tmp_path / 't5'} from {place}" in caplog.text
    assert hubs[0].asked == []
    assert not (tmp_path / "t5").exists()


def test_a_folder_that_cannot_be_made(hubs, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelFileError, match="cannot be filled with the T5 tokenizer"):
        provide(tmp_path / "file" / "t5")


PROCESS = """
import sys
from pathlib import Path
from library.anima_runtime.text.tokenizer_sources import TokenizerSettings
from library.anima_runtime.text.tokenizer_plans import plan_t5_tokenizer
from library.anima_runtime.text.tokenizers import provide_t5_tokenizer
folder, me, other = map(Path, sys.argv[1:])
me.touch()
while not other.exists():
    pass
provide_t5_tokenizer(plan_t5_tokenizer(folder, TokenizerSettings()))
"""


def test_two_processes_download_once(hubs, t5, tmp_path):
    def slowly(_):
        time.sleep(1)
        return t5["config.json"]

    put(hubs[0], HF_FOLDER, {**t5, "config.json": slowly})
    root = Path(__file__).parents[3]
    ready = [str(tmp_path / "a"), str(tmp_path / "b")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path / "t5"), *names],
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"},
        )
        for names in (ready, ready[::-1])
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for name in NEEDED:
        assert hubs[0].asked.count(HF_FOLDER + name) == 1
    assert contents(tmp_path / "t5") == t5


def test_qwen_beside_the_model_or_from_the_hub(hubs, tiny_anima, tmp_path):
    file = tmp_path / "models" / "qwen3.safetensors"
    file.parent.mkdir()
    file.touch()
    tokenizer = (tiny_anima / "qwen3" / "tokenizer.json").read_bytes()
    put(hubs[1], "/api/v1/models/Qwen/Qwen3-0.6B-Base/repo?Revision=master&FilePath=", {"tokenizer.json": tokenizer})
    plan = plan_qwen_tokenizer(file, None, TokenizerSettings())
    downloaded, folder = provide_qwen_tokenizer(plan), plan.folder
    assert folder.is_relative_to(tmp_path / "hf_home")
    assert contents(folder) == {"tokenizer.json": tokenizer}
    assert list(file.parent.iterdir()) == [file], "nothing is written beside the user's model"
    assert hubs[0].asked[0] == "/Qwen/Qwen3-0.6B-Base/resolve/main/tokenizer.json"
    reference = load_qwen_tokenizer(tiny_anima / "qwen3")
    assert downloaded("red circle").input_ids == reference("red circle").input_ids

    off = TokenizerSettings(auto_download_qwen_tokenizer=False)
    assert plan_qwen_tokenizer(file, None, off).folder == folder, "what was downloaded once is used"
    shutil.copy(tiny_anima / "qwen3" / "tokenizer.json", file.parent)
    assert plan_qwen_tokenizer(file, None, TokenizerSettings()).folder == file.parent
    assert plan_qwen_tokenizer(file, tmp_path / "own", TokenizerSettings()).folder == tmp_path / "own"


def test_qwen_off_and_missing(hubs, tmp_path):
    off = TokenizerSettings(auto_download_qwen_tokenizer=False)
    with pytest.raises(ModelFileError) as caught:
        check_tokenizer(plan_qwen_tokenizer(tmp_path / "qwen3.safetensors", None, off))
    assert str(caught.value) == (
        f"{tmp_path}: the Qwen3 tokenizer lacks tokenizer.json (or else vocab.json and merges.txt); set "
        "qwen_tokenizer_dir to a folder that has them, or auto_download_qwen_tokenizer to true to have them downloaded."
    )


def test_another_models_tokenizer_is_not_taken_for_qwens(hubs, t5, tmp_path):
    put(hubs[0], "/Qwen/Qwen3-0.6B-Base/resolve/main/", {"tokenizer.json": t5["tokenizer.json"]})
    with pytest.raises(ModelFileError, match=r"0\.6B-Base \(main\): not a Qwen3 tokenizer: .* comes back as"):
        provide_qwen_tokenizer(plan_qwen_tokenizer(tmp_path / "qwen3.safetensors", None, TokenizerSettings()))


def run_settings(tiny_anima, tmp_path) -> dict[str, object]:
    """The tiny model with neither tokenizer: Qwen3 as one file, T5's folder not there yet."""
    (tmp_path / "models").mkdir()
    shutil.copy(tiny_anima / "qwen3.safetensors", tmp_path / "models")
    return {
        "qwen": tmp_path / "models" / "qwen3.safetensors",
        "t5_tokenizer_dir": tmp_path / "t5",
        "auto_download_t5_tokenizer": True,
        "auto_download_qwen_tokenizer": True,
    }


def test_a_run_downloads_both_tokenizers_and_trains_as_with_them(hubs, t5, tiny_anima, tmp_path, config, losses):
    qwen = {"tokenizer.json": (tiny_anima / "qwen3" / "tokenizer.json").read_bytes()}
    put(hubs[0], "/Qwen/Qwen3-0.6B-Base/resolve/main/", qwen)
    put(hubs[1], MS_FOLDER, t5)
    assert main(config(**run_settings(tiny_anima, tmp_path))) == 0
    assert contents(tmp_path / "t5") == t5
    with_downloads = losses.copy()
    losses.clear()
    assert main(config()) == 0
    assert losses == with_downloads


def test_nothing_is_downloaded_for_a_run_with_mistakes(hubs, t5, tiny_anima, tmp_path, config, capsys):
    put(hubs[0], HF_FOLDER, t5)
    (tmp_path / "empty").mkdir()
    mistakes = {"train_data_dir": tmp_path / "empty"}, {"network_args": ["target_modules=query"]}
    settings = run_settings(tiny_anima, tmp_path)
    for mistake in mistakes:
        assert main(config(**{**settings, **mistake})) == 1
    assert hubs[0].asked == hubs[1].asked == []
    assert not (tmp_path / "t5").exists()


def test_failed_downloads_end_a_run_before_models_are_loaded(hubs, tiny_anima, tmp_path, config, capsys, monkeypatch):
    monkeypatch.setattr("library.anima_runtime.text.qwen3.load_qwen3", lambda *_: pytest.fail("a model was loaded"))
    settings = {**run_settings(tiny_anima, tmp_path), "qwen_tokenizer_dir": tiny_anima / "qwen3"}
    assert main(config(**settings)) == 1
    error = capsys.readouterr().err
    assert "error: " in error and "could not be downloaded" in error and "ModelScope nv-community" in error


def test_needed_files_appear_last(hubs, t5, tmp_path, monkeypatch):
    """Another process may read the folder as soon as they are all there."""
    put(hubs[0], HF_FOLDER, {**t5, "tokenizer_config.json": b"{}", "special_tokens_map.json": b"{}"})
    placed = []
    write = tokenizer_download.write_atomically
    monkeypatch.setattr(
        tokenizer_download, "write_atomically", lambda path, copy: (placed.append(path.name), write(path, copy))
    )
    provide(tmp_path / "t5")
    assert placed == ["special_tokens_map.json", "tokenizer_config.json", *NEEDED]
