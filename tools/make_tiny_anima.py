"""Writes a tiny, random Anima of the real architecture, in the layouts of the real files, with drawn pictures.

    python tools/make_tiny_anima.py --output_dir DIR [--pictures N] [--seed S] [--real_size]

It knows nothing but trains in seconds on a CPU: for a first try of the trainer, and for the tests. With --real_size the
transformer, Qwen3 and VAE have the sizes of the real ones (6 GB of files), to measure speed and memory with.
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
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3Model
from transformers.utils import logging as transformers_logging

from library.anima_runtime.vae import original_vae_names
from library.console import show
from library.randomness import torch_generator
from tools.anima_shapes import REAL, TINY, Shapes, Sizes, transformer_shapes
from tools.tiny_pictures import draw_training_set
from tools.tiny_tokenizers import rounded_vocabulary, write_qwen_tokenizer, write_t5_tokenizer

SAMPLE_PROMPTS = """\
# One picture a line: prompt --w width --h height --d seed --s steps --l cfg --n negative prompt
subject, red circle, blue background, simple, flat color --w 128 --h 128 --d 1 --s 8 --l 4
"""


def make_tiny_anima(output_dir: Path, pictures: int = 4, seed: int = 0, sizes: Sizes = TINY) -> None:
    """Writes the model files, the training pictures and, last, sample_prompts.txt into `output_dir`.

    The same seed writes the same bytes in one environment. Files of these names are replaced, others left alone.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    t5_tokens = write_t5_tokenizer(output_dir / "t5")
    vocabulary = max(rounded_vocabulary(t5_tokens), sizes.least_t5_vocabulary)
    transformer = random_weights(transformer_shapes(sizes, vocabulary), seed, "transformer")
    _save(transformer, output_dir / "anima.safetensors", prefix="net.")
    _save(random_weights(vae_shapes(sizes), seed, "vae"), output_dir / "qwen_image_vae.safetensors")
    _write_qwen3(output_dir, sizes, seed)
    draw_training_set(output_dir / "train" / "10_subject", pictures, seed)
    (output_dir / "sample_prompts.txt").write_text(SAMPLE_PROMPTS, encoding="utf-8")


def vae_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The VAE's tensors under their original names: every block of the real one, at the given width."""
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(base_dim=sizes.vae_width)
    names = original_vae_names(vae)
    return {names[name]: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}


def _write_qwen3(output_dir: Path, sizes: Sizes, seed: int) -> None:
    """Writes qwen3/ (Hugging Face layout with the tokenizer) and the same tensors as ComfyUI's single file."""
    config = qwen3_config(sizes, write_qwen_tokenizer(output_dir / "qwen3"))
    with torch.device("meta"):
        model = Qwen3Model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = random_weights(shapes, seed, "qwen3")
    config.save_pretrained(output_dir / "qwen3")
    _save(weights, output_dir / "qwen3" / "model.safetensors")
    _save(weights, output_dir / "qwen3.safetensors", prefix="model.")


def qwen3_config(sizes: Sizes, tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    """Qwen3 of the given sizes, with rows for at least the tokenizer's tokens."""
    return Qwen3Config(
        vocab_size=max(rounded_vocabulary(len(tokenizer)), sizes.least_qwen_vocabulary),
        hidden_size=sizes.context,
        num_hidden_layers=sizes.qwen_depth,
        num_attention_heads=sizes.qwen_heads,
        num_key_value_heads=sizes.qwen_kv_heads,
        head_dim=sizes.qwen_head,
        intermediate_size=sizes.qwen_mlp,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.pad_token_id,
        dtype=torch.bfloat16,
        architectures=["Qwen3Model"],
    )


def random_weights(shapes: Shapes, seed: int, model: str) -> dict[str, torch.Tensor]:
    """Weights of a scale that keeps activations near 1: matrices N(0, 1/fan_in), norms about 1, biases about 0.

    They are bfloat16, the number format of the distributed files.
    """
    return {name: _random_weight(name, shape, seed, model).bfloat16() for name, shape in shapes.items()}


def _random_weight(name: str, shape: tuple[int, ...], seed: int, model: str) -> torch.Tensor:
    noise = torch.randn(shape, generator=torch_generator(seed, "tiny anima", model, name))
    fan_in = math.prod(shape[1:])
    if name.endswith(".bias"):
        return 0.02 * noise
    if fan_in == 1:
        return 1 + 0.1 * noise
    return noise / math.sqrt(fan_in)


def _save(weights: Mapping[str, torch.Tensor], path: Path, prefix: str = "") -> None:
    """Saves as they are, with a prefix to their names."""
    save_file({prefix + name: weight for name, weight in weights.items()}, path, metadata={"format": "pt"})


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Write a tiny random Anima and drawn training pictures.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder to write into.")
    parser.add_argument("--pictures", type=int, default=4, help="How many training pictures to draw (default 4).")
    parser.add_argument("--seed", type=int, default=0, help="The same seed writes the same bytes (default 0).")
    parser.add_argument("--real_size", action="store_true", help="The sizes of the real models, 6 GB of files.")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    sizes = REAL if arguments.real_size else TINY
    make_tiny_anima(arguments.output_dir, arguments.pictures, arguments.seed, sizes)
    folder = arguments.output_dir.resolve()
    show(f"An Anima of random weights, its tokenizers and {arguments.pictures} pictures are in {folder}")


if __name__ == "__main__":
    main()
