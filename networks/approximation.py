"""Adapters of one module that come nearest to another one or to a dense difference.

A module that is made smaller keeps its alpha / rank, and with it the size of its factors and what a learning rate means
to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from networks.deltas import adapter_of
from networks.loha import LoHa
from networks.lokr import LoKr, factorize
from networks.low_rank import (
    Decomposition,
    decompose,
    decompose_kronecker,
    decompose_product,
    nearest_kronecker,
)


@dataclass(frozen=True)
class Limits:
    """rank: at most this. energy: keeps at least this share of the squared singular values. One of them may be None."""

    rank: int | None
    energy: float | None


@dataclass(frozen=True)
class Approximation:
    """What stands for one module's delta ΔW.

    tensors: by suffix; new factors are float32. rank_before, rank: None for a whole matrix. full_rank: the number of
    singular values. norm: ‖ΔW‖ in the Frobenius norm. relative_error: ‖ΔW - its approximation‖ / ‖ΔW‖.
    """

    tensors: dict[str, Tensor]
    rank_before: int | None
    rank: int | None
    full_rank: int
    norm: float
    relative_error: float


def resize(tensors: Mapping[str, Tensor], limits: Limits) -> Approximation:
    """A LoRA of less rank, or a LoKr whose w2 has less; the same tensors where nothing would become smaller.

    tensors: by suffix, with alpha and without DoRA's scales. Nothing of the size of the weight is built. For LoKr this
    is the best approximation that keeps w1, as ‖w1 ⊗ E‖ = ‖w1‖ · ‖E‖. A whole w2 becomes w2_a · w2_b where these hold
    fewer numbers than it does.
    """
    adapter = adapter_of(tensors)
    if isinstance(adapter, LoKr):
        return _resize_lokr(tensors, adapter, limits)
    found = decompose_product(adapter.lora_up.weight, adapter.lora_down.weight)
    rank = found.choose_rank(limits.rank, limits.energy)
    norm = _norm(adapter.scale, found)
    if rank >= adapter.rank:
        return Approximation(dict(tensors), adapter.rank, adapter.rank, len(found.values), norm, 0.0)
    return _lora(found, rank, adapter.scale, adapter.rank)


def _resize_lokr(tensors: Mapping[str, Tensor], adapter: LoKr, limits: Limits) -> Approximation:
    w2_is_whole = adapter.lokr_w2 is not None
    found = _decompose_factor(adapter, "lokr_w2")
    rank, rank_before = found.choose_rank(limits.rank, limits.energy), None if w2_is_whole else len(adapter.lokr_w2_b)
    rows, columns = adapter.w2.shape
    is_smaller = rank * (rows + columns) < rows * columns if w2_is_whole else rank < rank_before
    norm = _norm(adapter.scale, found) * float(adapter.w1.double().norm())
    if not is_smaller:
        return Approximation(dict(tensors), rank_before, rank_before, len(found.values), norm, 0.0)
    # A low-rank w1 becomes whole: with two ranks in a module, LyCORIS and ComfyUI would divide alpha by different ones.
    resized = {"lokr_w1": tensors.get("lokr_w1", adapter.w1)}
    up, down = found.factors(rank)
    resized |= {"lokr_w2_a": up.float(), "lokr_w2_b": down.float()}
    resized["alpha"] = torch.tensor(adapter.scale * rank, dtype=torch.float32)
    return Approximation(resized, rank_before, rank, len(found.values), norm, found.relative_error(rank))


def to_lora(tensors: Mapping[str, Tensor], limits: Limits) -> Approximation:
    """The LoRA nearest to a LoKr, a LoHa or a plain difference of a matrix."""
    if "diff" in tensors:
        return nearest_lora(tensors["diff"], limits)
    adapter = adapter_of(tensors)
    rank_before = None if isinstance(adapter, LoKr) and adapter.is_whole else adapter.rank
    found = _decompose_delta(adapter)
    return _lora(found, found.choose_rank(limits.rank, limits.energy), adapter.scale, rank_before)


def nearest_lora(delta: Tensor, limits: Limits) -> Approximation:
    """The LoRA nearest to a difference [out, in], with a strength of 1."""
    found = decompose(delta)
    return _lora(found, found.choose_rank(limits.rank, limits.energy), 1.0, None)


def nearest_lokr(delta: Tensor, factor: int) -> Approximation:
    """The LoKr of whole matrices nearest to a difference [out, in]; factor: see `networks.lokr.factorize`."""
    out_features, in_features = delta.shape
    w1_shape = factorize(out_features, factor)[0], factorize(in_features, factor)[0]
    w1, w2, error = nearest_kronecker(delta, w1_shape)
    tensors = {"lokr_w1": w1.float(), "lokr_w2": w2.float()}
    return Approximation(tensors, None, None, min(delta.shape), float(delta.norm()), error)


def _decompose_delta(adapter: LoKr | LoHa) -> Decomposition:
    """Of the delta before its scale. Of LoHa's two forms, a dense matrix and two factors, the smaller one."""
    if isinstance(adapter, LoKr):
        return decompose_kronecker(_decompose_factor(adapter, "lokr_w1"), _decompose_factor(adapter, "lokr_w2"))
    rank, (rows, columns) = adapter.rank, adapter.weight_shape
    if rank**2 * (rows + columns) >= rows * columns:
        return decompose((adapter.hada_w1_a @ adapter.hada_w1_b).mul_(adapter.hada_w2_a @ adapter.hada_w2_b))
    # (A B) ∘ (C D) is a product of rank r²: Σ_rs (A_r ∘ C_s) (B_r ∘ D_s)ᵀ over the columns of A, C, rows of B, D.
    left = torch.einsum("or,os->ors", adapter.hada_w1_a, adapter.hada_w2_a).flatten(1)
    right = torch.einsum("ri,si->rsi", adapter.hada_w1_b, adapter.hada_w2_b).flatten(0, 1)
    return decompose_product(left, right)


def _decompose_factor(adapter: LoKr, name: str) -> Decomposition:
    whole = getattr(adapter, name)
    if whole is not None:
        return decompose(whole)
    return decompose_product(getattr(adapter, f"{name}_a"), getattr(adapter, f"{name}_b"))


def _lora(found: Decomposition, rank: int, scale: float, rank_before: int | None) -> Approximation:
    up, down = found.factors(rank)
    tensors = {
        "lora_down.weight": down.float(),
        "lora_up.weight": up.float(),
        "alpha": torch.tensor(scale * rank, dtype=torch.float32),
    }
    error = found.relative_error(rank)
    return Approximation(tensors, rank_before, rank, len(found.values), _norm(scale, found), error)


def _norm(scale: float, found: Decomposition) -> float:
    return abs(scale) * float(found.values.norm())
