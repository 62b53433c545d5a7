from __future__ import annotations

import dataclasses

import pytest

from library.anima_runtime.text.tokenizer_sources import (
    HUGGING_FACE,
    MODELSCOPE,
    HubFolder,
    TokenizerSettings,
    parse_source,
    qwen_sources,
    t5_sources,
)
from library.errors import SettingError
from library.settings import read_settings

HF, MS = HUGGING_FACE, MODELSCOPE

SOURCES = [
    ("google/t5-v1_1-base", HF, "google/t5-v1_1-base", "main", "sub"),
    ("  google/t5-v1_1-base ", HF, "google/t5-v1_1-base", "main", "sub"),
    ("https://huggingface.co/o/n", HF, "o/n", "main", "sub"),
    ("https://huggingface.co/o/n/", HF, "o/n", "main", "sub"),
    ("https://huggingface.co/o/n/tree/main", HF, "o/n", "main", "sub"),
    ("https://huggingface.co/o/n/tree/v2/a/b", HF, "o/n", "v2", "a/b"),
    ("https://huggingface.co/o/n/tree/refs%2Fpr%2F1/a", HF, "o/n", "refs/pr/1", "a"),
    ("https://huggingface.co/o/n/blob/main/tokenizer/spiece.model", HF, "o/n", "main", "tokenizer"),
    ("https://huggingface.co/o/n/resolve/main/spiece.model?download=true", HF, "o/n", "main", ""),
    ("https://huggingface.co/o/n/resolve/main/tokenizer", HF, "o/n", "main", "tokenizer"),
    ("http://HuggingFace.co/o/n", HF, "o/n", "main", "sub"),
    ("huggingface.co/nvidia/Cosmos/tree/main/tokenizer", HF, "nvidia/Cosmos", "main", "tokenizer"),
    ("https://mirror.example/o/n/tree/main/t", HF, "o/n", "main", "t"),
    ("https://modelscope.cn/models/o/n", MS, "o/n", "master", "sub"),
    ("https://www.modelscope.cn/models/o/n/files", MS, "o/n", "master", "sub"),
    ("https://modelscope.cn/models/o/n/summary", MS, "o/n", "master", "sub"),
    ("https://modelscope.cn/models/o/n/tree/v1/a/b", MS, "o/n", "v1", "a/b"),
    ("https://modelscope.cn/models/o/n/resolve/v1/tokenizer/config.json", MS, "o/n", "v1", "tokenizer"),
    ("https://modelscope.cn/models/o/n/file/view/v1/tokenizer/spiece.model", MS, "o/n", "v1", "tokenizer"),
    ("https://modelscope.cn/models/o/n/file/view/v1/tokenizer%2Fspiece.model?status=2", MS, "o/n", "v1", "tokenizer"),
    ("https://modelscope.cn/models/o/n/tree/v1/a?Revision=v2&FilePath=b/config.json", MS, "o/n", "v2", "b"),
    ("https://modelscope.cn/models/o/n?FilePath=config.json", MS, "o/n", "master", ""),
    ("modelscope.cn/models/o/n/tree/master/tokenizer", MS, "o/n", "master", "tokenizer"),
    ("https://scope.example/models/o/n", MS, "o/n", "master", "sub"),
]


@pytest.fixture(autouse=True)
def mirrors(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    monkeypatch.delenv("MODELSCOPE_ENDPOINT", raising=False)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "scope.example")


@pytest.mark.parametrize(("text", "hub", "repo_id", "revision", "subfolder"), SOURCES)
def test_sources(text, hub, repo_id, revision, subfolder):
    assert parse_source(text, subfolder="sub") == HubFolder(hub, repo_id, revision, subfolder)


