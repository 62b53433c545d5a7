from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import sentencepiece
from tokenizers import Tokenizer

from library.anima_runtime.text.tokenizer_plans import plan_qwen_tokenizer
from library.anima_runtime.text.tokenizer_sources import TokenizerSettings
from library.anima_runtime.text.tokenizers import load_qwen_tokenizer, load_t5_tokenizer, strict_failures
from library.errors import ModelFileError

TEXTS = ["red circle, simple background", "  two   spaces\n(blue:1.2) 猫", "unknown ☃ word"]


@pytest.mark.parametrize("text", TEXTS)
def test_t5_ids_are_sentencepieces_and_an_end(tiny_anima, text):
    tokenizer = load_t5_tokenizer(tiny_anima / "t5")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny_anima / "t5" / "spiece.model"))
    assert tokenizer(text).input_ids == [*reference.encode(text), 1]


def test_t5_files_that_are_missing_are_named(tiny_anima, tmp_path):
    shutil.copy(tiny_anima / "t5" / "config.json", tmp_path)
    with pytest.raises(ModelFileError, match=r"lacks spiece\.model, tokenizer\.json\."):
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


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        (lambda it: setattr(it, "pad_token", ""), "the text of its pad token is empty"),
        (lambda it: it.extra.pop("<extra_id_7>"), "it lacks <extra_id_7>"),
        (lambda it: it.extra.clear(), "it lacks <extra_id_0>, .* and 90 more"),
        (lambda it: setattr(it, "ids", [1]), "has no ids but the end's"),
        (lambda it: setattr(it, "ids", [3, 200, 1]), "has ids outside 0 to 102: .*200"),
        (lambda it: setattr(it, "count", 0), "its vocabulary is empty"),
    ],
)
def test_strict_validation_names_what_failed(change, failure):
    tokenizer = StandIn()
    assert strict_failures(tokenizer) == []
    change(tokenizer)
    assert re.search(failure, "; ".join(strict_failures(tokenizer)))


class StandIn:
    """What strict validation asks of a tokenizer: 3 special tokens and 100 extra ids."""

    def __init__(self):
        self.pad_token, self.eos_token, self.unk_token = "<pad>", "</s>", "<unk>"
        self.extra = {f"<extra_id_{99 - number}>": 3 + number for number in range(100)}
        self.ids = [5, 6, 1]
        self.count = 103

    def __len__(self):
        return self.count

    def get_vocab(self):
        return self.extra

    def __call__(self, text):
        return SimpleNamespace(input_ids=self.ids)


def test_strict_loading(tiny_anima, tmp_path):
    assert load_t5_tokenizer(tiny_anima / "t5", strict=True)("").input_ids == [1]
    shutil.copytree(tiny_anima / "t5", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] = [[name.replace("extra", "other"), s] for name, s in tokenizer["model"]["vocab"]]
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if "extra" not in token["content"]]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 0}', encoding="utf-8")
    load_t5_tokenizer(tmp_path)
    with pytest.raises(ModelFileError, match=r"t5_tokenizer_validate_strict: it lacks <extra_id_0>"):
        load_t5_tokenizer(tmp_path, strict=True)


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
    plan = plan_qwen_tokenizer(tmp_path / "qwen3.safetensors", None, TokenizerSettings())
    assert plan.folder == tmp_path
    tokenizer = load_qwen_tokenizer(plan.folder)
    reference = Tokenizer.from_file(str(source))
    for text in TEXTS:
        assert tokenizer(text).input_ids == reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.pad_token_id == len(pieces["vocab"])


def test_qwen_tokenizer_folders(tiny_anima, tmp_path):
    settings = TokenizerSettings()
    assert plan_qwen_tokenizer(tiny_anima / "qwen3", None, settings).folder == tiny_anima / "qwen3"
    assert plan_qwen_tokenizer(tiny_anima / "qwen3", tmp_path, settings).folder == tmp_path
    with pytest.raises(
        ModelFileError, match=r"lacks tokenizer\.json \(or else vocab\.json and merges\.txt\)"
    ) as caught:
        load_qwen_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_another_tokenizer_is_not_taken_for_qwens(tiny_anima, tmp_path):
    shutil.copy(tiny_anima / "t5" / "tokenizer.json", tmp_path)
    with pytest.raises(ModelFileError, match="not a Qwen3 tokenizer: 'a red circle, simple background' comes back as"):
        load_qwen_tokenizer(tmp_path)
