"""The tiny model against independent statements about the real files."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from diffusers import AnimaTextConditioner, CosmosTransformer3DModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3Model, T5TokenizerFast

from tools.make_tiny_anima import make_tiny_anima

CAPTIONS = ("subject, blue circle, black background", "1girl, a  café ﬁlm", "", "(night:1.2)\nsky", "狐 fox")

# The official checkpoint's names, with the real sizes as letters: Width, Head, Mlp, adaln Rank, Context, adapter
# head (A), adapter mlp (D), Vocabulary.
OFFICIAL_TENSORS = {
    r"x_embedder\.proj\.1\.weight": "W 68",
    r"t_embedder\.1\.linear_1\.weight": "W W",
    r"t_embedder\.1\.linear_2\.weight": "3W W",
    r"t_embedding_norm\.weight": "W",
    r"blocks\.\d+\.self_attn\.(q_proj|k_proj|v_proj|output_proj)\.weight": "W W",
    r"blocks\.\d+\.(self|cross)_attn\.(q_norm|k_norm)\.weight": "H",
    r"blocks\.\d+\.cross_attn\.(q_proj|output_proj)\.weight": "W W",
    r"blocks\.\d+\.cross_attn\.(k_proj|v_proj)\.weight": "W C",
    r"blocks\.\d+\.mlp\.layer1\.weight": "M W",
    r"blocks\.\d+\.mlp\.layer2\.weight": "W M",
    r"blocks\.\d+\.adaln_modulation_(self_attn|cross_attn|mlp)\.1\.weight": "R W",
    r"blocks\.\d+\.adaln_modulation_(self_attn|cross_attn|mlp)\.2\.weight": "3W R",
    r"final_layer\.linear\.weight": "64 W",
    r"final_layer\.adaln_modulation\.1\.weight": "R W",
    r"final_layer\.adaln_modulation\.2\.weight": "2W R",
    r"llm_adapter\.embed\.weight": "V C",
    r"llm_adapter\.blocks\.\d+\.(norm_self_attn|norm_cross_attn|norm_mlp)\.weight": "C",
    r"llm_adapter\.blocks\.\d+\.(self_attn|cross_attn)\.(q_proj|k_proj|v_proj|o_proj)\.weight": "C C",
    r"llm_adapter\.blocks\.\d+\.(self_attn|cross_attn)\.(q_norm|k_norm)\.weight": "A",
    r"llm_adapter\.blocks\.\d+\.mlp\.0\.weight": "D C",
    r"llm_adapter\.blocks\.\d+\.mlp\.0\.bias": "D",
    r"llm_adapter\.blocks\.\d+\.mlp\.2\.weight": "C D",
    r"llm_adapter\.blocks\.\d+\.mlp\.2\.bias": "C",
    r"llm_adapter\.out_proj\.weight": "C C",
    r"llm_adapter\.(out_proj\.bias|norm\.weight)": "C",
}
TINY_SIZES = {"W": 64, "H": 32, "M": 256, "R": 16, "C": 32, "A": 16, "D": 128, "V": 256}


def shape_of(letters: str) -> tuple[int, ...]:
    """ "3W R" -> (3 x 64, 16)"""
    return tuple(
        int(side.rstrip("WHMRCADV") or 1) * TINY_SIZES.get(side.lstrip("0123456789"), 1) for side in letters.split()
    )


def hashes(folder: Path) -> dict[str, str]:
    """Of what was made there; other tests train on it, and may leave a cache."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".anima_cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_writes_the_same_bytes(tiny_anima, tmp_path):
    """Through the command line, in another process and another folder, so that no path or hash seed gets in."""
    script = Path(__file__).parents[2] / "tools" / "make_tiny_anima.py"
    again = tmp_path / "a folder"
    command = [sys.executable, str(script), "--output_dir", str(again), "--pictures", "4", "--seed", "0"]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert hashes(again) == hashes(tiny_anima)
    assert sorted(hashes(again)) == [
        "anima.safetensors",
        "qwen3.safetensors",
        "qwen3/config.json",
        "qwen3/model.safetensors",
        "qwen3/tokenizer.json",
        "qwen3/tokenizer_config.json",
        "qwen_image_vae.safetensors",
        "sample_prompts.txt",
        "t5/config.json",
        "t5/spiece.model",
        "t5/tokenizer.json",
        *(f"train/10_subject/00{number}.{ending}" for number in range(1, 5) for ending in ("png", "txt")),
    ]


