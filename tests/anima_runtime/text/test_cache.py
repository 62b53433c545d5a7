"""A cached caption is, bit for bit, what encoding it anew would give."""

from __future__ import annotations

import errno
import os
import random

import pytest
import torch

from library import tensor_cache
from library.anima_runtime.checkpoint import load_transformer
from library.anima_runtime.text.cache import TextCache
from library.anima_runtime.text.contexts import CaptionContext, ContextEncoder, stack_contexts
from library.anima_runtime.text.encoding import CaptionStates, TextEncoder, fixed_batches, pad_captions
from library.anima_runtime.text.qwen3 import load_qwen3
from library.anima_runtime.text.tokenizers import load_qwen_tokenizer, load_t5_tokenizer
from library.tensor_cache import TensorCache

LONG = "red circle, simple background, " * 60
WORDS = ["red circle", "blue square", "1girl", "solo", "猫", "simple background", "(masterpiece:1.2)", "a dog, running"]
PLENTY = 2**30


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def models(request, tiny_anima):
    """(text encoder, transformer)"""
    qwen = load_qwen3(tiny_anima / "qwen3", request.param, "cpu")
    tokenizers = load_qwen_tokenizer(tiny_anima / "qwen3"), load_t5_tokenizer(tiny_anima / "t5")
    return TextEncoder(qwen, *tokenizers), load_transformer(tiny_anima / "anima.safetensors", request.param, "cpu")


def captions(count=25):
    choose = random.Random(0)
    drawn = [", ".join(choose.sample(WORDS, choose.randint(1, len(WORDS)))) for _ in range(count)]
    return ["", LONG, *drawn]


class CountingEncoder:
    def __init__(self):
        self.asked = []

    def encode(self, captions):
        self.asked.append(list(captions))
        return [CaptionStates(torch.full((10,), float(len(text))), torch.tensor([len(text)])) for text in captions]


def equal(first, second):
    return all(
        torch.equal(tensor, vars(other)[name]) and tensor.dtype == vars(other)[name].dtype
        for one, other in zip(first, second, strict=True)
        for name, tensor in vars(one).items()
    )


def test_each_caption_is_encoded_once():
    inner = CountingEncoder()
    cache = TextCache(inner, CaptionStates, PLENTY)
    assert [int(states.t5_ids) for states in cache.encode(["cat", "", "cat"])] == [3, 0, 3]
    assert [int(states.t5_ids) for states in cache.encode(["horse", "", "cat"])] == [5, 0, 3]
    cache.encode(["cat"])
    assert inner.asked == [["cat", ""], ["horse"]]


def test_batches_have_one_shape_for_each_length():
    lengths = [1, 64, 65, 5, 200, *[30] * 9]
    batches = list(fixed_batches(lengths))
    assert all(len(rows) == 8 for rows, _ in batches)
    assert [length for _, length in batches] == [64, 64, 128, 256]
    assert sorted({row for rows, _ in batches for row in rows}) == list(range(14))
    assert all(length - 64 < lengths[row] <= length for rows, length in batches for row in rows)


def test_states_and_contexts_are_the_same_bits_in_any_company(models):
    """Alone, and in shuffled batches of every size."""
    text_encoder, transformer = models
    texts, choose = captions(), random.Random(1)
    for encoder in (text_encoder, ContextEncoder(text_encoder, transformer, "cpu")):
        alone = {text: encoder.encode([text])[0] for text in texts}
        for size in (2, 3, 8, 9, len(texts)):
            chosen = choose.sample(texts, size)
            assert equal(encoder.encode(chosen), [alone[text] for text in chosen])


def test_contexts_equal_those_of_other_batchings(models):
    text_encoder, transformer = models
    texts = captions(6)
    if transformer.dtype != torch.float32:
        pytest.skip("the bound is for fp32")
    contexts = ContextEncoder(text_encoder, transformer, "cpu").encode(texts)
    with torch.no_grad():
        plain = [text_encoder.encode([text], with_gradient=True)[0] for text in texts]
        batch_BLD = transformer.encode_context(*pad_captions(plain, "cpu"), min_length=0)
    length = batch_BLD.shape[1]
    torch.testing.assert_close(stack_contexts(contexts, length), batch_BLD, rtol=0, atol=1e-5)
    for context, states, row in zip(contexts, plain, batch_BLD, strict=True):
        assert context.context_length == states.context_length == len(states.t5_ids)
        assert row[context.context_length :].abs().max() == 0 if context.context_length < length else True


