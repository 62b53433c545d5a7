"""Every spelling people bring, spelled out; round trips between the formats; what is refused."""

import json
import math

import pytest
import torch

from library.errors import ModelFileError, SettingError
from networks.key_formats import parse_keys, resolve_norm_values, write_keys
from networks.module_names import module_names

NAMES = {depth: module_names(depth) for depth in (2, 28, 40)}
Q = "blocks.1.self_attn.q_proj"


GENERATOR = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def lora(alpha=3.0, rank=2, out=6, in_=4, names=("lora_down.weight", "lora_up.weight")):
    tensors = {names[0]: random(rank, in_), names[1]: random(out, rank)}
    return tensors if alpha is None else {**tensors, "alpha": torch.tensor(alpha)}


def loha():
    factors = {"hada_w1_a": random(6, 2), "hada_w1_b": random(2, 4), "hada_w2_a": random(6, 2)}
    return {**factors, "hada_w2_b": random(2, 4), "alpha": torch.tensor(5.0)}


def lokr(w1_low=False, w2_low=False, alpha=5.0):
    w1 = {"lokr_w1_a": random(2, 1), "lokr_w1_b": random(1, 2)} if w1_low else {"lokr_w1": random(2, 2)}
    w2 = {"lokr_w2_a": random(12, 3), "lokr_w2_b": random(3, 8)} if w2_low else {"lokr_w2": random(12, 8)}
    return {**w1, **w2, "alpha": torch.tensor(alpha)}


