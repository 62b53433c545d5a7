"""The Qwen-Image (Wan 2.1) VAE: reading its file, and pixels to normalised latents and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageRMS_norm
from torch import nn
from torch.nn.functional import conv2d, rms_norm

from library.anima_runtime.devices import to_device
from library.anima_runtime.file_kinds import describe_tensors
from library.anima_runtime.model_files import Rename, load_into, match_tensors, read_header
from library.errors import ModelFileError

_WHAT = "a Qwen-Image VAE"
_DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"

# Per channel, of the posterior's mode: the values Wan 2.1 and Qwen-Image were trained with.
LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

# diffusers' names -> the original (Wan) ones, applied in order. The decoder's blocks are counted in one row in the
# original: see `_original_name`.
_ORIGINAL_SPELLING = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"coder\.conv_in\.", "coder.conv1."),
    (r"coder\.norm_out\.", "coder.head.0."),
    (r"coder\.conv_out\.", "coder.head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"^encoder\.down_blocks\.", "encoder.downsamples."),
    (r"\.norm1\.", ".residual.0."),
    (r"\.(\d+)\.conv1\.", r".\1.residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.(\d+)\.conv2\.", r".\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)


class AnimaVAE:
    """Pixels to the latents Anima works on, and back. Latents are float32, one frame: (B, C, 1, H/8, W/8).

    The encoder and decoder run without diffusers' feature cache, which keeps every layer's input for a next frame.
    """

    def __init__(self, model: AutoencoderKLQwenImage) -> None:
        """Takes `model` over, and leaves it able to treat single frames only."""
        _make_flat(model)
        self.model = model
        self.latent_channels: int = model.config.z_dim
        self.spatial_factor: int = 2 ** (len(model.config.dim_mult) - 1)

    def to(self, device: torch.device | str) -> AnimaVAE:
        """Moves the VAE to `device`."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] to latents_BCTHW on the VAE's device: (posterior mode - mean) / std, channel by channel."""
        frames_BCTHW = to_device(pixels_BCHW, self.model.device).to(self.model.dtype)[:, :, None]
        moments_BCTHW = self.model.quant_conv(self.model.encoder(frames_BCTHW))
        mode_BCTHW = moments_BCTHW[:, : self.latent_channels].float()  # the other half is the log variance
        mean, std = self.statistics(self.model.device)
        return (mode_BCTHW - mean) / std

    @torch.no_grad()
    def decode(self, latents_BCTHW: torch.Tensor) -> torch.Tensor:
        """Latents of one frame to pixels_BCHW, float32 on the VAE's device, clamped to [-1, 1]."""
        mean, std = self.statistics(self.model.device)
        mode_BCTHW = latents_BCTHW.to(self.model.device, torch.float32) * std + mean
        frames_BCTHW = self.model.decoder(self.model.post_quant_conv(mode_BCTHW.to(self.model.dtype)))
        return frames_BCTHW[:, :, 0].float().clamp(-1, 1)

    @staticmethod
    def statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each latent channel, both (C, 1, 1, 1)."""
        mean, std = torch.tensor((LATENT_MEAN, LATENT_STD), device=device)[:, :, None, None, None]
        return mean, std


class _FlatConv(nn.Module):
    """A causal 3-D convolution for one frame: before it lie only zeros, so its last temporal tap is all of it."""

    def __init__(self, conv: QwenImageCausalConv3d) -> None:
        super().__init__()
        self.weight = nn.Parameter(_channels_last(conv.weight[:, :, -1]), requires_grad=False)
        self.bias = conv.bias
        self.stride = conv.stride[1:]
        # The causal layer moves its padding here, innermost side first.
        self.padding = (conv._padding[2], conv._padding[0])

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        return conv2d(x_BCTHW[:, :, 0], self.weight, self.bias, self.stride, self.padding)[:, :, None]


class _FlatNorm(nn.Module):
    """x / sqrt(mean(x^2)) * gamma over the channels, which lie side by side in memory: in one pass over x.

    diffusers' own makes seven, most of them in float32.
    """

    def __init__(self, norm: QwenImageRMS_norm) -> None:
        super().__init__()
        self.gamma = nn.Parameter(norm.gamma.flatten().clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, ...). The least norm is diffusers', 1e-12."""
        return rms_norm(x.movedim(1, -1), self.gamma.shape, self.gamma, eps=1e-24).movedim(-1, 1)