@pytest.mark.parametrize("kind", [CaptionStates, CaptionContext])
def test_cached_equals_uncached_bit_for_bit(models, tmp_path, kind):
    text_encoder, transformer = models
    encoder = text_encoder if kind is CaptionStates else ContextEncoder(text_encoder, transformer, "cpu")
    texts = captions()
    fresh = encoder.encode(texts)
    first = TextCache(encoder, kind, PLENTY, TensorCache(tmp_path, PLENTY), "model")
    for start in range(0, len(texts), 4):
        first.encode(texts[start : start + 4])
    assert equal(first.encode(texts), fresh)
    first.finish_writing()

    class Refusing:
        def encode(self, captions):
            raise AssertionError(f"encoded again: {captions}")

    second = TextCache(Refusing(), kind, PLENTY, TensorCache(tmp_path, PLENTY), "model")
    assert equal(second.encode(texts[::-1]), fresh[::-1])


def test_another_model_or_a_changed_caption_finds_nothing(tmp_path):
    files = TensorCache(tmp_path, PLENTY)
    for identity, text, expected in (("a", "x", 1), ("a", "x", 0), ("b", "x", 1), ("a", "x ", 1), ("a", "X", 1)):
        inner = CountingEncoder()
        cache = TextCache(inner, CaptionStates, PLENTY, files, identity)
        cache.encode([text])
        cache.finish_writing()
        assert len(inner.asked) == expected, (identity, text)


def test_the_identity_follows_weights_and_tokenizers(models, tiny_anima):
    text_encoder, _ = models
    before = text_encoder.identity()
    assert text_encoder.identity() == before
    weight = text_encoder.qwen.layers[0].mlp.up_proj.weight
    kept = weight.data.clone()
    weight.data[0, 0] += 1
    changed = text_encoder.identity()
    weight.data = kept
    tokenizer = load_t5_tokenizer(tiny_anima / "t5")
    tokenizer.add_tokens(["newword"])
    other = TextEncoder(text_encoder.qwen, text_encoder.qwen_tokenizer, tokenizer).identity()
    assert len({before, changed, other}) == 3 and text_encoder.identity() == before


def test_damaged_files_are_encoded_anew(tmp_path):
    cache = TextCache(CountingEncoder(), CaptionStates, PLENTY, TensorCache(tmp_path, PLENTY), "a")
    cache.encode(["cat", "dog"])
    cache.finish_writing()
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-3])
    inner = CountingEncoder()
    cache = TextCache(inner, CaptionStates, PLENTY, TensorCache(tmp_path, PLENTY), "a")
    assert [int(states.t5_ids) for states in cache.encode(["cat", "horse"])] == [3, 5]
    assert inner.asked == [["cat", "horse"]]


def test_memory_is_bounded_and_the_least_used_goes_first():
    inner = CountingEncoder()
    cache = TextCache(inner, CaptionStates, memory=3 * 48)  # an entry is 10 * 4 + 8 bytes
    cache.encode(["a", "bb", "ccc"])
    cache.encode(["a"])
    cache.encode(["dddd"])
    inner.asked.clear()
    assert [int(states.t5_ids) for states in cache.encode(["a", "ccc", "dddd", "bb"])] == [1, 3, 4, 2]
    assert inner.asked == [["bb"]]
    tiny = TextCache(inner, CaptionStates, memory=0)
    assert [int(states.t5_ids) for states in tiny.encode(["a", "bb", "a"])] == [1, 2, 1]


def test_a_full_disk_ends_the_writing_and_not_the_run(tmp_path, monkeypatch, caplog):
    def full(path, write):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_cache, "write_atomically", full)
    inner = CountingEncoder()
    cache = TextCache(inner, CaptionStates, PLENTY, TensorCache(tmp_path, PLENTY), "a")
    assert [int(states.t5_ids) for states in cache.encode(["cat", "horse"])] == [3, 5]
    cache.encode(["cat", "horse", "a"])
    cache.finish_writing()
    assert inner.asked == [["cat", "horse"], ["a"]]
    assert caplog.text.count("No space left on device") == 1
