"""Resizing adapter files, against dense singular value decompositions."""

import json
import math

import pytest
import torch
from lycoris.functional import loha as lycoris_loha
from lycoris.functional import lokr as lycoris_lokr
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from networks.comfyui_reader import read_as_comfyui
from tools.resize_adapter import main

Q, K, MLP, NORM = (
    "blocks.0.self_attn.q_proj",
    "blocks.1.cross_attn.k_proj",
    "llm_adapter.blocks.0.mlp.0",
    "t_embedding_norm",
)
SHAPES = {Q: (24, 24), K: (24, 16), MLP: (32, 12), NORM: (5,)}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


def lora(path, rank, alpha, **more):
    out_features, in_features = SHAPES[path]
    return {
        "lora_down.weight": random(rank, in_features),
        "lora_up.weight": random(out_features, rank, seed=1),
        "alpha": torch.tensor(float(alpha)),
        **more,
    }


@pytest.fixture
def resize(tmp_path, capsys):
    """Writes {path: {suffix: tensor}}, runs the tool, gives {path: {suffix: tensor}} and what was printed."""
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"

    def run(adapters, *arguments, metadata=None):
        keys = {f"diffusion_model.{path}.{suffix}": t for path, own in adapters.items() for suffix, t in own.items()}
        save_file({key: tensor.contiguous() for key, tensor in keys.items()}, source, metadata)
        code = main(["--input", str(source), "--output", str(target), *arguments])
        printed = capsys.readouterr()
        if code:
            assert not target.exists()
            return code, printed.err
        written = load_file(target)
        assert read_as_comfyui(written, SHAPES).problems == []
        resized = {}
        for key, tensor in written.items():
            path = next(path for path in adapters if key.startswith(f"diffusion_model.{path}."))
            resized.setdefault(path, {})[key.removeprefix(f"diffusion_model.{path}.")] = tensor
        return resized, printed.out

    run.target = target
    return run


def lora_delta(own):
    down = own["lora_down.weight"].double()
    return float(own["alpha"]) / len(down) * own["lora_up.weight"].double() @ down


