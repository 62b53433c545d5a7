from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.transformers import transformer_cosmos

from library.anima_runtime.attention import RMSNorm
from library.anima_runtime.config import AnimaConfig, LLMAdapterConfig
from library.anima_runtime.embeddings import grid_rotary_tables
from library.anima_runtime.transformer import AnimaTransformer

LLM_ADAPTER = LLMAdapterConfig(
    vocabulary=40, width=32, depth=1, head_size=16, mlp_width=64, source_width=24, context_width=48
)


def make_config(width=64, depth=2, head_size=32):
    return AnimaConfig(
        latent_channels=16,
        patch_size=2,
        width=width,
        depth=depth,
        head_size=head_size,
        mlp_width=4 * width,
        context_width=48,
        adaln_rank=16,
        llm_adapter=LLM_ADAPTER,
    )


def make_transformer(config, seed=0):
    torch.manual_seed(seed)
    transformer = AnimaTransformer(config)
    for module in transformer.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.normal_(module.weight, mean=1.0, std=0.2)
    return transformer


def make_inputs(config, height, width, batch=2, rows=20, frames=1):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 16, frames, height, width, generator=generator)
    timesteps = torch.rand(batch, generator=generator)
    context = torch.randn(batch, rows, config.context_width, generator=generator)
    context[:, rows // 2 :] = 0
    return latents, timesteps, context


RENAMES = [
    ("x_embedder.proj.1.", "patch_embed.proj."),
    ("t_embedder.1.", "time_embed.t_embedder."),
    ("t_embedding_norm.", "time_embed.norm."),
    ("final_layer.adaln_modulation.1.", "norm_out.linear_1."),
    ("final_layer.adaln_modulation.2.", "norm_out.linear_2."),
    ("final_layer.linear.", "proj_out."),
    ("adaln_modulation_self_attn.1.", "norm1.linear_1."),
    ("adaln_modulation_self_attn.2.", "norm1.linear_2."),
    ("adaln_modulation_cross_attn.1.", "norm2.linear_1."),
    ("adaln_modulation_cross_attn.2.", "norm2.linear_2."),
    ("adaln_modulation_mlp.1.", "norm3.linear_1."),
    ("adaln_modulation_mlp.2.", "norm3.linear_2."),
    ("self_attn.", "attn1."),
    ("cross_attn.", "attn2."),
    ("output_proj.", "to_out.0."),
    ("q_proj.", "to_q."),
    ("k_proj.", "to_k."),
    ("v_proj.", "to_v."),
    ("q_norm.", "norm_q."),
    ("k_norm.", "norm_k."),
    ("mlp.layer1.", "ff.net.0.proj."),
    ("mlp.layer2.", "ff.net.2."),
]


def diffusers_name(name):
    if name.startswith("blocks."):
        name = f"transformer_{name}"
    for ours, theirs in RENAMES:
        name = name.replace(ours, theirs)
    return name


def diffusers_twin(transformer):
    """diffusers' model with the same weights, and the q/k epsilon that ComfyUI uses."""
    config = transformer.config
    twin = transformer_cosmos.CosmosTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=config.width // config.head_size,
        attention_head_dim=config.head_size,
        num_layers=config.depth,
        mlp_ratio=4.0,
        text_embed_dim=config.context_width,
        adaln_lora_dim=config.adaln_rank,
        rope_scale=(1.0, 4.0, 4.0),
        extra_pos_embed_type=None,
    )
    weights = {
        diffusers_name(name): tensor
        for name, tensor in transformer.state_dict().items()
        if not name.startswith("llm_adapter.")
    }
    twin.load_state_dict(weights, strict=True)
    for block in twin.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            attention.norm_q.eps = attention.norm_k.eps = 1e-6
    return twin


def run_twin(twin, latents, timesteps, context):
    padding_mask = torch.zeros(1, 1, *latents.shape[-2:])
    return twin(latents, timesteps, context, padding_mask=padding_mask, return_dict=False)[0]


@pytest.fixture
def without_torchvision(monkeypatch):
    """diffusers resizes the padding mask with torchvision; the mask given here has the right size already."""
    functional = SimpleNamespace(resize=lambda mask, size, interpolation: mask)
    stand_in = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST=None))
    monkeypatch.setattr(transformer_cosmos, "transforms", stand_in, raising=False)


def relative_error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


SIZES = [
    (make_config(), 1, 8, 8),
    (make_config(), 1, 6, 22),
    (make_config(), 1, 26, 2),
    (make_config(), 3, 4, 6),
    (make_config(width=96, depth=3, head_size=48), 1, 10, 14),
    (make_config(width=128, depth=1, head_size=128), 1, 14, 6),
    (make_config(width=80, depth=4, head_size=20), 1, 4, 34),
]


@pytest.mark.parametrize(("config", "frames", "height", "width"), SIZES)
def test_output_and_gradients_equal_diffusers(without_torchvision, config, frames, height, width):
    transformer = make_transformer(config)
    twin = diffusers_twin(transformer)
    latents, timesteps, context = make_inputs(config, height, width, frames=frames)
    ours = [latents.clone().requires_grad_(), context.clone().requires_grad_()]
    theirs = [latents.clone().requires_grad_(), context.clone().requires_grad_()]
    velocity = transformer(ours[0], timesteps, ours[1])
    reference = run_twin(twin, theirs[0], timesteps, theirs[1])
    assert velocity.shape == latents.shape
    assert velocity.dtype == torch.float32
    assert relative_error(velocity, reference) <= 1e-5

    weighting = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    (velocity * weighting).sum().backward()
    (reference * weighting).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine.grad, other.grad) <= 3e-5
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in transformer.named_parameters():
        if not name.startswith("llm_adapter."):
            assert relative_error(parameter.grad, gradients[diffusers_name(name)]) <= 3e-5, name