def delta(own):
    """What one module's tensors add to its weight, by the plain formulas, in float64."""
    own = {suffix: tensor.double() for suffix, tensor in own.items()}
    alpha = own.get("alpha")
    if "lora_down.weight" in own:
        rank = own["lora_down.weight"].shape[0]
        return own["lora_up.weight"] @ own["lora_down.weight"] * (1 if alpha is None else alpha / rank)
    if "hada_w1_a" in own:
        first, second = own["hada_w1_a"] @ own["hada_w1_b"], own["hada_w2_a"] @ own["hada_w2_b"]
        return first * second * alpha / own["hada_w1_b"].shape[0]
    if "w_norm" in own or "diff" in own:
        return own.get("w_norm", own.get("diff"))
    w1 = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    w2 = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
    low = [own[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in own]
    return torch.kron(w1, w2) * (alpha / low[0] if low else 1)


def assert_same_deltas(got, wanted, tolerance=0.0):
    assert got.keys() == wanted.keys()
    for path in wanted:
        assert (delta(got[path]) - delta(wanted[path])).norm() <= tolerance * delta(wanted[path]).norm()


# module as the file spells it -> its path, and whose spelling it is
SPELLINGS = [
    ("diffusion_model.blocks.1.self_attn.output_proj", "blocks.1.self_attn.output_proj", "ComfyUI"),
    ("diffusion_model.blocks.1.adaln_modulation_cross_attn.2", "blocks.1.adaln_modulation_cross_attn.2", "ComfyUI"),
    ("diffusion_model.llm_adapter.blocks.0.mlp.2", "llm_adapter.blocks.0.mlp.2", "ComfyUI"),
    ("text_encoders.qwen3_06b.transformer.model.layers.3.mlp.up_proj", "text_encoder.layers.3.mlp.up_proj", "ComfyUI"),
    ("lora_unet_blocks_1_self_attn_output_proj", "blocks.1.self_attn.output_proj", "Kohya"),
    ("lora_unet_blocks_1_adaln_modulation_self_attn_1", "blocks.1.adaln_modulation_self_attn.1", "Kohya"),
    ("lora_unet_t_embedder_1_linear_1", "t_embedder.1.linear_1", "Kohya"),
    ("lora_unet_x_embedder_proj_1", "x_embedder.proj.1", "Kohya"),
    ("lora_unet_final_layer_adaln_modulation_2", "final_layer.adaln_modulation.2", "Kohya"),
    ("lora_unet_llm_adapter_out_proj", "llm_adapter.out_proj", "Kohya"),
    ("lora_unet_llm_adapter_blocks_5_cross_attn_o_proj", "llm_adapter.blocks.5.cross_attn.o_proj", "Kohya"),
    ("lora_te_layers_27_self_attn_o_proj", "text_encoder.layers.27.self_attn.o_proj", "Kohya"),
    ("lora_te_model_layers_2_mlp_gate_proj", "text_encoder.layers.2.mlp.gate_proj", "Kohya"),
    ("lora_te1_layers_2_mlp_gate_proj", "text_encoder.layers.2.mlp.gate_proj", "Kohya"),
    ("lora_te1_model_layers_2_mlp_gate_proj", "text_encoder.layers.2.mlp.gate_proj", "Kohya"),
    ("lycoris_blocks_0_mlp_layer1", "blocks.0.mlp.layer1", "LyCORIS"),
    ("lycoris_llm_adapter_blocks_2_mlp_0", "llm_adapter.blocks.2.mlp.0", "LyCORIS"),
    ("base_model.model.blocks.0.cross_attn.k_proj", "blocks.0.cross_attn.k_proj", "PEFT"),
    ("base_model.model.transformer_blocks.0.attn2.to_k", "blocks.0.cross_attn.k_proj", "PEFT"),
    ("base_model.model.net.blocks.0.mlp.layer2", "blocks.0.mlp.layer2", "PEFT"),
    ("base_model.model.layers.4.self_attn.v_proj", "text_encoder.layers.4.self_attn.v_proj", "PEFT"),
    ("transformer.transformer_blocks.1.attn1.to_out.0", "blocks.1.self_attn.output_proj", "diffusers"),
    ("transformer.transformer_blocks.1.ff.net.0.proj", "blocks.1.mlp.layer1", "diffusers"),
    ("transformer.transformer_blocks.1.norm3.linear_2", "blocks.1.adaln_modulation_mlp.2", "diffusers"),
    ("transformer.time_embed.t_embedder.linear_2", "t_embedder.1.linear_2", "diffusers"),
    ("transformer.patch_embed.proj", "x_embedder.proj.1", "diffusers"),
    ("transformer.norm_out.linear_1", "final_layer.adaln_modulation.1", "diffusers"),
    ("transformer.proj_out", "final_layer.linear", "diffusers"),
    ("text_conditioner.blocks.1.self_attn.q_proj", "llm_adapter.blocks.1.self_attn.q_proj", "diffusers"),
    ("text_conditioner.out_proj", "llm_adapter.out_proj", "diffusers"),
    ("text_encoder.layers.0.mlp.down_proj", "text_encoder.layers.0.mlp.down_proj", "diffusers"),
    ("text_encoder.model.layers.0.mlp.down_proj", "text_encoder.layers.0.mlp.down_proj", "diffusers"),
    ("net.blocks.1.mlp.layer1", "blocks.1.mlp.layer1", "checkpoint names"),
    ("blocks.1.mlp.layer1", "blocks.1.mlp.layer1", "bare names"),
    ("transformer_blocks.1.attn1.to_v", "blocks.1.self_attn.v_proj", "bare names"),
    ("lora_unet_transformer_blocks_1_attn1_to_out_0", "blocks.1.self_attn.output_proj", "Kohya"),
]


@pytest.mark.parametrize("depth", [2, 28, 40])
@pytest.mark.parametrize(("spelling", "path", "spelled_by"), SPELLINGS)
def test_every_writers_module_names_are_read(depth, spelling, path, spelled_by):
    own = lora(alpha=3.0)
    parsed = parse_keys({f"{spelling}.{suffix}": tensor for suffix, tensor in own.items()}, {}, NAMES[depth])
    assert (list(parsed.adapters), parsed.unused, parsed.format) == ([path], (), spelled_by)
    assert_same_deltas(parsed.adapters, {path: own})


@pytest.mark.parametrize("depth", [28, 40])
def test_the_last_block_is_read_at_its_depth_and_no_further(depth):
    tensors = {f"lora_unet_blocks_{i}_mlp_layer1.{s}": t for i in (depth - 1, depth) for s, t in lora().items()}
    parsed = parse_keys(tensors, {}, NAMES[depth])
    assert list(parsed.adapters) == [f"blocks.{depth - 1}.mlp.layer1"]
    assert parsed.unused == tuple(f"lora_unet_blocks_{depth}_mlp_layer1.{suffix}" for suffix in lora())


@pytest.mark.parametrize(
    "names",
    [
        ("lora_down.weight", "lora_up.weight"),
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora.down.weight", "lora.up.weight"),
    ],
)
def test_every_pair_of_low_rank_suffixes_is_read_and_no_alpha_means_a_strength_of_one(names):
    own = lora(alpha=None, names=names)
    (read,) = parse_keys({f"diffusion_model.{Q}.{s}": t for s, t in own.items()}, {}, NAMES[2]).adapters.values()
    torch.testing.assert_close(delta(read), own[names[1]].double() @ own[names[0]].double())
    assert read["alpha"].item() == 2.0


@pytest.mark.parametrize(
    "own",
    [loha(), lokr(), lokr(w2_low=True), lokr(w1_low=True), lokr(True, True), {"w_norm": random(6)}],
    ids=["loha", "whole", "w2", "w1", "both", "norm"],
)
@pytest.mark.parametrize(
    "prefix", ["diffusion_model.blocks.1.cross_attn.q_norm", "lora_unet_blocks_1_cross_attn_q_norm"]
)
def test_all_types_are_read_in_dots_and_underscores(own, prefix):
    parsed = parse_keys({f"{prefix}.{suffix}": tensor for suffix, tensor in own.items()}, {}, NAMES[2])
    assert_same_deltas(parsed.adapters, {"blocks.1.cross_attn.q_norm": own})


@pytest.mark.parametrize("alpha", [1.0, 4.0, 100_000.0, math.inf])
def test_alpha_of_whole_matrices_means_nothing_and_becomes_the_ratio_of_rows(alpha):
    tensors = {f"diffusion_model.{Q}.{suffix}": tensor for suffix, tensor in lokr(alpha=alpha).items()}
    assert parse_keys(tensors, {}, NAMES[2]).adapters[Q]["alpha"].item() == 6.0
    written = write_keys({Q: lokr(alpha=alpha)}, "comfy")[f"diffusion_model.{Q}.alpha"]
    assert (written.item(), written.dtype, written.ndim) == (6.0, torch.float32, 0)


def test_alpha_becomes_float32_of_no_dimension():
    own = {**lora(), "alpha": torch.tensor([3.0], dtype=torch.float16)}
    for tensors in (parse_keys({f"{Q}.{s}": t for s, t in own.items()}, {}, NAMES[2]).adapters[Q], own):
        written = write_keys({Q: tensors}, "kohya")["lora_unet_blocks_1_self_attn_q_proj.alpha"]
        assert (written.item(), written.dtype, written.ndim) == (3.0, torch.float32, 0)


@pytest.mark.parametrize(("low_rank", "rank"), [((False, True), 3.0), ((True, False), 1.0), ((True, True), 3.0)])
def test_lokr_without_alpha_has_a_strength_of_one(low_rank, rank):
    own = lokr(*low_rank)
    tensors = {f"diffusion_model.{Q}.{suffix}": tensor for suffix, tensor in own.items() if suffix != "alpha"}
    assert parse_keys(tensors, {}, NAMES[2]).adapters[Q]["alpha"].item() == rank


# --- PEFT's and diffusers' alphas ---


def test_diffusers_alphas_are_in_the_header():
    spellings = {
        "transformer.transformer_blocks.0.attn1.to_q": 8.0,
        "transformer.transformer_blocks.0.ff.net.2": 5.0,
        "text_conditioner.blocks.0.mlp.0": 6.0 * math.sqrt(2),
    }
    header = {
        "transformer.r": 2, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"ff.net.2": 5},
        "text_conditioner.r": 2, "text_conditioner.lora_alpha": 6, "text_conditioner.use_rslora": True,
    }  # fmt: skip
    tensors = {
        f"{name}.{s}": t for name in spellings for s, t in lora(None, names=("lora_A.weight", "lora_B.weight")).items()
    }
    adapters = parse_keys(tensors, {"lora_adapter_metadata": json.dumps(header)}, NAMES[2]).adapters
    assert [own["alpha"].item() for own in adapters.values()] == pytest.approx(list(spellings.values()))


