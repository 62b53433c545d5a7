"""Tiny tokenizers of the real kinds: T5's sentencepiece unigram model and Qwen's byte-level BPE."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, T5Tokenizer

from tools.tiny_pictures import COLOURS, SHAPES

TAGS = """
subject background simple flat color masterpiece best quality worst low blurry solo girl boy cat dog
long short hair eyes dress hat smile standing sitting looking at viewer outdoors indoors sky night
a an the of on in and with , . - ( ) 1 2 3 4 5 6 7 8 9 0
"""
# The model files' vocabularies are rounded up to a multiple of this, as T5's 32100 tokens have 32128 rows.
VOCABULARY_MULTIPLE = 128


def rounded_vocabulary(tokens: int) -> int:
    """The number of embedding rows for a tokenizer of so many tokens."""
    return -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def write_t5_tokenizer(folder: Path) -> int:
    """Writes spiece.model, tokenizer.json and config.json; returns the number of tokens.

    Ids as in T5: pad 0, </s> 1, unk 2, the pieces, then <extra_id_99> down to <extra_id_0>.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_words() * 4),
        model_writer=model,
        model_type="unigram",
        vocab_size=200,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    config = {"model_type": "t5", "pad_token_id": 0, "eos_token_id": 1}
    _write_json(folder / "config.json", config)
    tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", {**config, "vocab_size": rounded_vocabulary(len(tokenizer))})
    return len(tokenizer)


def write_qwen_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Writes tokenizer.json and tokenizer_config.json; the pad token <|endoftext|> follows the pieces, as in Qwen3."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.train_from_iterator(_words() * 4, trainer)
    bpe = json.loads(pieces.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _words() -> list[str]:
    """What both tokenizers are trained on; the leading space makes words into pieces with a word start."""
    return [f" {word}" for word in (*COLOURS, *SHAPES, *TAGS.split())]


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
