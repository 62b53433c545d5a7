"""Writes a tiny, random Anima of the real architecture, in the layouts of the real files, with drawn pictures.

    python tools/make_tiny_anima.py --output_dir DIR [--pictures N] [--seed S]

It knows nothing but trains in seconds on a CPU: for a first try of the trainer, and for the tests.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3Model
from transformers.utils import logging as transformers_logging

from library.anima_runtime.vae import original_vae_names
from library.console import show
from library.randomness import torch_generator
from tools.tiny_pictures import draw_training_set
from tools.tiny_tokenizers import rounded_vocabulary, write_qwen_tokenizer, write_t5_tokenizer

WIDTH, HEAD, DEPTH, MLP, ADALN_RANK = 64, 32, 2, 256, 16
CONTEXT, ADAPTER_HEAD, ADAPTER_DEPTH, ADAPTER_MLP = 32, 16, 2, 128
LATENT_CHANNELS, PATCH_AREA = 16, 4

SAMPLE_PROMPTS = """\
# One picture a line: prompt --w width --h height --d seed --s steps --l cfg --n negative prompt
subject, red circle, blue background, simple, flat color --w 128 --h 128 --d 1 --s 8 --l 4
"""

Shapes = Mapping[str, tuple[int, ...]]


def make_tiny_anima(output_dir: Path, pictures: int = 4, seed: int = 0) -> None:
    """Writes the model files, the training pictures and, last, sample_prompts.txt into `output_dir`.

    The same seed writes the same bytes in one environment. Files of these names are replaced, others left alone.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    t5_tokens = write_t5_tokenizer(output_dir / "t5")
    transformer = random_weights(transformer_shapes(rounded_vocabulary(t5_tokens)), seed, "transformer")
    _save(transformer, output_dir / "anima.safetensors", prefix="net.")
    _save(random_weights(vae_shapes(), seed, "vae"), output_dir / "qwen_image_vae.safetensors")
    _write_qwen3(output_dir, seed)
    draw_training_set(output_dir / "train" / "10_subject", pictures, seed)
    (output_dir / "sample_prompts.txt").write_text(SAMPLE_PROMPTS, encoding="utf-8")


