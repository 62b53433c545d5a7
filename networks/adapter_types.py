"""What kind of adapter a module's tensors are, told from their suffixes and shapes, and what every file must obey."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import ModelFileError
from networks.lokr import factorize

Adapters = dict[str, dict[str, Tensor]]
Shape = tuple[int, ...]

# A file of this trainer's first version holds a norm's trained value itself, not its difference from the base.
NORM_VALUE = "norm_value"

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_KIND_OF_SUFFIX = {
    "lora_down.weight": "lora",
    "lora_up.weight": "lora",
    **dict.fromkeys(_LOHA, "loha"),
    **{f"lokr_{factor}{part}": "lokr" for factor in ("w1", "w2") for part in ("", "_a", "_b")},
    **dict.fromkeys(("w_norm", "b_norm", NORM_VALUE), "norm"),
    **dict.fromkeys(("diff", "diff_b"), "diff"),
}
_SCALED = ("lora", "loha", "lokr")


@dataclass(frozen=True)
class AdapterType:
    """kind: "lora", "loha", "lokr", "norm" or "diff". rank: None where nothing is low-rank.

    factor: the LoKr factor that gives these shapes, else None. full_matrix: LoKr with both factors whole.
    decompose_both: LoKr with both factors low-rank.
    """

    kind: str
    rank: int | None = None
    factor: int | None = None
    full_matrix: bool = False
    decompose_both: bool = False
    dora: bool = False


def infer_types(adapters: Mapping[str, Mapping[str, Tensor]]) -> dict[str, AdapterType]:
    """The type of every module's adapter, by module path. Raises ModelFileError for an incomplete or mixed one."""
    kinds = {path: adapter_kind(path, own) for path, own in adapters.items()}
    shapes = {path: tensor_shapes(own) for path, own in adapters.items()}
    factor = _common_factor([own for path, own in shapes.items() if kinds[path] == "lokr"])
    return {path: _infer_type(kinds[path], own, factor) for path, own in shapes.items()}


def _infer_type(kind: str, shapes: Mapping[str, Shape], factor: int | None) -> AdapterType:
    rank, dora = rank_of(shapes), "dora_scale" in shapes
    if kind != "lokr":
        return AdapterType(kind, rank, dora=dora)
    both = "lokr_w1_a" in shapes and "lokr_w2_a" in shapes
    return AdapterType(kind, rank, factor, full_matrix=rank is None, decompose_both=both, dora=dora)


def _common_factor(modules: list[Mapping[str, Shape]]) -> int | None:
    """The one factor behind all LoKr modules: the smallest positive one, else -1 (most balanced), else None."""
    pairs = [pair for shapes in modules for pair in _factorizations(shapes)]
    candidates = (*sorted({small for small, _ in pairs}), -1)
    fitting = (f for f in candidates if all(factorize(small * large, f) == (small, large) for small, large in pairs))
    return next(fitting, None) if pairs else None


def _factorizations(shapes: Mapping[str, Shape]) -> tuple[tuple[int, int], tuple[int, int]]:
    small, large = _factor_shape(shapes, "lokr_w1"), _factor_shape(shapes, "lokr_w2")
    return (small[0], large[0]), (small[1], large[1])


def _factor_shape(shapes: Mapping[str, Shape], name: str) -> Shape:
    if name in shapes:
        return shapes[name]
    return shapes[f"{name}_a"][0], shapes[f"{name}_b"][1]


def tensor_shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """{suffix: shape}"""
    return {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}


def adapter_kind(path: str, suffixes: Collection[str]) -> str:
    """The kind of one module's adapter. Raises ModelFileError where tensors are missing or belong to two kinds."""
    kinds = {_KIND_OF_SUFFIX[suffix] for suffix in suffixes if suffix in _KIND_OF_SUFFIX}
    if len(kinds) > 1:
        raise ModelFileError(
            f"{path} has tensors of {' and '.join(sorted(kinds))} at once ({_listed(suffixes)}); keep one adapter."
        )
    kind = next(iter(kinds), None)
    if kind is None or not _is_complete(kind, suffixes):
        raise ModelFileError(f"{path} has only {_listed(suffixes)}, which is no whole adapter; the file is incomplete.")
    return kind


def _listed(suffixes: Collection[str]) -> str:
    return ", ".join(sorted(suffixes))


def _is_complete(kind: str, suffixes: Collection[str]) -> bool:
    if kind == "lora":
        return "lora_down.weight" in suffixes and "lora_up.weight" in suffixes
    if kind == "loha":
        return all(suffix in suffixes for suffix in _LOHA)
    if kind == "lokr":
        pairs = {name: (f"{name}_a" in suffixes, f"{name}_b" in suffixes) for name in ("lokr_w1", "lokr_w2")}
        return all(pair == ((False, False) if name in suffixes else (True, True)) for name, pair in pairs.items())
    return "dora_scale" not in suffixes


