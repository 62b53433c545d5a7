from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3Model

from library.anima_runtime.text.encoding import CaptionStates, TextEncoder, pad_captions
from library.anima_runtime.text.tokenizers import load_qwen_tokenizer, load_t5_tokenizer
from library.errors import ModelFileError

LONG = "red circle, simple background, " * 150
CAPTIONS = ["red circle, simple background", "", "a", "blue (square:1.2), 猫", LONG, "", "green triangle on a flat sky"]


@pytest.fixture(scope="module")
def encoder(tiny_anima):
    torch.manual_seed(0)
    qwen_tokenizer = load_qwen_tokenizer(tiny_anima / "qwen3")
    config = Qwen3Config(
        vocab_size=len(qwen_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
        max_position_embeddings=32768,
    )
    return TextEncoder(Qwen3Model(config).eval(), qwen_tokenizer, load_t5_tokenizer(tiny_anima / "t5"))


def states_alone(encoder, ids):
    with torch.no_grad():
        return encoder.qwen(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).last_hidden_state[0]


@pytest.mark.parametrize("batch", [CAPTIONS, CAPTIONS * 3, CAPTIONS[1:2], ["", "a"]], ids=["7", "21", "empty", "short"])
def test_states_in_a_batch_equal_those_alone(encoder, tiny_anima, batch):
    reference = Tokenizer.from_file(str(tiny_anima / "qwen3" / "tokenizer.json"))
    pad = reference.token_to_id("<|endoftext|>")
    encoded = encoder.encode(batch)
    assert len(encoded) == len(batch)
    for caption, states in zip(batch, encoded, strict=True):
        ids = reference.encode(caption, add_special_tokens=False).ids or [pad]
        assert states.qwen_states.shape == (len(ids), 32)
        torch.testing.assert_close(states.qwen_states, states_alone(encoder, ids), rtol=0, atol=1e-5)


def test_t5_ids_end_with_1_and_are_never_cut(encoder):
    encoded = dict(zip(CAPTIONS, encoder.encode(CAPTIONS), strict=True))
    assert encoded[""].t5_ids.tolist() == [1]
    assert encoded["a"].t5_ids[-1] == 1
    for states in encoded.values():
        assert states.t5_ids.dtype == torch.int64
        assert (states.t5_ids == 1).sum() == 1
    assert len(encoded[LONG].t5_ids) > 512
    assert len(encoded[LONG].qwen_states) > 512
    # 150 equal parts, so the number of tokens grows by the same amount for each: nothing is lost at the end.
    part = len(encoder.encode([LONG[:62]])[0].t5_ids) - len(encoder.encode([LONG[:31]])[0].t5_ids)
    assert len(encoded[LONG].t5_ids) == 150 * part + 1


def test_the_empty_caption_is_one_pad_token(encoder):
    pad = encoder.qwen_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    (empty,) = encoder.encode([""])
    assert empty.qwen_states.shape == (1, 32)
    torch.testing.assert_close(empty.qwen_states, states_alone(encoder, [pad]), rtol=0, atol=1e-6)
    assert empty.qwen_states.abs().max() > 0.1


def test_states_can_take_part_in_a_graph(encoder):
    (states,) = encoder.encode(["a red circle"])
    weight = torch.ones(32, requires_grad=True)
    (states.qwen_states @ weight).sum().backward()
    torch.testing.assert_close(weight.grad, states.qwen_states.sum(0))


def test_padding_is_on_the_right_and_masked():
    captions = [
        CaptionStates(torch.full((2, 3), 5.0), torch.tensor([7, 8, 1])),
        CaptionStates(torch.full((4, 3), 6.0), torch.tensor([1])),
    ]
    padded = pad_captions(captions, "cpu")
    assert padded.qwen_mask_BS.tolist() == [[True, True, False, False], [True, True, True, True]]
    assert padded.qwen_states_BSD[:, :, 0].tolist() == [[5, 5, 0, 0], [6, 6, 6, 6]]
    assert padded.t5_ids_BL.tolist() == [[7, 8, 1], [1, 0, 0]]
    assert padded.t5_mask_BL.tolist() == [[True, True, True], [True, False, False]]
    longer = pad_captions(captions, "cpu", least=5)
    assert longer.qwen_states_BSD[:, :, 0].tolist() == [[5, 5, 0, 0, 0], [6, 6, 6, 6, 0]]
    assert longer.t5_mask_BL.tolist() == [[True, True, True, False, False], [True, False, False, False, False]]


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(encoder):
    small = Qwen3Model(Qwen3Config(vocab_size=100, hidden_size=8, intermediate_size=8, num_hidden_layers=0))
    with pytest.raises(ModelFileError, match="more than the Qwen3 model's 100"):
        TextEncoder(small, encoder.qwen_tokenizer, encoder.t5_tokenizer)