def test_a_single_diffusers_model_has_bare_names_in_keys_and_header():
    header = {"r": 2, "lora_alpha": 8, "alpha_pattern": {"ff.net.2": 5}}
    names = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2")
    tensors = {
        f"{name}.{s}": t for name in names for s, t in lora(None, names=("lora_A.weight", "lora_B.weight")).items()
    }
    adapters = parse_keys(tensors, {"lora_adapter_metadata": json.dumps(header)}, NAMES[2]).adapters
    assert [own["alpha"].item() for own in adapters.values()] == [8.0, 5.0]


def test_pefts_alphas_are_in_its_config():
    config = {"r": 2, "lora_alpha": 8, "alpha_pattern": {r"blocks\.1\.mlp\.layer\d": 3}, "use_rslora": False}
    names = ("blocks.0.mlp.layer1", "blocks.1.mlp.layer2", "llm_adapter.blocks.1.mlp.0")
    tensors = {f"base_model.model.{name}.{s}": t for name in names for s, t in lora(alpha=None).items()}
    adapters = parse_keys(tensors, {}, NAMES[2], config).adapters
    assert [own["alpha"].item() for own in adapters.values()] == [8.0, 3.0, 8.0]


def test_an_alpha_key_comes_before_the_config_and_comfyuis_names_before_both():
    config = {"lora_alpha": 8}
    for prefix, alpha in (("base_model.model.", 3.0), ("diffusion_model.", None)):
        tensors = {f"{prefix}{Q}.{suffix}": tensor for suffix, tensor in lora(alpha).items()}
        assert parse_keys(tensors, {}, NAMES[2], config).adapters[Q]["alpha"].item() == (alpha or 2.0)