def test_another_seed_changes_weights_and_pictures_but_no_tokenizer(tiny_anima, tmp_path):
    make_tiny_anima(tmp_path, pictures=5, seed=1)
    ours, other = hashes(tiny_anima), hashes(tmp_path)
    same = {name for name in ours if ours[name] == other[name]}
    assert same == {
        "qwen3/config.json",
        "qwen3/tokenizer.json",
        "qwen3/tokenizer_config.json",
        "sample_prompts.txt",
        "t5/config.json",
        "t5/spiece.model",
        "t5/tokenizer.json",
    }
    assert len(list((tmp_path / "train" / "10_subject").glob("*.png"))) == 5


def test_transformer_has_the_official_names_and_shapes(tiny_anima):
    tensors = load_file(tiny_anima / "anima.safetensors")
    # 28 blocks of 20 tensors, 6 of the adapter's of 19 and 11 others make the official 685.
    assert 28 * 20 + 6 * 19 + 11 == 685
    assert len(tensors) == 2 * 20 + 2 * 19 + 11
    for name, tensor in tensors.items():
        (letters,) = [
            letters for pattern, letters in OFFICIAL_TENSORS.items() if re.fullmatch(r"net\." + pattern, name)
        ]
        assert tuple(tensor.shape) == shape_of(letters), name
        assert tensor.dtype == torch.bfloat16


def test_diffusers_has_as_many_parameters_at_these_sizes(tiny_anima):
    tensors = load_file(tiny_anima / "anima.safetensors")
    with torch.device("meta"):
        transformer = CosmosTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=2,
            attention_head_dim=32,
            num_layers=2,
            mlp_ratio=4.0,
            text_embed_dim=32,
            adaln_lora_dim=16,
            patch_size=(1, 2, 2),
            concat_padding_mask=True,
            extra_pos_embed_type=None,
        )
        conditioner = AnimaTextConditioner(
            source_dim=32, target_dim=32, model_dim=32, num_layers=2, num_attention_heads=2, target_vocab_size=256
        )
    for module, is_part in (
        (transformer, lambda name: "llm_adapter" not in name),
        (conditioner, lambda name: "llm_adapter" in name),
    ):
        ours = sorted(tuple(tensor.shape) for name, tensor in tensors.items() if is_part(name))
        assert ours == sorted(tuple(tensor.shape) for tensor in module.state_dict().values())


def test_every_weight_is_random_and_near_its_scale(tiny_anima):
    for file in ("anima", "qwen_image_vae", "qwen3"):
        for name, tensor in load_file(tiny_anima / f"{file}.safetensors").items():
            values, fan_in = tensor.float(), tensor[0].numel()
            assert torch.isfinite(values).all()
            if name.endswith(".bias"):
                assert 0 < values.abs().max() < 0.1, name
            elif fan_in == 1:
                assert 0.8 < values.mean() < 1.2, name
            else:
                assert values.std().item() == pytest.approx(fan_in**-0.5, rel=0.2), name


