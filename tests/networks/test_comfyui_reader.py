"""ComfyUI's rules: sound files have no problem, each planted fault is named, strengths are as ComfyUI computes them."""

import re

import pytest
import torch

from networks.comfyui_reader import check_comfyui_reads, read_as_comfyui
from networks.key_formats import write_keys

Q, K, NORM, BIASED, TEXT = (
    "blocks.0.self_attn.q_proj",
    "blocks.0.cross_attn.k_proj",
    "blocks.0.self_attn.q_norm",
    "llm_adapter.out_proj",
    "text_encoder.layers.0.self_attn.q_proj",
)
SHAPES = {Q: (6, 6), K: (6, 4), NORM: (3,), BIASED: (4, 4), TEXT: (8, 4)}


def lora(path, rank=2, alpha=1.0):
    out, in_ = SHAPES[path]
    return {
        "lora_down.weight": torch.ones(rank, in_),
        "lora_up.weight": torch.ones(out, rank),
        "alpha": torch.tensor(alpha),
    }


def sound():
    return {
        Q: {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(3, 3), "alpha": torch.tensor(1.0)},
        K: {**lora(K), "dora_scale": torch.ones(6, 1)},
        NORM: {"w_norm": torch.zeros(3)},
        BIASED: {"diff": torch.zeros(4, 4), "diff_b": torch.zeros(4)},
        TEXT: lora(TEXT, alpha=4.0),
    }


@pytest.mark.parametrize("file_format", ["comfy", "kohya"])
def test_a_sound_file_is_read_whole_at_its_strength(file_format):
    adapters = sound()
    adapters[BIASED] = lora(BIASED, rank=4, alpha=2.0)
    reading = read_as_comfyui(write_keys(adapters, file_format), SHAPES)
    assert reading.problems == []
    found = {parameter: (patch.kind, patch.strength) for parameter, patch in reading.patches.items()}
    assert found == {
        f"{Q}.weight": ("lokr", 1.0),
        f"{K}.weight": ("lora", 0.5),
        f"{NORM}.weight": ("w_norm", 1.0),
        f"{BIASED}.weight": ("lora", 0.5),
        f"{TEXT}.weight": ("lora", 2.0),
    }


def test_biases_are_parameters_of_their_own():
    reading = read_as_comfyui(write_keys({BIASED: sound()[BIASED]}, "comfy"), SHAPES)
    assert (reading.problems, set(reading.patches)) == ([], {f"{BIASED}.weight", f"{BIASED}.bias"})


def test_lora_a_and_b_without_alpha_have_a_strength_of_one():
    own = lora(Q)
    tensors = {f"diffusion_model.{Q}.lora_A.weight": own["lora_down.weight"]}
    tensors[f"diffusion_model.{Q}.lora_B.weight"] = own["lora_up.weight"]
    reading = read_as_comfyui(tensors, SHAPES)
    assert (reading.problems, reading.patches[f"{Q}.weight"].strength) == ([], 1.0)


@pytest.mark.parametrize(
    ("own", "strength"),
    [
        ({"lokr_w1": (2, 2), "lokr_w2_a": (3, 5), "lokr_w2_b": (5, 3)}, 2.0),
        ({"lokr_w1_a": (2, 4), "lokr_w1_b": (4, 2), "lokr_w2": (3, 3)}, 2.5),
        ({"lokr_w1_a": (2, 4), "lokr_w1_b": (4, 2), "lokr_w2_a": (3, 5), "lokr_w2_b": (5, 3)}, 2.0),
        ({"hada_w1_a": (6, 5), "hada_w1_b": (5, 6), "hada_w2_a": (6, 5), "hada_w2_b": (5, 6)}, 2.0),
    ],
)
def test_alpha_is_divided_by_the_rank_of_the_second_factor_or_else_of_the_first(own, strength):
    tensors = {f"diffusion_model.{Q}.{suffix}": torch.ones(shape) for suffix, shape in own.items()}
    tensors[f"diffusion_model.{Q}.alpha"] = torch.tensor(10.0)
    reading = read_as_comfyui(tensors, SHAPES)
    assert (reading.problems, reading.patches[f"{Q}.weight"].strength) == ([], strength)