def test_a_broken_header_is_an_error():
    tensors = {f"transformer.{Q}.{suffix}": tensor for suffix, tensor in lora(alpha=None).items()}
    with pytest.raises(ModelFileError, match="lora_adapter_metadata is not JSON"):
        parse_keys(tensors, {"lora_adapter_metadata": "{"}, NAMES[2])


# --- the older own form ---


def test_absolute_norm_values_become_differences_from_the_base():
    base = {"t_embedding_norm": random(6), "llm_adapter.norm": random(4)}
    change = {path: random(*weight.shape) for path, weight in base.items()}
    tensors = {f"__anima_norm__.{path}.weight": base[path] + change[path] for path in base}
    parsed = parse_keys(tensors, {}, NAMES[2])
    with pytest.raises(ModelFileError, match=r"t_embedding_norm.*base model is needed"):
        write_keys(parsed.adapters, "comfy")
    resolved = resolve_norm_values(parsed.adapters, base.__getitem__)
    assert list(resolved) == list(base)
    for path, own in resolved.items():
        assert list(own) == ["w_norm"]
        torch.testing.assert_close(own["w_norm"], change[path], rtol=0, atol=1e-6)


# --- round trips ---

OPT_IN = (
    *("x_embedder.proj.1", "t_embedder.1.linear_1", "t_embedder.1.linear_2", "final_layer.linear"),
    *("final_layer.adaln_modulation.1", "llm_adapter.out_proj", "llm_adapter.embed"),
)


def all_types(depth):
    adapters = {path: lora(alpha=float(i)) for i, path in enumerate(OPT_IN, start=1)}
    for i in range(depth):
        adapters[f"blocks.{i}.self_attn.q_proj"] = lora(alpha=0.3)
        adapters[f"blocks.{i}.adaln_modulation_mlp.2"] = lokr(w2_low=True)
        adapters[f"blocks.{i}.mlp.layer1"] = lokr()
        adapters[f"blocks.{i}.mlp.layer2"] = lokr(True, True)
        adapters[f"blocks.{i}.cross_attn.v_proj"] = loha()
        adapters[f"blocks.{i}.cross_attn.k_norm"] = {"w_norm": random(3)}
        adapters[f"blocks.{i}.cross_attn.k_proj"] = {"diff": random(3, 3)}
    adapters["llm_adapter.blocks.5.mlp.0"] = lokr(w1_low=True)
    adapters["llm_adapter.blocks.5.norm_self_attn"] = {"w_norm": random(3)}
    adapters["text_encoder.layers.0.self_attn.o_proj"] = lora(alpha=1.0)
    adapters["text_encoder.layers.27.mlp.down_proj"] = lokr()
    return adapters


@pytest.mark.parametrize("depth", [2, 28, 40])
def test_going_from_format_to_format_changes_no_delta(depth):
    adapters = start = all_types(depth)
    for file_format in ("comfy", "kohya", "comfy"):
        parsed = parse_keys(write_keys(adapters, file_format), {}, NAMES[depth])
        assert not parsed.unused
        adapters = parsed.adapters
        assert_same_deltas(adapters, start)


@pytest.mark.parametrize("depth", [2, 28, 40])
def test_lora_goes_through_diffusers_and_back(depth):
    paths = (*OPT_IN, *(f"blocks.{i}.{part}" for i in range(depth) for part in ("mlp.layer1", "self_attn.v_proj")))
    start = {path: lora(alpha=0.7 + i) for i, path in enumerate(paths)}
    written = write_keys(start, "diffusers")
    suffixes = {"lora_A.weight", "lora_B.weight"}
    assert set(written) == {f"diffusion_model.{path}.{suffix}" for path in paths for suffix in suffixes}
    read = parse_keys(written, {}, NAMES[depth]).adapters
    assert_same_deltas(read, start, tolerance=1e-7)
    assert_same_deltas(parse_keys(write_keys(read, "kohya"), {}, NAMES[depth]).adapters, read)


