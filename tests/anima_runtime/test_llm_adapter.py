from __future__ import annotations

import pytest
import torch
from diffusers import AnimaTextConditioner

from library.anima_runtime.attention import RMSNorm
from library.anima_runtime.config import AnimaConfig, LLMAdapterConfig
from library.anima_runtime.llm_adapter import LLMAdapter
from library.anima_runtime.transformer import AnimaTransformer

CAPTIONS = [(1, 1), (7, 9), (12, 1), (1, 5), (12, 9)]  # numbers of Qwen and T5 tokens


def make_config(width=64, depth=2, head_size=16, context_width=48):
    return LLMAdapterConfig(
        vocabulary=50,
        width=width,
        depth=depth,
        head_size=head_size,
        mlp_width=4 * width,
        source_width=40,
        context_width=context_width,
    )


def randomise(module):
    torch.manual_seed(0)
    for child in module.modules():
        if isinstance(child, RMSNorm):
            torch.nn.init.normal_(child.weight, mean=1.0, std=0.2)
    return module


def make_transformer(adapter_config):
    config = AnimaConfig(
        latent_channels=16,
        patch_size=2,
        width=32,
        depth=1,
        head_size=16,
        mlp_width=64,
        context_width=adapter_config.context_width,
        adaln_rank=8,
        llm_adapter=adapter_config,
    )
    torch.manual_seed(0)
    return randomise(AnimaTransformer(config))


def make_captions(lengths=CAPTIONS, source_width=40):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(s, source_width, generator=generator), torch.randint(0, 50, (length,), generator=generator))
        for s, length in lengths
    ]


def pad(captions):
    """Right padding with values that would be noticed."""
    s_max = max(len(states) for states, _ in captions)
    l_max = max(len(ids) for _, ids in captions)
    states_BSD = torch.full((len(captions), s_max, captions[0][0].shape[1]), 7.0)
    ids_BL = torch.full((len(captions), l_max), 3)
    states_mask_BS = torch.zeros(len(captions), s_max, dtype=torch.bool)
    ids_mask_BL = torch.zeros(len(captions), l_max, dtype=torch.bool)
    for i, (states, ids) in enumerate(captions):
        states_BSD[i, : len(states)], states_mask_BS[i, : len(states)] = states, True
        ids_BL[i, : len(ids)], ids_mask_BL[i, : len(ids)] = ids, True
    return states_BSD, states_mask_BS, ids_BL, ids_mask_BL


def relative_error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize(("width", "depth", "head_size"), [(64, 2, 16), (48, 3, 24), (128, 1, 64)])
def test_output_and_gradients_equal_diffusers(width, depth, head_size):
    config = make_config(width, depth, head_size, context_width=width)
    torch.manual_seed(0)
    adapter = randomise(LLMAdapter(config))
    twin = AnimaTextConditioner(
        source_dim=config.source_width,
        target_dim=config.context_width,
        model_dim=width,
        num_layers=depth,
        num_attention_heads=width // head_size,
        target_vocab_size=config.vocabulary,
        min_sequence_length=1,
    )
    twin.load_state_dict(adapter.state_dict(), strict=True)
    states_BSD, states_mask_BS, ids_BL, ids_mask_BL = pad(make_captions())
    ours, theirs = states_BSD.clone().requires_grad_(), states_BSD.clone().requires_grad_()
    context = adapter(ours, states_mask_BS, ids_BL, ids_mask_BL)
    reference = twin(theirs, ids_BL, target_attention_mask=ids_mask_BL, source_attention_mask=states_mask_BS)
    assert context.shape == reference.shape == (5, 9, width)
    assert relative_error(context, reference) <= 1e-5

    weighting = torch.randn(context.shape, generator=torch.Generator().manual_seed(2))
    (context * weighting).sum().backward()
    (reference * weighting).sum().backward()
    assert relative_error(ours.grad, theirs.grad) <= 3e-5
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in adapter.named_parameters():
        assert relative_error(parameter.grad, gradients[name]) <= 3e-5, name


def test_a_caption_in_a_padded_batch_equals_the_caption_alone():
    transformer = make_transformer(make_config())
    captions = make_captions()
    with torch.no_grad():
        batch = transformer.encode_context(*pad(captions), min_length=16)
        for caption, row in zip(captions, batch, strict=True):
            alone = transformer.encode_context(*pad([caption]), min_length=16)
            assert relative_error(row, alone[0]) <= 1e-5
            assert row[: len(caption[1])].abs().amax(dim=1).min() > 0.1
            assert torch.count_nonzero(row[len(caption[1]) :]) == 0


def test_what_lies_under_the_padding_does_not_matter():
    transformer = make_transformer(make_config())
    states_BSD, states_mask_BS, ids_BL, ids_mask_BL = pad(make_captions())
    with torch.no_grad():
        before = transformer.encode_context(states_BSD, states_mask_BS, ids_BL, ids_mask_BL)
        states_BSD[~states_mask_BS] = -900.0
        ids_BL[~ids_mask_BL] = 11
        after = transformer.encode_context(states_BSD, states_mask_BS, ids_BL, ids_mask_BL)
    assert torch.equal(before, after)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 512), (512, 512), (530, 530)])
def test_the_context_has_at_least_512_rows_and_is_never_cut(tokens, rows):
    transformer = make_transformer(make_config(width=32, depth=1))
    with torch.no_grad():
        context = transformer.encode_context(*pad(make_captions([(3, tokens)])))
    assert context.shape == (1, rows, 48)
    nonzero_rows = context.abs().amax(dim=2).count_nonzero()
    assert nonzero_rows == tokens


def test_bfloat16_is_close_to_float32():
    adapter = randomise(LLMAdapter(make_config(depth=6))).to(torch.bfloat16)
    inputs = pad(make_captions())
    with torch.no_grad():
        rounded = adapter(*inputs)
        exact = adapter.float()(*inputs)
    assert rounded.dtype == torch.bfloat16
    assert relative_error(rounded.float(), exact) <= 0.03


def test_float16_weights_keep_a_residual_stream_beyond_the_range_of_float16():
    adapter = randomise(LLMAdapter(make_config(depth=6))).half()
    inputs = pad(make_captions())
    stream = []
    with torch.no_grad():
        # 30000 is added to one channel by each of three blocks, and taken back by the other three.
        for block, sign in zip(adapter.blocks, [1, 1, 1, -1, -1, -1], strict=True):
            block.mlp[2].weight[0], block.mlp[2].bias[0] = 0, sign * 30000
            block.register_forward_hook(lambda module, inputs, x: stream.append(x))
        context = adapter(*inputs)
        exact = adapter.double()(*inputs)
    assert stream[0].dtype == torch.float32
    assert stream[2].abs().max() > 65504
    assert context.dtype == torch.float16
    assert context.isfinite().all()
    assert relative_error(context.double(), exact) <= 0.002  # 0.0007 measured