def lokr_delta(own):
    factors = [own[key].double() if key in own else None for key in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")]
    return lycoris_lokr.diff_weight(*factors, None, gamma=float(own["alpha"]))


def best(matrix, rank):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def assert_close(found, expected, tolerance=1e-6):
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_lora_becomes_the_best_approximation_and_the_error_is_its_tail(resize, rank):
    own = lora(Q, 8, alpha=4.0)
    resized, printed = resize({Q: own}, "--rank", str(rank))
    assert resized[Q]["lora_down.weight"].shape == (rank, 24)
    assert float(resized[Q]["alpha"]) == rank / 2
    assert_close(lora_delta(resized[Q]), best(lora_delta(own), rank))
    values = torch.linalg.svdvals(lora_delta(own))
    error = float(values[rank:].norm() / values.norm())
    assert f"transformer: 1 modules, rank 8 -> rank {rank}, relative error {100 * error:.2f} %" in printed


def test_lora_of_less_true_rank_loses_nothing(resize):
    own = lora(Q, 8, alpha=8.0)
    own["lora_up.weight"][:, 4:] = own["lora_up.weight"][:, :4]
    resized, printed = resize({Q: own}, "--rank", "4")
    assert_close(lora_delta(resized[Q]), lora_delta(own))
    assert "relative error 0.00 %" in printed


def test_the_same_rank_changes_no_bit(resize):
    adapters = {Q: lora(Q, 8, alpha=3.0), K: lora(K, 2, alpha=3.0)}
    resized, printed = resize(adapters, "--rank", "8")
    assert all(torch.equal(resized[path][key], own[key]) for path, own in adapters.items() for key in own)
    assert "rank 2 to 8, relative error 0.00 %" in printed


def test_energy_chooses_each_modules_rank(resize):
    """Squared singular values 64, 16, 4, 1 of one module, equal ones of the other."""
    eye = torch.eye(24)
    uneven = {"lora_down.weight": eye[:4], "lora_up.weight": eye[:, :4] * torch.tensor([8.0, 4.0, 2.0, 1.0])}
    even = {"lora_down.weight": torch.eye(16)[:4], "lora_up.weight": eye[:, :4]}
    resized, printed = resize({Q: uneven, K: even}, "--energy", "0.9")
    ranks = {path: len(own["lora_down.weight"]) for path, own in resized.items()}
    assert ranks == {Q: 2, K: 4}
    assert f"at most {100 * math.sqrt(5 / 85):.2f} % ({Q})" in printed
    error = math.sqrt(5 / (85 + 4))
    assert f"rank 4 -> rank 2 to 4, relative error {100 * error:.2f} %" in printed


def test_the_rank_bounds_the_energy(resize):
    resized, _ = resize({Q: lora(Q, 8, alpha=8)}, "--energy", "0.999", "--rank", "3")
    assert len(resized[Q]["lora_down.weight"]) == 3


@pytest.mark.parametrize(
    ("sizes", "alpha", "scale"),
    [
        ({"w1": (3, 2), "w2": (8, 12)}, 2.0, 1.0),
        ({"w1": (3, 2), "w2_a": (8, 6), "w2_b": (6, 12)}, 3.0, 0.5),
        ({"w1_a": (3, 2), "w1_b": (2, 2), "w2_a": (8, 6), "w2_b": (6, 12)}, 3.0, 0.5),
        ({"w1_a": (3, 4), "w1_b": (4, 2), "w2": (8, 12)}, 3.0, 0.75),
    ],
)
def test_lokr_loses_ranks_of_its_second_factor(resize, sizes, alpha, scale):
    own = {f"lokr_{name}": random(*shape, seed=len(name)) for name, shape in sizes.items()}
    own["alpha"] = torch.tensor(alpha)
    resized, printed = resize({Q: own}, "--rank", "3")
    new = {key.removeprefix("lokr_"): tensor.double() for key, tensor in resized[Q].items()}
    assert (new["w2_a"].shape, new["w2_b"].shape) == ((8, 3), (3, 12)) and float(new["alpha"]) == 3 * scale
    old = {name: own[f"lokr_{name}"].double() for name in sizes}
    w1 = old["w1"] if "w1" in old else old["w1_a"] @ old["w1_b"]
    w2 = old["w2"] if "w2" in old else old["w2_a"] @ old["w2_b"]
    delta = scale * torch.kron(w1, w2)
    assert_close(lokr_delta(new), scale * torch.kron(w1, best(w2, 3)))
    error = float((lokr_delta(new) - delta).norm() / delta.norm())
    assert f"relative error {100 * error:.2f} %" in printed


def test_a_whole_factor_stays_where_two_would_hold_more(resize):
    """4 · (8 + 12) = 80 numbers are less than 8 · 12, 5 · (8 + 12) are not."""
    own = {"lokr_w1": random(3, 2), "lokr_w2": random(8, 12), "alpha": torch.tensor(2.0)}
    resized, printed = resize({Q: own}, "--rank", "5")
    assert all(torch.equal(resized[Q][key], own[key]) for key in own)
    assert "transformer: 1 modules, whole matrices, relative error 0.00 %" in printed


@pytest.mark.parametrize("sizes", [{"w1": (3, 2), "w2": (8, 12)}, {"w1": (3, 2), "w2_a": (8, 6), "w2_b": (6, 12)}])
def test_lokr_becomes_the_best_lora(resize, sizes):
    own = {f"lokr_{name}": random(*shape, seed=len(name)) for name, shape in sizes.items()}
    own["alpha"] = torch.tensor(2.0)
    resized, _ = resize({Q: own}, "--rank", "5", "--type", "lora")
    delta = lokr_delta({key.removeprefix("lokr_"): tensor for key, tensor in own.items()})
    delta = delta if "w2" not in sizes else torch.kron(own["lokr_w1"].double(), own["lokr_w2"].double())
    assert_close(lora_delta(resized[Q]), best(delta, 5))


@pytest.mark.parametrize("rank", [2, 6])
def test_loha_becomes_the_best_lora(resize, rank):
    """Rank 6 of 24: the product of two of rank 6 has full rank."""
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    own = {name: random(*((24, rank) if name[-1] == "a" else (rank, 24)), seed=ord(name[6])) for name in names}
    own["alpha"] = torch.tensor(3.0)
    resized, _ = resize({Q: own}, "--rank", "4", "--type", "lora")
    w1_a, w1_b, w2_a, w2_b = (own[name].double() for name in names)
    delta = lycoris_loha.diff_weight(w1_b, w1_a, w2_b, w2_a, None, None, gamma=torch.tensor(3.0 / rank))
    assert_close(lora_delta(resized[Q]), best(delta, 4))


def test_full_differences_of_matrices_become_lora(resize):
    difference = random(*SHAPES[K])
    resized, _ = resize({K: {"diff": difference}, NORM: {"diff": random(5)}}, "--rank", "4", "--type", "lora")
    assert_close(lora_delta(resized[K]), best(difference.double(), 4))
    assert torch.equal(resized[NORM]["diff"], random(5))


@pytest.mark.parametrize("kind", ["same", "lora"])
def test_norms_and_dora_scales_go_over_unchanged(resize, kind):
    adapters = {MLP: lora(MLP, 4, alpha=1, dora_scale=random(32, 1)), NORM: {"w_norm": random(5)}}
    resized, printed = resize(adapters, "--rank", "2", "--type", kind)
    assert torch.equal(resized[MLP]["dora_scale"], adapters[MLP]["dora_scale"])
    assert torch.equal(resized[NORM]["w_norm"], adapters[NORM]["w_norm"])
    assert "llm_adapter: 1 modules, rank 4 -> rank 2" in printed and "1 modules carried over" in printed


@pytest.mark.parametrize(("precision", "dtype"), [(None, torch.bfloat16), ("float", torch.float32)])
def test_new_factors_have_the_old_number_format_unless_told(resize, precision, dtype):
    own = {key: tensor if key == "alpha" else tensor.bfloat16() for key, tensor in lora(Q, 4, alpha=2).items()}
    resized, _ = resize({Q: own}, "--rank", "2", *(["--precision", precision] if precision else []))
    assert {key: tensor.dtype for key, tensor in resized[Q].items()} == {
        "lora_down.weight": dtype,
        "lora_up.weight": dtype,
        "alpha": torch.float32,
    }
    assert_close(lora_delta(resized[Q]), best(lora_delta(own), 2), 1e-6 if precision else 1e-2)


def test_the_metadata_tells_the_new_rank(resize):
    old = {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_steps": "7", "sshs_model_hash": "a" * 64}
    resize({Q: lora(Q, 4, alpha=2)}, "--rank", "2", metadata=old)
    with safe_open(resize.target, framework="pt") as file:
        metadata = file.metadata()
    told = {key: metadata[key] for key in ("ss_network_dim", "ss_network_alpha", "ss_steps")}
    assert told == {"ss_network_dim": "2", "ss_network_alpha": "1.0", "ss_steps": "7"}
    assert json.loads(metadata["ss_anima_resized"])["rank"] == 2
    assert metadata["sshs_model_hash"] != "a" * 64 and "ss_network_module" not in metadata


LOHA = {name: torch.ones((24, 2) if name[-1] == "a" else (2, 24)) for name in ("hada_w1_a", "hada_w1_b")}
LOHA |= {name.replace("w1", "w2"): tensor.clone() for name, tensor in LOHA.items()}


@pytest.mark.parametrize(
    ("own", "arguments", "message"),
    [
        (lora(Q, 4, 4), ["--rank", "5"], "no module has a rank above 4"),
        (lora(Q, 4, 4), [], "--rank N"),
        (lora(Q, 4, 4), ["--rank", "0"], "--rank 0"),
        (lora(Q, 4, 4), ["--energy", "95"], "between 0 and 1"),
        (lora(Q, 4, 4), ["--energy", "nan"], "between 0 and 1"),
        (lora(Q, 4, math.nan), ["--rank", "2"], f"{Q} has values that are not finite"),
        (LOHA, ["--rank", "1"], "--type lora"),
        ({"diff": torch.ones(24, 24)}, ["--rank", "1"], "nothing to resize"),
    ],
)
def test_what_cannot_be_resized_is_an_error_and_writes_nothing(resize, own, arguments, message):
    code, error = resize({Q: own}, *arguments)
    assert code == 1 and message in error


def test_an_existing_file_is_replaced_only_when_asked(resize):
    resize.target.write_text("precious")
    with pytest.raises(AssertionError):  # the file is still there
        resize({Q: lora(Q, 4, 4)}, "--rank", "2")
    assert resize.target.read_text() == "precious"
    assert resize({Q: lora(Q, 4, 4)}, "--rank", "2", "--overwrite")[0].keys() == {Q}
