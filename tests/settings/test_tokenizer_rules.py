import pytest

from library.settings import read_settings

REPO, FOLDER, REVISION = (f"--t5_tokenizer_modelscope_{name}" for name in ("repo_id", "subfolder", "revision"))
T5_OFF, QWEN_OFF = "--no-auto_download_t5_tokenizer", "--no-auto_download_qwen_tokenizer"
FALLBACK_OFF = "--no-t5_tokenizer_modelscope_fallback"


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        ([], []),
        ([REPO, "a/b", FOLDER, "x", REVISION, "v1", "--t5_tokenizer_repo_id", "a/b"], []),
        ([T5_OFF, REPO, "a/b", FOLDER, "x", REVISION, "v1"], [REVISION, REPO, FOLDER]),
        ([T5_OFF, "--t5_tokenizer_repo_id", "a/b"], ["--t5_tokenizer_repo_id"]),
        ([T5_OFF, FALLBACK_OFF], []),  # Qwen3's tokenizer heeds it
        ([T5_OFF, QWEN_OFF, FALLBACK_OFF], [FALLBACK_OFF.replace("no-", "")]),
        ([FALLBACK_OFF, REPO, "a/b", FOLDER, "x", REVISION, "v1"], [REPO, FOLDER, REVISION]),
        ([FALLBACK_OFF, REVISION, "v1", "--t5_tokenizer_repo_id", "https://modelscope.cn/models/a/b"], []),
    ],
)
def test_what_does_nothing_is_said_by_name(needed_flags, caplog, words, idle):
    read_settings([*needed_flags, *words])
    told = [message.partition(" does nothing: ") for message in caplog.messages if " does nothing: " in message]
    assert [name for name, _, _ in told] == [f"command line: {word}" for word in idle]
