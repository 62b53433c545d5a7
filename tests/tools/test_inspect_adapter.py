"""What the inspection tells of adapter files, and when it calls them unhealthy."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from tools.inspect_adapter import main

FIRST, SECOND = "blocks.0.mlp.layer1", "blocks.1.mlp.layer1"


def lora(seed=0, scale=1.0, rank=2):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, 6, generator=generator), scale * torch.randn(8, rank, generator=generator)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}


def product(tensors):
    return tensors["alpha"] / len(tensors["lora_down.weight"]) * tensors["lora_up.weight"] @ tensors["lora_down.weight"]


def write(file, adapters, metadata=None, prefix="diffusion_model."):
    tensors = {
        f"{prefix}{path}.{suffix}": tensor.clone() for path, own in adapters.items() for suffix, tensor in own.items()
    }
    save_file(tensors, file, metadata)
    return file


@pytest.fixture
def file(tmp_path):
    return tmp_path / "a.safetensors"


def inspect(capsys, *files):
    """The exit code and what --json tells."""
    code = main([*map(str, files), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_sound_file_is_told_in_numbers(file, capsys):
    lokr = {"lokr_w1": torch.ones(2, 2), "lokr_w2": 2 * torch.ones(4, 3), "alpha": torch.tensor(2.0)}
    norm = {"w_norm": torch.tensor([3.0, 4.0])}
    write(file, {FIRST: lora(), SECOND: lokr, "llm_adapter.norm": norm}, {"ss_network_dim": "2"})
    code, told = inspect(capsys, file)
    report = told["files"][0]
    assert code == 0 and told["comparison"] is None and report["problems"] == []
    assert (report["format"], report["dtypes"], report["metadata"]) == ("ComfyUI", ["F32"], {"ss_network_dim": "2"})
    modules = report["modules"]
    assert modules[FIRST]["norm"] == pytest.approx(float(product(lora()).norm()), rel=1e-5)
    assert (modules[FIRST]["strength"], modules[FIRST]["alpha"], modules[FIRST]["shape"]) == (0.5, 1.0, [8, 6])
    assert modules[SECOND]["norm"] == pytest.approx(math.sqrt(4 * 12 * 4)) and modules[SECOND]["strength"] == 1.0
    assert modules["llm_adapter.norm"]["strength"] is None and modules["llm_adapter.norm"]["norm"] == pytest.approx(5.0)
    types = report["types"]
    assert (types[FIRST]["kind"], types[FIRST]["rank"]) == ("lora", 2)
    assert (types[SECOND]["factor"], types[SECOND]["full_matrix"]) == (2, True)


def test_the_text_shows_targets_blocks_strengths_and_metadata(file, capsys):
    ones = {"lora_down.weight": torch.ones(1, 4), "lora_up.weight": torch.ones(4, 1), "alpha": torch.tensor(1.0)}
    strong = {**ones, "lora_up.weight": 2 * torch.ones(4, 1)}
    adapters = {f"blocks.{i}.mlp.layer{j}": ones for i in (0, 1, 2) for j in (1, 2)}
    adapters |= {"blocks.4.mlp.layer1": strong, "llm_adapter.blocks.0.self_attn.q_proj": ones}
    adapters |= {"t_embedder.1.linear_1": ones, "t_embedding_norm": {"w_norm": torch.tensor([3.0, 4.0])}}
    write(file, adapters, {"ss_output_name": "mine", "ss_tag_frequency": "long", "modelspec.title": "x" * 200})
    assert main([str(file)]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith(f"{file} (0.0 MiB, F32, names as ComfyUI)")
    for line in (
        "holds: 9 lora (rank 1), 1 norm",
        "strength (alpha / rank): 1 in 9 modules",
        "t_embedder.1.linear_1",
        "transformer blocks 0-2: mlp.(layer1 layer2)",
        "transformer blocks 4: mlp.(layer1)",
        "llm_adapter blocks 0: self_attn.(q_proj)",
        f"transformer 0             5.657  {'#' * 28}",  # √(4² + 4²), against 8
        f"transformer 4                 8  {'#' * 40}",
        f"transformer outside           4  {'#' * 20}",
        f"4 to 8                        8  {'#' * 40}",
        f"8 to 16                       1  {'#' * 5}",
        "norm weights: 1, together changed by 5",
        "ss_output_name: mine",
        f"modelspec.title: {'x' * 97}...",
        "1 more with --json",
        "problems: none",
    ):
        assert line in lines


def alphas(value):
    return {**lora(), "alpha": torch.tensor(value)}


BAD = {
    "NaN or infinity": {FIRST: {**lora(), "lora_up.weight": torch.full((8, 2), math.nan)}},
    "which is no whole adapter": {FIRST: lora(), SECOND: {"lora_down.weight": torch.ones(2, 6)}},
    "tensors of lokr and lora at once": {FIRST: {**lora(), "lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(4, 3)}},
    "all modules are zero": {FIRST: lora(scale=0.0), "t_embedding_norm": {"w_norm": torch.zeros(4)}},
    "belongs to no module of Anima": {FIRST: lora(), "blocks.0.mlp.layer7": lora()},
    "stands for no strength": {FIRST: alphas(math.inf)},
    "one number is expected": {FIRST: alphas([1.0, 2.0]), SECOND: lora()},
    "the strength differs by version": {
        FIRST: {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(4, 3), "alpha": torch.tensor(7.0)}
    },
    "the model has no such bias": {FIRST: {"diff_b": torch.ones(8)}},
}


@pytest.mark.parametrize("problem", BAD)
def test_an_unhealthy_file_is_told_by_exit_code_and_problem(file, capsys, problem):
    write(file, BAD[problem])
    code, told = inspect(capsys, file)
    assert code == 1
    assert any(problem in line for line in told["files"][0]["problems"])
    assert main([str(file)]) == 1
    assert problem in capsys.readouterr().out


def test_some_zero_modules_are_told_and_are_no_problem(file, capsys):
    write(file, {FIRST: lora(), SECOND: lora(scale=0.0)})
    assert main([str(file)]) == 0
    assert f"zero, changing nothing: 1 modules: {SECOND}" in capsys.readouterr().out


@pytest.mark.parametrize(("prefix", "code"), [("lora_unet_", 0), ("transformer.", 1), ("lycoris_", 1)])
def test_spellings_that_comfyui_skips_are_a_problem_with_a_cure(file, capsys, prefix, code):
    path = FIRST.replace(".", "_") if prefix.endswith("_") else FIRST
    write(file, {path: lora()}, prefix=prefix)
    found, told = inspect(capsys, file)
    problems = told["files"][0]["problems"]
    assert found == code and told["files"][0]["modules"].keys() == {FIRST}
    assert [problem.partition(":")[0] for problem in problems] == ["ComfyUI reads none of the keys"] * code


def test_half_precision_alphas_are_no_problem(file, capsys):
    write(file, {FIRST: {**lora(), "alpha": torch.tensor([1.0], dtype=torch.bfloat16)}})
    code, told = inspect(capsys, file)
    assert code == 0 and told["files"][0]["modules"][FIRST]["strength"] == 0.5


def test_float8_files_are_read(file, capsys):
    own = {suffix: tensor.to(torch.float8_e4m3fn) for suffix, tensor in lora().items()}
    write(file, {FIRST: own})
    code, told = inspect(capsys, file)
    expected = product({suffix: tensor.float() for suffix, tensor in own.items()}).norm()
    assert code == 0 and told["files"][0]["modules"][FIRST]["norm"] == pytest.approx(float(expected), rel=1e-5)


def test_dora_is_told_with_what_its_norms_are(file, capsys):
    write(file, {FIRST: {**lora(), "dora_scale": torch.ones(8, 1)}})
    assert main([str(file)]) == 0
    assert "DoRA: its change depends on the base model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.layers.0.mlp.gate_proj.weight": torch.ones(2, 2)}, "1 of 1 keys belong to no module"),
        ({f"diffusion_model.{FIRST}.oft_blocks": torch.ones(2, 2)}, "OFT"),
    ],
)
def test_what_is_no_adapter_is_an_error(file, capsys, tensors, message):
    save_file(tensors, file)
    assert main([str(file)]) == 1
    error = capsys.readouterr().err
    assert message in error and str(file) in error


def test_a_missing_file_is_an_error(file, capsys):
    assert main([str(file)]) == 1
    assert f"{file} is missing" in capsys.readouterr().err


def test_two_files_are_compared_by_their_deltas(file, tmp_path, capsys):
    other = tmp_path / "b.safetensors"
    dora = {**lora(), "dora_scale": torch.ones(8, 1)}
    write(other, {FIRST: lora(1), SECOND: lora(3, 2.0), "blocks.2.mlp.layer1": dora, "blocks.3.mlp.layer1": lora(4)})
    write(file, {FIRST: lora(1), SECOND: lora(2), "blocks.2.mlp.layer1": dora, "llm_adapter.blocks.0.mlp.0": lora(5)})
    code, told = inspect(capsys, file, other)
    comparison = told["comparison"]
    assert code == 0
    assert comparison["only_first"] == ["llm_adapter.blocks.0.mlp.0"]
    assert comparison["only_second"] == ["blocks.3.mlp.layer1"]
    assert comparison["incomparable"] == ["blocks.2.mlp.layer1"]
    same, ours, theirs = product(lora(1)), product(lora(2)), product(lora(3, 2.0))
    expected = float((ours - theirs).norm() / max(ours.norm(), theirs.norm()))
    assert comparison["differing"] == {SECOND: pytest.approx(expected, rel=1e-5)}
    first, second = torch.stack([same, ours]).flatten(), torch.stack([same, theirs]).flatten()
    part = comparison["parts"]["transformer"]
    assert part["cosine"] == pytest.approx(float(torch.cosine_similarity(first, second, dim=0)), abs=1e-5)
    assert part["norm_ratio"] == pytest.approx(float(second.norm() / first.norm()), rel=1e-5)
    assert part["modules"] == 2 and comparison["parts"].keys() == {"transformer"}
    assert main([str(file), str(other)]) == 0
    assert f"differ (by more than 1e-05 of the longer): 1 modules: {SECOND}" in capsys.readouterr().out


def test_one_adapter_in_two_spellings_and_ranks_is_the_same(file, tmp_path, capsys):
    """Twice the rank with half of each: other tensors, the same delta."""
    own = lora(1)
    doubled = {
        "lora_down.weight": own["lora_down.weight"].repeat(2, 1),
        "lora_up.weight": own["lora_up.weight"].repeat(1, 2),
        "alpha": own["alpha"],
    }
    other = write(tmp_path / "b.safetensors", {FIRST.replace(".", "_"): doubled}, prefix="lora_unet_")
    write(file, {FIRST: own})
    code, told = inspect(capsys, file, other)
    assert code == 0 and told["comparison"]["differing"] == {}
    part = told["comparison"]["parts"]["transformer"]
    assert (part["cosine"], part["norm_ratio"]) == (pytest.approx(1.0, abs=1e-6), pytest.approx(1.0, abs=1e-6))
