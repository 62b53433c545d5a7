"""The latent cache holds what encoding a picture directly gives."""

from __future__ import annotations

import torch

from library.data.latents import cache_latents
from library.data.pictures import scan_datasets
from library.data.pixels import load_pixels
from library.data.settings import DatasetSettings, SubsetSettings


def encode(pixels_BCHW):
    """Stands in for the VAE: 8 times smaller, one frame, and different for mirrored pictures."""
    return torch.nn.functional.avg_pool2d(pixels_BCHW, 8).unsqueeze(2).to(torch.bfloat16)


def scanned(tmp_path):
    straight = SubsetSettings(image_dir=tmp_path / "straight")
    flipped = SubsetSettings(image_dir=tmp_path / "flipped", flip_aug=True)
    dataset = DatasetSettings(
        resolution=(64, 64),
        enable_bucket=True,
        min_bucket_reso=32,
        max_bucket_reso=128,
        bucket_reso_steps=32,
        subsets=(straight, flipped),
    )
    return scan_datasets([dataset], skip_broken=False, show_progress=False)


def test_cache_equals_direct_encoding(tmp_path, draw):
    sizes = [(64, 64), (70, 64), (128, 32), (64, 64), (64, 64)]
    for index, size in enumerate(sizes):
        draw(f"straight/{index}", size, "x")
    draw("flipped/0", (64, 64), "x")
    pictures = scanned(tmp_path)
    batch_shapes = []

    def watched(pixels_BCHW):
        batch_shapes.append(tuple(pixels_BCHW.shape))
        return encode(pixels_BCHW)

    cache = cache_latents(pictures, watched, batch_size=4, show_progress=False)
    assert sorted(batch_shapes) == [(1, 3, 32, 128), (2, 3, 64, 64), (4, 3, 64, 64)]
    assert set(cache) == {(picture.key, False) for picture in pictures} | {("0/1/0.png", True)}
    for picture in pictures:
        for flipped in (False, True) if picture.subset.flip_aug else (False,):
            direct = encode(load_pixels(picture.path, picture.bucket, flipped)[None])[0].float()
            assert torch.equal(cache[picture.key, flipped], direct)
    assert cache["0/1/0.png", True].dtype == torch.float32
    assert torch.equal(cache["0/1/0.png", True], cache["0/1/0.png", False].flip(3))
