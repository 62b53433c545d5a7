"""Rendering pictures as ComfyUI would: its samplers and schedule, shift 3.0, classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import nn

from library.anima_runtime.sampling.prompts import PromptRequest
from library.anima_runtime.sampling.samplers import make_sampler
from library.anima_runtime.text.encoding import CaptionEncoder, pad_captions
from library.anima_runtime.transformer import AnimaTransformer
from library.anima_runtime.vae import AnimaVAE

# As AnimaTransformer is called: latents_BCTHW, timesteps_B, context_BSD -> velocity_BCTHW.
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def render(
    transformer: AnimaTransformer,
    vae: AnimaVAE,
    text_encoder: CaptionEncoder,
    request: PromptRequest,
    device: torch.device | str,
    min_context_length: int = 512,
    forward: Forward | None = None,
) -> Image.Image:
    """The picture `request` asks for. `transformer` lies on `device`. forward: another way to call it.

    Global random states stay as they are, and every module of the transformer gets its train or eval mode back.
    """
    with _eval_mode(transformer):
        # A compiled LLM adapter would be compiled for every prompt's length.
        with torch.compiler.set_stance("force_eager"):
            contexts = _encode_prompts(transformer, text_encoder, request, device, min_context_length)
        latents = denoise(forward or transformer, _initial_noise(vae, request).to(device), contexts, request)
    return _to_picture(vae.decode(latents))


def denoise(
    forward: Forward, noise_BCTHW: torch.Tensor, contexts: Sequence[torch.Tensor], request: PromptRequest
) -> torch.Tensor:
    """Steps from noise (t = 1) to latents (t = 0), fp32. contexts: the prompt's (1, L, D), then the negative's.

    The schedule is `simple_sigmas`, the model's t being sigma itself.
    """
    sampler = make_sampler(request.sampler, request.steps, request.flow_shift, request.seed, noise_BCTHW.device)
    batches = _batches(contexts)
    latents = noise_BCTHW
    for sigma, place in zip(sampler.sigmas[:-1].to(noise_BCTHW.device), sampler.timesteps, strict=True):
        velocities = [
            velocity_1CTHW
            for context_BLD in batches
            for velocity_1CTHW in _repeated(forward, latents, sigma, context_BLD).float().split(1)
        ]
        velocity = guide(*velocities, cfg=request.cfg)
        latents = sampler.step(velocity, place, latents).prev_sample
    return latents


def _batches(contexts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Contexts of one length run together, which takes half the launches; padding one would change its result."""
    if len({context.shape for context in contexts}) == 1:
        return [torch.cat(list(contexts))]
    return list(contexts)


def _repeated(
    forward: Forward, latents_1CTHW: torch.Tensor, sigma: torch.Tensor, context_BLD: torch.Tensor
) -> torch.Tensor:
    """The velocity of one picture under each of the contexts."""
    count = len(context_BLD)
    return forward(latents_1CTHW.expand(count, -1, -1, -1, -1), sigma.expand(count), context_BLD)


def guide(conditional: torch.Tensor, unconditional: torch.Tensor | None = None, *, cfg: float) -> torch.Tensor:
    """Classifier-free guidance: unconditional + cfg (conditional - unconditional)."""
    if unconditional is None:
        return conditional
    return unconditional + cfg * (conditional - unconditional)


def _encode_prompts(
    transformer: AnimaTransformer,
    text_encoder: CaptionEncoder,
    request: PromptRequest,
    device: torch.device | str,
    min_context_length: int,
) -> list[torch.Tensor]:
    """The contexts of the prompt and, when guidance needs it, of the negative prompt.

    Each is as long as it is alone: padding the shorter to the longer would add zero rows, which change a result.
    """
    prompts = [request.prompt] if request.cfg == 1 else [request.prompt, request.negative]
    return [
        transformer.encode_context(*pad_captions([states], device), min_length=min_context_length)
        for states in text_encoder.encode(prompts)
    ]


def _initial_noise(vae: AnimaVAE, request: PromptRequest) -> torch.Tensor:
    """Noise (1, C, 1, H/8, W/8) from a CPU generator, so that a seed means the same picture on every device."""
    sides = (request.height // vae.spatial_factor, request.width // vae.spatial_factor)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    return torch.randn((1, vae.latent_channels, 1, *sides), generator=generator)


def _to_picture(pixels_BCHW: torch.Tensor) -> Image.Image:
    """Pixels (1, 3, H, W) in [-1, 1] to 8 bits a channel, rounded."""
    levels = ((pixels_BCHW[0] + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.permute(1, 2, 0).numpy()))


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
