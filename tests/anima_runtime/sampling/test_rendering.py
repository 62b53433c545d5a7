from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from library.anima_runtime.checkpoint import load_transformer
from library.anima_runtime.sampling.prompts import PromptRequest
from library.anima_runtime.sampling.rendering import denoise, guide, render
from library.anima_runtime.sampling.samplers import simple_sigmas
from library.anima_runtime.text.encoding import CaptionStates


class RecordingModel(nn.Module):
    """Answers `velocity(latents, t, context)` and keeps the t it was asked for."""

    def __init__(self, velocity):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Linear(1, 1).eval()
        self.velocity = velocity
        self.timesteps = []
        self.batch_sizes = []
        self.modes = set()

    def encode_context(self, qwen_states, qwen_mask, t5_ids, t5_mask, min_length):
        assert qwen_mask.all()
        assert t5_mask.all()
        self.modes.add(self.training)
        return torch.full((1, max(min_length, t5_ids.shape[1]), 1), float(t5_ids[0, 0]))

    def forward(self, latents, timesteps, context):
        assert timesteps.shape == (len(latents),) == (len(context),)
        assert timesteps.dtype == torch.float32
        (timestep,) = timesteps.unique().tolist()
        self.timesteps.append(timestep)
        self.batch_sizes.append(len(timesteps))
        self.modes.add(self.training or self.dropout.training)
        return self.velocity(latents, timesteps, context)


class LengthEncoder:
    """A caption's states are its length."""

    def encode(self, captions):
        return [CaptionStates(torch.zeros(1, 1), torch.tensor([len(caption)])) for caption in captions]


class ToyVAE:
    """Shows the first three latent channels, each as 8 x 8 pixels."""

    latent_channels = 16
    spatial_factor = 8

    def decode(self, latents_BCTHW):
        pixels = latents_BCTHW[:, :3, 0].repeat_interleave(8, 2).repeat_interleave(8, 3)
        return pixels.clamp(-1, 1)


def picture(model, request, **options):
    return np.asarray(render(model, ToyVAE(), LengthEncoder(), request, "cpu", **options))


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.5])
def test_timesteps_follow_the_closed_formula(steps, shift):
    model = RecordingModel(lambda latents, t, context: torch.zeros_like(latents))
    request = PromptRequest("", steps=steps, flow_shift=shift)
    denoise(model, torch.zeros(1, 16, 1, 2, 2), [torch.zeros(1, 1, 1)], request)
    u = 1 - np.arange(steps) / steps
    np.testing.assert_allclose(model.timesteps, shift * u / (1 + (shift - 1) * u), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 7, 30])
def test_euler_recovers_the_picture_of_a_straight_flow(steps):
    """With the true velocity noise - x0, Euler ends at x0 for any number of steps."""
    noise, x0 = torch.randn(2, 1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    model = RecordingModel(lambda latents, t, context: noise - x0)
    recovered = denoise(model, noise, [torch.zeros(1, 1, 1)], PromptRequest("", steps=steps))
    torch.testing.assert_close(recovered, x0, rtol=0, atol=1e-5)


def test_euler_steps_equal_plain_maths():
    """v = x has the solution x prod(1 + sigma_next - sigma)."""
    steps, shift = 5, 3.0
    noise = torch.randn(1, 16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    model = RecordingModel(lambda latents, t, context: latents)
    result = denoise(model, noise, [torch.zeros(1, 1, 1)], PromptRequest("", steps=steps, flow_shift=shift))
    u = 1 - np.arange(steps + 1) / steps
    sigmas = shift * u / (1 + (shift - 1) * u)
    torch.testing.assert_close(result, noise * float(np.prod(1 + np.diff(sigmas))), rtol=1e-5, atol=1e-6)


def test_guidance_arithmetic():
    conditional, unconditional = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0])
    assert guide(conditional, unconditional, cfg=4.0).tolist() == [1 + 4 * 2, 1 + 4 * -2]
    assert guide(conditional, unconditional, cfg=1.0).tolist() == [3.0, -1.0]
    assert guide(conditional, cfg=1.0) is conditional