def test_vae_has_the_original_layout(tiny_anima):
    tensors = load_file(tiny_anima / "qwen_image_vae.safetensors")
    assert len(tensors) == 194
    spelling = (
        r"(conv1|conv2)\.(weight|bias)"
        r"|(encoder|decoder)\.conv1\.(weight|bias)"
        r"|(encoder|decoder)\.head\.(0\.gamma|2\.weight|2\.bias)"
        r"|(encoder\.downsamples|decoder\.upsamples|encoder\.middle|decoder\.middle)\.\d+\."
        r"(residual\.[03]\.gamma|residual\.[26]\.(weight|bias)|shortcut\.(weight|bias)"
        r"|norm\.gamma|(to_qkv|proj|resample\.1|time_conv)\.(weight|bias))"
    )
    assert [name for name in tensors if not re.fullmatch(spelling, name)] == []
    assert tensors["encoder.conv1.weight"].shape == (8, 3, 3, 3, 3)
    assert tensors["conv1.weight"].shape == (32, 32, 1, 1, 1)
    assert tensors["decoder.upsamples.7.resample.1.weight"].shape == (16, 32, 3, 3)
    assert tensors["decoder.head.2.weight"].shape == (3, 8, 3, 3, 3)


def test_transformers_loads_qwen3_and_both_layouts_agree(tiny_anima):
    model, report = Qwen3Model.from_pretrained(tiny_anima / "qwen3", local_files_only=True, output_loading_info=True)
    assert not any(report.values()), report
    directory = load_file(tiny_anima / "qwen3" / "model.safetensors")
    single = load_file(tiny_anima / "qwen3.safetensors")
    assert set(single) == {f"model.{name}" for name in directory}
    assert all(torch.equal(single[f"model.{name}"], tensor) for name, tensor in directory.items())
    assert model.config.rope_parameters["rope_theta"] == 1_000_000
    assert model.config.num_attention_heads == 2 * model.config.num_key_value_heads

    tokenizer = AutoTokenizer.from_pretrained(tiny_anima / "qwen3", local_files_only=True)
    assert tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer) <= model.config.vocab_size
    for caption in CAPTIONS:
        ids = tokenizer(caption).input_ids
        assert tokenizer.pad_token_id not in ids
        assert tokenizer.decode(ids) == caption
    states = model(**tokenizer(CAPTIONS[0], return_tensors="pt")).last_hidden_state
    assert states.shape == (1, len(tokenizer(CAPTIONS[0]).input_ids), 32)
    assert 0.5 < states.float().std() < 2


def test_t5_tokenizer_is_sentencepiece_with_t5_ids(tiny_anima):
    tokenizer = T5TokenizerFast.from_pretrained(tiny_anima / "t5", local_files_only=True)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tiny_anima / "t5" / "spiece.model"))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert (pieces.pad_id(), pieces.eos_id(), pieces.unk_id(), pieces.bos_id()) == (0, 1, 2, -1)
    for caption in CAPTIONS:
        assert tokenizer(caption).input_ids == [*pieces.encode(caption), 1]
    assert tokenizer.convert_tokens_to_ids(["<extra_id_99>", "<extra_id_0>"]) == [
        pieces.vocab_size(),
        len(tokenizer) - 1,
    ]
    assert len(tokenizer) <= load_file(tiny_anima / "anima.safetensors")["net.llm_adapter.embed.weight"].shape[0]


def test_pictures_show_what_their_captions_say(tiny_anima):
    colours = {"blue": (33, 97, 214), "black": (30, 30, 30), "red": (214, 48, 49), "orange": (230, 126, 34)}
    colours |= {"purple": (142, 68, 173), "white": (245, 245, 245), "green": (46, 160, 67), "yellow": (244, 208, 63)}
    folder = tiny_anima / "train" / "10_subject"
    sizes = set()
    for picture_file in sorted(folder.glob("*.png")):
        caption = picture_file.with_suffix(".txt").read_text(encoding="utf-8")
        subject, background = re.fullmatch(
            r"subject, (\w+) (?:circle|square|triangle|figure), (\w+) background, simple, flat color\n", caption
        ).groups()
        picture = Image.open(picture_file)
        sizes.add(picture.size)
        assert {colour for _, colour in picture.getcolors()} == {colours[subject], colours[background]}
        assert picture.getpixel((0, 0)) == colours[background]
    assert sizes == {(160, 160), (192, 128), (128, 192), (256, 96)}