def planted(**changes):
    """The sound file with keys replaced, added, or (None) taken out."""
    tensors = {**write_keys(sound(), "comfy"), **changes}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


def two_spellings():
    return {f"lora_unet_blocks_0_cross_attn_k_proj.{suffix}": tensor for suffix, tensor in lora(K).items()}


def wrong_loha():
    shapes = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 5)}
    own = {f"diffusion_model.{BIASED}.{suffix}": torch.ones(shape) for suffix, shape in shapes.items()}
    return {**own, f"diffusion_model.{BIASED}.diff": None}


FAULTS = {
    "a wrong LoHa": (wrong_loha(), "the weight has"),
    "a foreign prefix": ({f"lycoris_{Q}.alpha": torch.tensor(1.0)}, "reads no such key"),
    "checkpoint names": ({f"net.{Q}.lora_up.weight": torch.ones(6, 2)}, "reads no such key"),
    "another depth": ({"diffusion_model.blocks.1.self_attn.q_proj.diff": torch.ones(6, 6)}, "reads no such key"),
    "a suffix it has not": ({f"diffusion_model.{K}.scalar": torch.ones(1)}, "reads no such key"),
    "an old text encoder name": ({f"{TEXT}.diff": torch.ones(8, 4)}, "reads no such key"),
    "lora_te1": ({"lora_te1_layers_0_self_attn_q_proj.diff": torch.ones(8, 4)}, "reads no such key"),
    "half a LoRA": ({f"diffusion_model.{K}.lora_up.weight": None}, "belongs to nothing"),
    "alpha of a norm": ({f"diffusion_model.{NORM}.alpha": torch.tensor(1.0)}, "alpha: not read"),
    "two spellings": (two_spellings(), f"both change {K}.weight"),
    "two types": ({f"diffusion_model.{K}.diff": torch.ones(6, 4)}, f"both change {K}.weight"),
    "a wrong LoRA": ({f"diffusion_model.{K}.lora_up.weight": torch.ones(5, 2)}, r"shape \[5, 4\]"),
    "a wrong rank": ({f"diffusion_model.{K}.lora_up.weight": torch.ones(6, 3)}, "the weight has"),
    "a wrong LoKr": ({f"diffusion_model.{Q}.lokr_w2": torch.ones(3, 2)}, r"shape \[6, 4\]"),
    "a 1-D LoKr": ({f"diffusion_model.{Q}.lokr_w2": torch.ones(3)}, "the weight has"),
    "a wrong norm": ({f"diffusion_model.{NORM}.w_norm": torch.ones(1, 3)}, r"shape \[1, 3\]"),
    "alpha in fp16": ({f"diffusion_model.{K}.alpha": torch.tensor(1.0, dtype=torch.float16)}, "float16"),
    "alpha of one dimension": ({f"diffusion_model.{K}.alpha": torch.tensor([1.0])}, r"shape \[1\]"),
    "alpha 100000": ({f"diffusion_model.{Q}.alpha": torch.tensor(1e5)}, "100000.0 stands for no strength"),
    "alpha inf": ({f"diffusion_model.{Q}.alpha": torch.tensor(float("inf"))}, "inf stands for no strength"),
    "alpha of whole matrices": ({f"diffusion_model.{Q}.alpha": torch.tensor(4.0)}, "differs by version"),
    "DoRA over inputs": ({f"diffusion_model.{K}.dora_scale": torch.ones(1, 4)}, r"dora_scale: shape \[1, 4\]"),
    "a bias that is none": ({f"diffusion_model.{NORM}.b_norm": torch.ones(3)}, "no such bias"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_the_one_thing_named(fault):
    changes, message = FAULTS[fault]
    assert check_comfyui_reads(planted(), SHAPES) == []
    problems = check_comfyui_reads(planted(**changes), SHAPES)
    assert problems and all(re.search(message, problem) for problem in problems)
