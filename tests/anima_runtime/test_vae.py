from __future__ import annotations

import re

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageRMS_norm
from safetensors.torch import save_file

from library.anima_runtime.vae import _FlatNorm, check_vae_file, load_vae, original_vae_names
from library.errors import ModelFileError

REAL = {}
TINY = {"base_dim": 8}
# Other depths than the real one: 1 residual block a level, 3 levels, time halved in the first.
ODD = {"base_dim": 6, "dim_mult": [1, 3, 2], "num_res_blocks": 1, "temperal_downsample": [True, False]}

MEAN = "-.7571 -.7089 -.9113 .1075 -.1745 .9653 -.1517 1.5508 .4134 -.0715 .5517 -.3632 -.1922 -.9497 .2503 -.2921"
STD = "2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 2.8251 1.9160"


def channel_values(text):
    return torch.tensor([float(value) for value in text.split()]).reshape(1, 16, 1, 1, 1)


def random_vae(sizes):
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(**sizes).eval()
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=1 / max(1, parameter[0].numel()) ** 0.5)
    return vae


def original_tensors(vae):
    names = original_vae_names(vae)
    return {names[name]: tensor.contiguous() for name, tensor in vae.state_dict().items()}


@pytest.fixture(scope="module")
def tiny_vae():
    return random_vae(TINY)


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("sizes", [REAL, TINY, ODD])
def test_original_names_are_one_to_one(sizes):
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(**sizes)
    names = original_vae_names(vae)
    assert list(names) == list(vae.state_dict())
    assert len(set(names.values())) == len(names)
    assert sizes == ODD or len(names) == 194


def test_original_names_are_those_of_the_distributed_file():
    """Built from the original's structure: 11 encoder and 15 decoder blocks in a row, a level ending by a resampler."""
    conv, residual = ("weight", "bias"), ("residual.0.gamma", "residual.3.gamma")
    residual += tuple(f"residual.{place}.{part}" for place in (2, 6) for part in conv)
    shortcut = tuple(f"shortcut.{part}" for part in conv)
    resample, time = (tuple(f"{name}.{part}" for part in conv) for name in ("resample.1", "time_conv"))
    attention = ("norm.gamma", *(f"{name}.{part}" for name in ("to_qkv", "proj") for part in conv))
    blocks = {
        **{f"encoder.downsamples.{k}": residual for k in (0, 1, 4, 7, 9, 10)},
        **{f"encoder.downsamples.{k}": residual + shortcut for k in (3, 6)},
        **{f"encoder.downsamples.{k}": resample + time for k in (5, 8)},
        "encoder.downsamples.2": resample,
        **{f"decoder.upsamples.{k}": residual for k in (0, 1, 2, 5, 6, 8, 9, 10, 12, 13, 14)},
        "decoder.upsamples.4": residual + shortcut,
        **{f"decoder.upsamples.{k}": resample + time for k in (3, 7)},
        "decoder.upsamples.11": resample,
        **{f"{side}.middle.{k}": residual for side in ("encoder", "decoder") for k in (0, 2)},
        **{f"{side}.middle.1": attention for side in ("encoder", "decoder")},
        **dict.fromkeys(("conv1", "conv2"), conv),
        **{f"{side}.{name}": conv for side in ("encoder", "decoder") for name in ("conv1", "head.2")},
        **{f"{side}.head.0": ("gamma",) for side in ("encoder", "decoder")},
    }
    with torch.device("meta"):
        names = original_vae_names(AutoencoderKLQwenImage())
    assert set(names.values()) == {f"{block}.{part}" for block, parts in blocks.items() for part in parts}


def test_decoder_blocks_follow_the_published_rule():
    """For 2 residual blocks: K in 3, 7, 11 is upsampler (K - 3) / 4, any other K is block K % 4 of level K // 4."""
    with torch.device("meta"):
        names = original_vae_names(AutoencoderKLQwenImage())
    for name, original in names.items():
        if place := re.match(r"decoder\.upsamples\.(\d+)\.", original):
            k = int(place[1])
            level = (
                f"up_blocks.{(k - 3) // 4}.upsamplers.0" if k in (3, 7, 11) else f"up_blocks.{k // 4}.resnets.{k % 4}"
            )
            assert name.startswith(f"decoder.{level}.")


