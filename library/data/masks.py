"""Masked loss: which parts of a picture are trained, as weights on the grid of its latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from library.data.augment import Variant
from library.data.pictures import Picture
from library.data.pixels import fit, read_alpha, read_rgb

# The VAE halves a side three times.
LATENT_PIXELS = 8
# A mask's weights have the mean 1, so that a small mask teaches as much as a large one. One below this share of the
# area would need weights above 20 for that, which would let single places rule a step: it teaches less instead.
SMALLEST_AREA = 0.05


def is_masked(picture: Picture) -> bool:
    """Whether parts of the picture are not trained."""
    return picture.mask is not None or picture.subset.alpha_mask


def load_loss_weights(picture: Picture, variant: Variant) -> torch.Tensor:
    """weights_1HW of a use of a picture on the grid of its latents, fp32: ones where it is not masked."""
    if is_masked(picture):
        return mask_weights(load_mask(picture, variant))[None]
    width, height = picture.bucket
    return torch.ones(1, height // LATENT_PIXELS, width // LATENT_PIXELS)


def mask_weights(mask_HW: torch.Tensor) -> torch.Tensor:
    """Weights of the latents for a mask in [0, 1]: mask / max(its mean, SMALLEST_AREA); zeros for an empty one."""
    return mask_HW / mask_HW.mean().clamp(min=SMALLEST_AREA)


def load_mask(picture: Picture, variant: Variant) -> torch.Tensor:
    """mask_HW in [0, 1], fp32, on the grid of the latents: how much of each latent's 8 x 8 pixels is to be trained.

    It is scaled, cropped and mirrored as the picture is. DataError: the file cannot be read.
    """
    mask = read_alpha(picture.path) if picture.mask is None else _read_mask(picture.mask)
    fitted = fit(mask, picture.bucket, Image.Resampling.BILINEAR, variant.centring, variant.zoom)
    if variant.flipped:
        fitted = ImageOps.mirror(fitted)
    mask_HW = torch.from_numpy(np.array(fitted)).float() / 255
    return torch.nn.functional.avg_pool2d(mask_HW[None], LATENT_PIXELS)[0]


def _read_mask(path: Path) -> Image.Image:
    return read_rgb(path).getchannel("R")