@pytest.mark.parametrize(
    ("request_", "shift", "branches"),
    [
        # The model's velocity is the caption's length / 100, so guidance is 0.01 (negative + cfg (prompt - negative)).
        (PromptRequest("a" * 30, "b" * 10, cfg=4.0), 0.9, 2),
        (PromptRequest("a" * 30, cfg=2.5), 0.75, 2),
        (PromptRequest("a" * 30, "b" * 10, cfg=1.0), 0.3, 1),
    ],
)
def test_a_picture_is_noise_moved_by_the_guided_velocity(request_, shift, branches):
    request = PromptRequest(request_.prompt, request_.negative, 48, 32, seed=9, steps=3, cfg=request_.cfg)
    model = RecordingModel(lambda latents, t, context: context[:, :1, :, None, None] / 100 + torch.zeros_like(latents))
    noise = torch.randn(1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(9))
    levels = ((noise[0, :3, 0] - shift).clamp(-1, 1) + 1) * 127.5
    expected = levels.permute(1, 2, 0).numpy().repeat(8, 0).repeat(8, 1)
    result = picture(model, request)
    assert result.shape == (32, 48, 3)
    assert np.abs(result - expected).max() <= 0.5 + 1e-3
    assert model.batch_sizes == [branches] * 3


def plain_steps(model, noise, contexts, request):
    """Euler with guidance, each context through the model alone."""
    sigmas, latents = simple_sigmas(request.steps, request.flow_shift), noise
    for sigma, following in pairwise(sigmas):
        prompt, negative = (model(latents, torch.tensor([sigma]), context) for context in contexts)
        latents = latents + (following - sigma) * (negative + request.cfg * (prompt - negative))
    return latents


@pytest.mark.parametrize("lengths", [(6, 6), (6, 9)], ids=["together", "apart"])
@torch.no_grad()
def test_prompt_and_negative_give_what_each_gives_alone(tiny_anima, lengths):
    model = load_transformer(tiny_anima / "anima.safetensors", torch.float32, "cpu")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 16, 1, 8, 6, generator=generator)
    contexts = [torch.randn(1, length, 32, generator=generator) for length in lengths]
    request = PromptRequest("", steps=6, cfg=4.0)
    rows = []

    def forward(*tensors):
        rows.append(len(tensors[0]))
        return model(*tensors)

    result = denoise(forward, noise, contexts, request)
    torch.testing.assert_close(result, plain_steps(model, noise, contexts, request), rtol=1e-4, atol=1e-4)
    assert rows == ([2] * 6 if len(set(lengths)) == 1 else [1] * 12)


def test_the_model_may_be_called_another_way():
    model = RecordingModel(lambda latents, t, context: latents * t.reshape(-1, 1, 1, 1, 1))
    request = PromptRequest("cat", width=32, height=32, steps=2)
    other = picture(model, request, forward=lambda *tensors: 0.5 * model(*tensors))
    assert not np.array_equal(other, picture(model, request))


def test_the_context_is_made_uncompiled(monkeypatch):
    """Prompts are of many lengths, each of which would be compiled for."""
    compiled, model = [], RecordingModel(lambda latents, t, context: latents)

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    model.compile(backend=backend)
    monkeypatch.setattr(model, "encode_context", torch.compile(model.encode_context, backend=backend))
    picture(model, PromptRequest("cat", width=16, height=16, steps=1, cfg=1), forward=lambda latents, *_: latents)
    assert compiled == []


def test_a_seed_is_a_picture():
    model = RecordingModel(lambda latents, t, context: latents * t.reshape(-1, 1, 1, 1, 1))
    first, again, other = (
        picture(model, PromptRequest("cat", width=32, height=32, seed=seed, steps=2)) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_rendering_leaves_no_trace():
    """Global random states and each module's train or eval mode are as before, even after a failure."""
    model = RecordingModel(lambda latents, t, context: model.dropout(latents)).train()
    model.frozen.eval()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    request = PromptRequest("cat", width=16, height=16, steps=2)
    picture(model, request)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert model.modes == {False}
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    model.velocity = None
    with pytest.raises(TypeError):
        picture(model, request)
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)


def test_least_context_length_reaches_the_model():
    lengths = set()

    def velocity(latents, t, context):
        lengths.add(context.shape[1])
        return latents

    request = PromptRequest("cat", width=16, height=16, steps=1)
    picture(RecordingModel(velocity), request)
    picture(RecordingModel(velocity), request, min_context_length=64)
    assert lengths == {512, 64}
