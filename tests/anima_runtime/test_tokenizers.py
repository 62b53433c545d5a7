from __future__ import annotations

import json
import shutil

import pytest
import sentencepiece
from tokenizers import Tokenizer

from library.anima_runtime.tokenizers import load_qwen_tokenizer, load_t5_tokenizer
from library.errors import ModelFileError

TEXTS = ["red circle, simple background", "  two   spaces\n(blue:1.2) 猫", "unknown ☃ word"]


@pytest.mark.parametrize("text", TEXTS)
def test_t5_ids_are_sentencepieces_and_an_end(tiny_anima, text):
    tokenizer = load_t5_tokenizer(tiny_anima / "t5")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny_anima / "t5" / "spiece.model"))
    assert tokenizer(text).input_ids == [*reference.encode(text), 1]


def test_t5_files_that_are_missing_are_named(tiny_anima, tmp_path):
    shutil.copy(tiny_anima / "t5" / "config.json", tmp_path)
    with pytest.raises(ModelFileError, match=r"lacks spiece\.model, tokenizer\.json "):
        load_t5_tokenizer(tmp_path)


def test_another_tokenizer_is_not_taken_for_t5(tiny_anima, tmp_path):
    shutil.copytree(tiny_anima / "t5", tmp_path, dirs_exist_ok=True)
    shutil.copy(tiny_anima / "qwen3" / "tokenizer.json", tmp_path)
    with pytest.raises(ModelFileError, match="T5 tokenizer"):
        load_t5_tokenizer(tmp_path)


def test_special_tokens_in_other_places_are_refused(tiny_anima, tmp_path):
    shutil.copytree(tiny_anima / "t5", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    pieces = tokenizer["model"]["vocab"]
    pieces[0], pieces[1] = pieces[1], pieces[0]
    tokenizer["added_tokens"] = []
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"are \(1, 0, 2\) instead of \(0, 1, 2\)"):
        load_t5_tokenizer(tmp_path)


@pytest.mark.parametrize("files", [("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_qwen_tokenizer_is_found_beside_a_single_file(tiny_anima, tmp_path, files):
    """From either set of files, the ids are those of the tokenizers package for the original tokenizer.json."""
    source = tiny_anima / "qwen3" / "tokenizer.json"
    pieces = json.loads(source.read_text(encoding="utf-8"))["model"]
    if "tokenizer.json" in files:
        shutil.copy(source, tmp_path)
    else:
        (tmp_path / "vocab.json").write_text(json.dumps(pieces["vocab"]), encoding="utf-8")
        merges = "\n".join(" ".join(merge) for merge in pieces["merges"])
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    tokenizer = load_qwen_tokenizer(tmp_path / "qwen3.safetensors")
    reference = Tokenizer.from_file(str(source))
    for text in TEXTS:
        assert tokenizer(text).input_ids == reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.pad_token_id == len(pieces["vocab"])


def test_qwen_tokenizer_folders(tiny_anima, tmp_path):
    in_folder = load_qwen_tokenizer(tiny_anima / "qwen3")
    given = load_qwen_tokenizer(tmp_path, tokenizer_dir=tiny_anima / "qwen3")
    assert in_folder(TEXTS[0]).input_ids == given(TEXTS[0]).input_ids
    with pytest.raises(ModelFileError, match=r"vocab\.json and merges\.txt.*qwen_tokenizer_dir") as caught:
        load_qwen_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ModelFileError, match="no Qwen3 tokenizer"):
        load_qwen_tokenizer(tiny_anima / "qwen3", tokenizer_dir=tmp_path)