def rank_of(shapes: Mapping[str, Shape]) -> int | None:
    """The rank that alpha is divided by: LoKr's is w2's, else w1's; None for whole matrices, norms and diffs."""
    for suffix in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if shapes.get(suffix):
            return shapes[suffix][0]
    return None


def weight_shape(path: str, shapes: Mapping[str, Shape]) -> Shape | None:
    """The shape of the weight that one module's adapter changes; None where it changes only the bias.

    Raises ModelFileError where the tensors do not fit each other.
    """
    kind = adapter_kind(path, shapes)
    if kind not in _SCALED:
        return next((shapes[suffix] for suffix in ("w_norm", NORM_VALUE, "diff") if suffix in shapes), None)
    if kind == "lora":
        products = [("lora_up.weight", "lora_down.weight")]
    elif kind == "loha":
        products = [("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")]
    else:
        products = [(f"{name}_a", f"{name}_b") for name in ("lokr_w1", "lokr_w2") if f"{name}_a" in shapes]
    factors = {suffix: shape for suffix, shape in shapes.items() if suffix in _KIND_OF_SUFFIX}
    matrices = all(len(shape) == 2 and 0 not in shape for shape in factors.values())
    if not matrices or any(shapes[left][1] != shapes[right][0] for left, right in products):
        raise ModelFileError(f"{path}: its factors do not fit each other: {factors}")
    sizes = {(shapes[left][0], shapes[right][1]) for left, right in products}
    if kind == "loha" and len(sizes) > 1:
        raise ModelFileError(f"{path}: its two products differ in shape: {factors}")
    if kind != "lokr":
        return sizes.pop()
    (out_small, out_large), (in_small, in_large) = _factorizations(shapes)
    return out_small * out_large, in_small * in_large


def normalised(path: str, tensors: Mapping[str, Tensor], missing_alpha: float | None = None) -> dict[str, Tensor]:
    """One module's tensors with a float32 0-d alpha that gives the right strength in every reader.

    missing_alpha: alpha where the tensors have none; None stands for the rank, that is a strength of 1.
    Raises ModelFileError for tensors that do not make one whole adapter.
    """
    shapes = tensor_shapes(tensors)
    weight = weight_shape(path, shapes)
    own = {suffix: tensor for suffix, tensor in tensors.items() if suffix != "alpha"}
    if adapter_kind(path, shapes) in _SCALED:
        own["alpha"] = torch.tensor(_alpha(path, tensors, missing_alpha), dtype=torch.float32)
    if "dora_scale" in own:
        own["dora_scale"] = _column(path, own["dora_scale"], weight)
    return own


def _alpha(path: str, tensors: Mapping[str, Tensor], missing_alpha: float | None) -> float:
    rank = rank_of(tensor_shapes(tensors))
    if rank is None:
        return float(max(1, tensors["lokr_w2"].shape[0] // tensors["lokr_w1"].shape[0]))
    if "alpha" not in tensors:
        return float(rank) if missing_alpha is None else missing_alpha
    if tensors["alpha"].numel() != 1:
        raise ModelFileError(f"{path}.alpha has shape {list(tensors['alpha'].shape)}; one number is expected.")
    return float(tensors["alpha"])


def _column(path: str, dora_scale: Tensor, weight: Shape) -> Tensor:
    """DoRA's scales as ComfyUI reads them, [out, 1]; refused where they may belong to the inputs."""
    out_features, in_features = weight
    if tuple(dora_scale.shape) == (out_features, 1):
        return dora_scale
    if tuple(dora_scale.shape) in ((out_features,), (1, out_features)) and out_features != in_features:
        return dora_scale.reshape(out_features, 1)
    raise ModelFileError(
        f"{path}.dora_scale has shape {list(dora_scale.shape)}, and only one scale for each output, "
        f"[{out_features}, 1], can be used. DoRA over inputs has no portable meaning; train it over outputs."
    )


def describe_adapters(adapters: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The types, how many modules have each, and their ranks: "280 lora (rank 16), 156 norm"."""
    kinds: dict[str, Counter[str]] = {}
    for found in infer_types(adapters).values():
        detail = f"rank {found.rank}" if found.rank else "full matrix" if found.full_matrix else ""
        detail += f", factor {found.factor}" if found.factor else ""
        detail += ", DoRA" if found.dora else ""
        kinds.setdefault(found.kind, Counter())[detail] += 1
    parts = []
    for kind, details in kinds.items():
        spelled = "; ".join(detail for detail, _ in details.most_common(3) if detail)
        more = f"; and {len(details) - 3} more" if len(details) > 3 else ""
        parts.append(f"{details.total()} {kind}" + (f" ({spelled}{more})" if spelled else ""))
    return ", ".join(parts)