def test_the_strength_is_multiplied_in_float32_whatever_the_files_precision():
    own = {suffix: tensor.bfloat16() for suffix, tensor in lora(alpha=0.3, rank=2).items()}
    written = write_keys({Q: own}, "diffusers")[f"diffusion_model.{Q}.lora_B.weight"]
    expected = own["lora_up.weight"].double() * own["alpha"].double() / 2
    torch.testing.assert_close(written.double(), expected, rtol=1e-6, atol=0)


def test_the_formats_names_are_these():
    adapters = {
        Q: lora(),
        "blocks.1.self_attn.q_norm": {"w_norm": random(3)},
        "text_encoder.layers.0.mlp.up_proj": lora(),
    }
    suffixes = ("lora_down.weight", "lora_up.weight", "alpha")
    comfy, text = f"diffusion_model.{Q}", "text_encoders.qwen3_06b.transformer.model.layers.0.mlp.up_proj"
    assert set(write_keys(adapters, "comfy")) == {
        *(f"{name}.{suffix}" for name in (comfy, text) for suffix in suffixes),
        "diffusion_model.blocks.1.self_attn.q_norm.w_norm",
    }
    assert set(write_keys(adapters, "kohya")) == {
        *(f"lora_unet_blocks_1_self_attn_q_proj.{suffix}" for suffix in suffixes),
        *(f"lora_te_layers_0_mlp_up_proj.{suffix}" for suffix in suffixes),
        "lora_unet_blocks_1_self_attn_q_norm.w_norm",
    }


# --- what is refused ---


@pytest.mark.parametrize(
    ("path", "own", "cure"),
    [
        ("t_embedding_norm", {"w_norm": random(3)}, "--no-train_norm"),
        (Q, lokr(), "networks.lora_anima"),
        (Q, loha(), "networks.lora_anima"),
        (Q, {"diff": random(6, 4)}, "full differences"),
        (Q, {**lora(), "dora_scale": random(6, 1)}, "without DoRA"),
        ("text_encoder.layers.0.mlp.up_proj", lora(), "text-encoder"),
    ],
)
def test_what_diffusers_cannot_hold_is_an_error_with_the_cure(path, own, cure):
    with pytest.raises(SettingError, match=cure) as error:
        write_keys({"blocks.0.mlp.layer1": lora(), path: own}, "diffusers")
    assert path in str(error.value)


def test_an_unknown_format_is_an_error():
    with pytest.raises(SettingError, match="comfy, kohya, diffusers"):
        write_keys({Q: lora()}, "lycoris")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (f"diffusion_model.{Q}", "lora_unet_blocks_1_self_attn_q_proj"),
        (f"diffusion_model.{Q}", "transformer.transformer_blocks.1.attn1.to_q"),
    ],
)
def test_two_spellings_of_one_module_are_named(first, second):
    tensors = {f"{name}.{suffix}": tensor for name in (first, second) for suffix, tensor in lora().items()}
    with pytest.raises(ModelFileError) as error:
        parse_keys(tensors, {}, NAMES[2])
    assert first in str(error.value) and f"{second}." in str(error.value)


def test_two_spellings_of_one_tensor_are_named():
    tensors = {f"{Q}.{s}": t for s, t in {**lora(), **lora(None, names=("lora_A.weight", "lora_B.weight"))}.items()}
    with pytest.raises(ModelFileError, match=rf"{Q}.lora_down.weight and {Q}.lora_A.weight"):
        parse_keys(tensors, {}, NAMES[2])


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("oft_R.weight", "OFT"),
        ("oft_blocks", "OFT"),
        ("lokr_t2", "Tucker"),
        ("lora_mid.weight", "Tucker"),
        ("lora_magnitude_vector", "PEFT's DoRA"),
        ("scalar", "LyCORIS' trained scalar"),
    ],
)
def test_types_no_reader_of_anima_has_are_refused_by_name(suffix, message):
    tensors = {f"lora_unet_blocks_1_self_attn_q_proj.{s}": t for s, t in {**lora(), suffix: random(2, 2)}.items()}
    with pytest.raises(ModelFileError, match=message) as error:
        parse_keys(tensors, {}, NAMES[2])
    assert f"lora_unet_blocks_1_self_attn_q_proj.{suffix}" in str(error.value)