def test_one_forward_pass_of_each_picture_equals_the_batch():
    transformer = make_transformer(make_config())
    latents, timesteps, context = make_inputs(transformer.config, 6, 10, batch=3)
    with torch.no_grad():
        batch = transformer(latents, timesteps, context)
        alone = [transformer(latents[i : i + 1], timesteps[i : i + 1], context[i : i + 1]) for i in range(3)]
    assert relative_error(batch, torch.cat(alone)) <= 1e-6


def test_gradient_checkpointing_changes_no_number():
    transformer = make_transformer(make_config())
    latents, timesteps, context = make_inputs(transformer.config, 6, 10)
    results = []
    for enabled in (False, True):
        transformer.gradient_checkpointing = enabled
        transformer.zero_grad()
        loss = transformer(latents, timesteps, context).square().mean()
        loss.backward()
        gradients = {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    (loss, gradients), (checkpointed_loss, checkpointed_gradients) = results
    assert torch.equal(loss, checkpointed_loss)
    assert gradients.keys() == checkpointed_gradients.keys()
    assert all(torch.equal(gradients[name], checkpointed_gradients[name]) for name in gradients)


def test_gradient_checkpointing_runs_every_block_again_only_when_gradients_are_wanted():
    transformer = make_transformer(make_config(depth=3))
    transformer.gradient_checkpointing = True
    calls = []
    for index, block in enumerate(transformer.blocks):
        block.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    inputs = make_inputs(transformer.config, 4, 4)
    with torch.no_grad():
        transformer(*inputs)
    assert calls == [0, 1, 2]
    calls.clear()
    transformer(*inputs).sum().backward()
    assert calls == [0, 1, 2, 2, 1, 0]


def test_bfloat16_is_close_to_float32():
    transformer = make_transformer(make_config(depth=4)).to(torch.bfloat16)
    latents, timesteps, context = make_inputs(transformer.config, 16, 24)
    with torch.no_grad():
        rounded = transformer(latents, timesteps, context)
        exact = transformer.float()(latents, timesteps, context)
    assert rounded.dtype == torch.float32
    assert relative_error(rounded, exact) <= 0.015  # 0.007 measured; 0.016 at 28 blocks


def test_float16_weights_keep_a_residual_stream_beyond_the_range_of_float16():
    transformer = make_transformer(make_config()).half()
    stream = []
    with torch.no_grad():
        # Large gates times large outputs: the stream passes 65504, no matrix product does.
        for block in transformer.blocks:
            block.adaln_modulation_mlp[2].weight[2 * transformer.config.width :].mul_(1000)
            block.mlp.layer2.weight.mul_(20000)
            block.register_forward_hook(lambda module, inputs, x: stream.append(x))
        latents, timesteps, context = make_inputs(transformer.config, 8, 8)
        velocity = transformer(latents, timesteps, context)
        exact = transformer.float()(latents, timesteps, context)
    assert stream[0].dtype == torch.float32
    assert stream[0].abs().max() > 65504
    assert velocity.isfinite().all()
    assert relative_error(velocity, exact) <= 0.02


def plain_angles(head_size, row, column):
    """The angles of one token at t = 0, by the formula, in double precision."""
    spatial = 2 * (head_size // 6)
    theta = 10000 * 4 ** (spatial / (spatial - 2))
    h = [row * theta ** (-2 * k / spatial) for k in range(spatial // 2)]
    w = [column * theta ** (-2 * k / spatial) for k in range(spatial // 2)]
    return [0.0] * (head_size // 2 - spatial) + h + w


@pytest.mark.parametrize("head_size", [128, 32, 20])
def test_position_angles_equal_the_formula(head_size):
    cos, sin = grid_rotary_tables((1, 5, 150), head_size, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == (5 * 150, head_size // 2)
    for row, column in [(0, 0), (4, 7), (2, 149)]:
        angles = plain_angles(head_size, row, column)
        token = row * 150 + column
        torch.testing.assert_close(cos[token], torch.tensor([math.cos(a) for a in angles]), atol=3e-5, rtol=0)
        torch.testing.assert_close(sin[token], torch.tensor([math.sin(a) for a in angles]), atol=3e-5, rtol=0)


def test_a_cast_to_bfloat16_leaves_the_position_angles_in_float32():
    transformer = make_transformer(make_config())
    seen = []
    for block in transformer.blocks:
        block.self_attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    inputs = make_inputs(transformer.config, 4, 60)
    transformer(*inputs)
    transformer.to(torch.bfloat16)(*inputs)
    (cos, sin), _, (cast_cos, cast_sin), _ = seen
    assert torch.equal(cos, cast_cos)
    assert torch.equal(sin, cast_sin)
    assert not list(transformer.buffers())


def test_time_is_not_rounded_to_the_weights_dtype():
    """0.5 and 0.5005 are one number in bfloat16."""
    transformer = make_transformer(make_config()).to(torch.bfloat16)
    sinusoid = transformer.t_embedder[0](torch.tensor([0.5, 0.5005]))
    expected = [math.cos(0.5005), math.sin(0.5005), math.cos(0.5005 * 10000 ** (-1 / 32))]
    torch.testing.assert_close(sinusoid[1, [0, 32, 1]], torch.tensor(expected), atol=1e-6, rtol=0)
    assert sinusoid.dtype == torch.float32


def test_it_can_be_built_without_memory_or_random_numbers():
    before = torch.get_rng_state()
    with torch.device("meta"):
        transformer = AnimaTransformer(make_config(width=2048, depth=28, head_size=128))
    assert all(parameter.is_meta for parameter in transformer.parameters())
    assert torch.equal(before, torch.get_rng_state())