def transformer_shapes(t5_vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Anima's tensors: the official checkpoint's names with the sizes above."""
    shapes = {
        "x_embedder.proj.1.weight": (WIDTH, (LATENT_CHANNELS + 1) * PATCH_AREA),
        "t_embedder.1.linear_1.weight": (WIDTH, WIDTH),
        "t_embedder.1.linear_2.weight": (3 * WIDTH, WIDTH),
        "t_embedding_norm.weight": (WIDTH,),
        "final_layer.linear.weight": (LATENT_CHANNELS * PATCH_AREA, WIDTH),
        "final_layer.adaln_modulation.1.weight": (ADALN_RANK, WIDTH),
        "final_layer.adaln_modulation.2.weight": (2 * WIDTH, ADALN_RANK),
        "llm_adapter.embed.weight": (t5_vocabulary, CONTEXT),
        "llm_adapter.out_proj.weight": (CONTEXT, CONTEXT),
        "llm_adapter.out_proj.bias": (CONTEXT,),
        "llm_adapter.norm.weight": (CONTEXT,),
    }
    for index in range(DEPTH):
        shapes.update({f"blocks.{index}.{name}": shape for name, shape in _block_shapes().items()})
    for index in range(ADAPTER_DEPTH):
        shapes.update({f"llm_adapter.blocks.{index}.{name}": shape for name, shape in _adapter_block_shapes().items()})
    return shapes


def _block_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {"mlp.layer1.weight": (MLP, WIDTH), "mlp.layer2.weight": (WIDTH, MLP)}
    for attention, source in (("self_attn", WIDTH), ("cross_attn", CONTEXT)):
        shapes |= {f"{attention}.{name}.weight": (WIDTH, WIDTH) for name in ("q_proj", "output_proj")}
        shapes |= {f"{attention}.{name}.weight": (WIDTH, source) for name in ("k_proj", "v_proj")}
        shapes |= {f"{attention}.{name}.weight": (HEAD,) for name in ("q_norm", "k_norm")}
    for branch in ("self_attn", "cross_attn", "mlp"):
        shapes[f"adaln_modulation_{branch}.1.weight"] = (ADALN_RANK, WIDTH)
        shapes[f"adaln_modulation_{branch}.2.weight"] = (3 * WIDTH, ADALN_RANK)
    return shapes


def _adapter_block_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.weight": (CONTEXT,) for name in ("norm_self_attn", "norm_cross_attn", "norm_mlp")}
    for attention in ("self_attn", "cross_attn"):
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        shapes |= {f"{attention}.{name}.weight": (CONTEXT, CONTEXT) for name in names}
        shapes |= {f"{attention}.{name}.weight": (ADAPTER_HEAD,) for name in ("q_norm", "k_norm")}
    shapes |= {"mlp.0.weight": (ADAPTER_MLP, CONTEXT), "mlp.0.bias": (ADAPTER_MLP,)}
    shapes |= {"mlp.2.weight": (CONTEXT, ADAPTER_MLP), "mlp.2.bias": (CONTEXT,)}
    return shapes


def vae_shapes() -> dict[str, tuple[int, ...]]:
    """The VAE's tensors under their original names: every block of the real one, at width 8 instead of 96."""
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(base_dim=8)
    names = original_vae_names(vae)
    return {names[name]: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}


def _write_qwen3(output_dir: Path, seed: int) -> None:
    """Writes qwen3/ (Hugging Face layout with the tokenizer) and the same tensors as ComfyUI's single file."""
    tokenizer = write_qwen_tokenizer(output_dir / "qwen3")
    config = Qwen3Config(
        vocab_size=rounded_vocabulary(len(tokenizer)),
        hidden_size=CONTEXT,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=96,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.pad_token_id,
        dtype=torch.bfloat16,
        architectures=["Qwen3Model"],
    )
    with torch.device("meta"):
        model = Qwen3Model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = random_weights(shapes, seed, "qwen3")
    config.save_pretrained(output_dir / "qwen3")
    _save(weights, output_dir / "qwen3" / "model.safetensors")
    _save(weights, output_dir / "qwen3.safetensors", prefix="model.")


def random_weights(shapes: Shapes, seed: int, model: str) -> dict[str, torch.Tensor]:
    """Weights of a scale that keeps activations near 1: matrices N(0, 1/fan_in), norms about 1, biases about 0."""
    return {name: _random_weight(name, shape, seed, model) for name, shape in shapes.items()}


def _random_weight(name: str, shape: tuple[int, ...], seed: int, model: str) -> torch.Tensor:
    noise = torch.randn(shape, generator=torch_generator(seed, "tiny anima", model, name))
    fan_in = math.prod(shape[1:])
    if name.endswith(".bias"):
        return 0.02 * noise
    if fan_in == 1:
        return 1 + 0.1 * noise
    return noise / math.sqrt(fan_in)


def _save(weights: Mapping[str, torch.Tensor], path: Path, prefix: str = "") -> None:
    """Saves as bfloat16, the number format of the distributed files."""
    tensors = {prefix + name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Write a tiny random Anima and drawn training pictures.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder to write into.")
    parser.add_argument("--pictures", type=int, default=4, help="How many training pictures to draw (default 4).")
    parser.add_argument("--seed", type=int, default=0, help="The same seed writes the same bytes (default 0).")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    make_tiny_anima(arguments.output_dir, arguments.pictures, arguments.seed)
    show(f"A tiny Anima, its tokenizers and {arguments.pictures} pictures are in {arguments.output_dir.resolve()}")


if __name__ == "__main__":
    main()
