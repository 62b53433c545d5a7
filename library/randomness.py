"""Random choices that follow from what they are for, not from how many draws came before.

A generator is made from (seed, purpose, epoch, picture, repeat, …). So noise, timesteps, captions and data order are
the same with any number of workers or GPUs, and after a resume.
"""

from __future__ import annotations

import hashlib
import random

import torch


def derive_seed(seed: int, purpose: str, *key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key (BLAKE2b over their text)."""
    text = "\x1f".join([str(seed), purpose, *(f"{type(part).__name__}:{part}" for part in key)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def python_random(seed: int, purpose: str, *key: int | str) -> random.Random:
    """For choices among Python objects: captions, order."""
    return random.Random(derive_seed(seed, purpose, *key))


def torch_generator(seed: int, purpose: str, *key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """For tensors, on the device where they are drawn."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, *key))