NO_SOURCES = [
    ("", "nothing is given"),
    ("   ", "nothing is given"),
    ("t5", "'t5' names no repository"),
    ("a/b/c", "names no repository"),
    ("a/", "names no repository"),
    ("../t5", "names no repository"),
    ("C:\\models\\t5", "names no repository"),
    ("huggingface.co", "names no repository"),
    ("https://huggingface.co/", "names no repository"),
    ("https://huggingface.co/owner", "names no repository"),
    ("https://huggingface.co/datasets/o/n", "is no page of a repository's files"),
    ("https://huggingface.co/o/n/tree", "is no page of a repository's files"),
    ("https://huggingface.co/o/n/discussions/1", "is no page of a repository's files"),
    ("https://huggingface.co/o/n/tree/main/a/../b", "is no folder within a repository"),
    ("https://modelscope.cn/o/n", "is no model's page"),
    ("https://modelscope.cn/models/o", "names no repository"),
    ("https://modelscope.cn/models/o/n/feedback", "is no page of a repository's files"),
    ("https://github.com/o/n", "https://github.com is neither Hugging Face nor ModelScope"),
    ("https://huggingface.co.evil.example/o/n", "https://huggingface.co.evil.example is neither"),
    ("ftp://huggingface.co/o/n", "ftp://huggingface.co is neither"),
    ("file:///etc/passwd", "is neither"),
]


@pytest.mark.parametrize(("text", "problem"), NO_SOURCES)
def test_what_is_no_source(text, problem):
    with pytest.raises(ValueError) as caught:
        parse_source(text, subfolder="tokenizer")
    assert problem in str(caught.value)


@pytest.mark.parametrize("text", ["", "t5", "https://github.com/o/n"])
def test_messages_show_what_a_source_looks_like(text):
    with pytest.raises(ValueError, match=r"google/t5-v1_1-base, or a URL such as https://huggingface\.co/owner/name"):
        parse_source(text, subfolder="")


def test_the_root_comes_after_the_subfolder():
    folder = HubFolder(HF, "o/n", "main", "a/b")
    assert [place.subfolder for place in folder.places()] == ["a/b", ""]
    assert list(dataclasses.replace(folder, subfolder="").places()) == [HubFolder(HF, "o/n", "main", "")]


def test_default_sources():
    settings = TokenizerSettings()
    assert t5_sources(settings) == (
        HubFolder(HF, "google/t5-v1_1-base", "main", "tokenizer"),
        HubFolder(MS, "nv-community/Cosmos-Predict2-2B-Text2Image", "master", "tokenizer"),
    )
    assert qwen_sources(settings) == (
        HubFolder(HF, "Qwen/Qwen3-0.6B-Base", "main", ""),
        HubFolder(MS, "Qwen/Qwen3-0.6B-Base", "master", ""),
    )


def test_settings_change_the_sources():
    settings = TokenizerSettings(
        t5_tokenizer_repo_id="https://modelscope.cn/models/a/b",
        t5_tokenizer_subfolder="x",
        t5_tokenizer_modelscope_repo_id="c/d",
        t5_tokenizer_modelscope_revision="v3",
        t5_tokenizer_modelscope_subfolder="",
    )
    assert t5_sources(settings) == (HubFolder(MS, "a/b", "v3", "x"), HubFolder(MS, "c/d", "v3", ""))
    alone = dataclasses.replace(settings, t5_tokenizer_modelscope_fallback=False)
    assert t5_sources(alone) == (HubFolder(MS, "a/b", "v3", "x"),)
    assert [source.hub for source in qwen_sources(alone)] == [HF]


def test_wrong_sources_are_refused_with_the_other_settings(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('t5_tokenizer_repo_id = "https://github.com/o/n"\nt5_tokenizer_subfolder = "../x"\n')
    with pytest.raises(SettingError) as caught:
        read_settings(["--config_file", str(path), "--t5_tokenizer_modelscope_repo_id", "https://huggingface.co/o/n"])
    first, second, third = str(caught.value).splitlines()
    assert f"{path}:1: t5_tokenizer_repo_id" in first and "https://github.com is neither" in first
    assert f"{path}:2: t5_tokenizer_subfolder" in second and "'../x' is no folder within a repository" in second
    assert "--t5_tokenizer_modelscope_repo_id" in third and "not on ModelScope" in third