@pytest.mark.parametrize("sizes", [TINY, ODD])
@pytest.mark.parametrize("layout", ["original", "diffusers_file", "diffusers_folder"])
def test_every_layout_loads_the_same_vae(tmp_path, pixels, sizes, layout):
    vae = random_vae(sizes)
    path = tmp_path / "vae.safetensors"
    if layout == "original":
        save_file(original_tensors(vae), path)
    elif layout == "diffusers_file":
        save_file(vae.state_dict(), path)
    else:
        path = tmp_path / "vae"
        vae.save_pretrained(path)
    check_vae_file(path)
    loaded = load_vae(path, torch.float32, "cpu")
    assert {name: sizes[name] for name in sizes} == {name: loaded.model.config[name] for name in sizes}
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    with torch.no_grad():
        mode = vae.encode(pixels[:, :, None]).latent_dist.mode()
        decoded = vae.decode(mode).sample[:, :, 0]
    latents = (mode - channel_values(MEAN)) / channel_values(STD)
    torch.testing.assert_close(loaded.encode(pixels), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded.decode(latents), decoded, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory, tiny_vae):
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(original_tensors(tiny_vae), path)
    return path


@pytest.mark.parametrize("scale", [1.0, 1e-8, 0.0])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_norm_in_one_pass_is_diffusers(scale, dtype, bound):
    norm = QwenImageRMS_norm(12, images=False).to(dtype)
    torch.nn.init.normal_(norm.gamma)
    x = scale * torch.randn(2, 12, 1, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(_FlatNorm(norm)(x), norm(x), rtol=bound, atol=bound)


def test_latents_of_a_picture(tiny_file, pixels):
    vae = load_vae(tiny_file, torch.float32, "cpu")
    latents = vae.encode(pixels)
    assert latents.shape == (2, 16, 1, 4, 6)
    assert (vae.latent_channels, vae.spatial_factor) == (16, 8)
    assert vae.decode(latents).shape == pixels.shape
    # A batch is nothing but its pictures.
    torch.testing.assert_close(vae.encode(pixels[1:]), latents[1:], rtol=1e-5, atol=1e-5)


def test_decoded_pixels_are_clamped(tiny_file):
    decoded = load_vae(tiny_file, torch.float32, "cpu").decode(torch.full((1, 16, 1, 2, 2), 50.0))
    assert decoded.abs().max() == 1


def test_bfloat16_vae_returns_float32_latents(tiny_file, pixels):
    vae = load_vae(tiny_file, torch.bfloat16, "cpu")
    assert {parameter.dtype for parameter in vae.model.parameters()} == {torch.bfloat16}
    latents = vae.encode(pixels)
    exact = load_vae(tiny_file, torch.float32, "cpu").encode(pixels)
    assert latents.dtype == torch.float32
    assert (latents - exact).norm() / exact.norm() < 0.03
    assert vae.decode(latents).dtype == torch.float32


@pytest.mark.parametrize("change", ["missing", "unknown", "misshaped"])
def test_tensors_that_do_not_fit_are_named(tmp_path, tiny_vae, change):
    tensors = original_tensors(tiny_vae)
    name = "decoder.head.2.weight"
    if change == "missing":
        del tensors[name]
    elif change == "unknown":
        tensors["decoder.head.7.weight"] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(3, 8, 3, 3, 1)
    path = tmp_path / "vae.safetensors"
    save_file(tensors, path)
    with pytest.raises(ModelFileError, match=r"decoder\.(head\.[27]|conv_out)\.weight"):
        check_vae_file(path)
    with pytest.raises(ModelFileError, match=r"decoder\.(head\.[27]|conv_out)\.weight"):
        load_vae(path, torch.float32, "cpu")


def test_wrong_files_say_what_they_look_like(tmp_path, tiny_vae):
    path = tmp_path / "wrong.safetensors"
    save_file(
        {"model.layers.0.mlp.gate_proj.weight": torch.zeros(1), "layers.0.self_attn.q_norm.w": torch.zeros(1)}, path
    )
    with pytest.raises(ModelFileError, match="looks like a Qwen3 language model"):
        check_vae_file(path)
    save_file(original_tensors(random_vae({"base_dim": 4, "z_dim": 48})), path)
    with pytest.raises(ModelFileError, match="48 latent channels; Anima's has 16"):
        check_vae_file(path)
    with pytest.raises(ModelFileError, match=r"diffusion_pytorch_model\.safetensors is missing"):
        check_vae_file(tmp_path)