def _make_flat(model: AutoencoderKLQwenImage) -> None:
    """A third of the arithmetic, and channels last. `time_conv` never runs for one frame and stays as it is."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QwenImageCausalConv3d) and name != "time_conv":
                setattr(parent, name, _FlatConv(child))
            elif isinstance(child, QwenImageRMS_norm):
                setattr(parent, name, _FlatNorm(child))
            elif isinstance(child, nn.Conv2d):
                child.weight.data = _channels_last(child.weight)


def _channels_last(weight: torch.Tensor) -> torch.Tensor:
    """A copy in the order that tensor cores take; a convolution's result has its weight's order."""
    return weight.detach().clone(memory_format=torch.channels_last)


def load_vae(path: Path, dtype: torch.dtype, device: torch.device | str) -> AnimaVAE:
    """The VAE of a .safetensors file with original (Wan) or diffusers' names, or of a diffusers folder.

    All sizes are read from the tensors' shapes. Raises ModelFileError for a wrong file, and for missing, unknown or
    mis-shaped tensors by name.
    """
    file, model, rename = _plan_vae(path)
    load_into(model, file, rename, dtype, device, _WHAT)
    return AnimaVAE(model)


def check_vae_file(path: Path) -> None:
    """Raises whatever load_vae would raise, from the file's header alone."""
    file, model, rename = _plan_vae(path)
    match_tensors(file, model, rename, _WHAT)


def original_vae_names(vae: AutoencoderKLQwenImage) -> dict[str, str]:
    """Every tensor of `vae` by diffusers' name -> its name in the original (Wan) file; one-to-one."""
    residual_blocks = vae.config.num_res_blocks
    return {name: _original_name(name, residual_blocks) for name in vae.state_dict()}


def _original_name(name: str, residual_blocks: int) -> str:
    """A decoder level is `residual_blocks` + 1 residual blocks, then an upsampler, counted on through all levels."""

    def index_in_row(match: re.Match[str]) -> str:
        level, kind, index = int(match[1]), match[2], int(match[3])
        place = index if kind == "resnets" else residual_blocks + 1
        return f"decoder.upsamples.{level * (residual_blocks + 2) + place}."

    name = re.sub(r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", index_in_row, name)
    for pattern, replacement in _ORIGINAL_SPELLING:
        name = re.sub(pattern, replacement, name)
    return name


def _plan_vae(path: Path) -> tuple[Path, AutoencoderKLQwenImage, Rename]:
    """The file to read, the VAE of its sizes on the meta device, and how its names become diffusers'."""
    file = path / _DIFFUSERS_FILE if path.is_dir() else path
    header = read_header(file)
    shapes = {name: tensor.shape for name, tensor in header.items()}
    has_diffusers_names = "encoder.conv_in.weight" in shapes
    try:
        sizes = _read_sizes(shapes, lambda name: name if has_diffusers_names else _original_name(name, 0))
    except (KeyError, IndexError) as error:
        raise ModelFileError(f"{file} was given as {_WHAT}, and looks like {describe_tensors(shapes)}.") from error
    if sizes["z_dim"] != len(LATENT_MEAN):
        raise ModelFileError(f"{file} is a VAE with {sizes['z_dim']} latent channels; Anima's has {len(LATENT_MEAN)}.")
    with torch.device("meta"):
        model = AutoencoderKLQwenImage(**sizes)
    if has_diffusers_names:
        return file, model, lambda name: name
    diffusers_names = {original: name for name, original in original_vae_names(model).items()}
    return file, model, lambda name: diffusers_names.get(name, name)


def _read_sizes(shapes: Mapping[str, tuple[int, ...]], spell: Callable[[str], str]) -> dict[str, Any]:
    """AutoencoderKLQwenImage's arguments, from the encoder's shapes; KeyError or IndexError where one is not there.

    spell: the file's name for a tensor, given diffusers' (the encoder's names do not depend on the sizes).
    """
    base_dim = shapes[spell("encoder.conv_in.weight")][0]
    widths_by_level: list[list[int]] = [[]]
    temporal = []
    for index in count():
        block = f"encoder.down_blocks.{index}"
        last_conv = shapes.get(spell(f"{block}.conv2.weight"))
        if last_conv is not None:
            widths_by_level[-1].append(last_conv[0])
        elif spell(f"{block}.resample.1.weight") in shapes:
            temporal.append(spell(f"{block}.time_conv.weight") in shapes)
            widths_by_level.append([])
        else:
            break
    return {
        "base_dim": base_dim,
        "z_dim": shapes[spell("post_quant_conv.weight")][0],
        "dim_mult": [widths[-1] // base_dim for widths in widths_by_level],
        "num_res_blocks": len(widths_by_level[0]),
        "temperal_downsample": temporal,
    }
