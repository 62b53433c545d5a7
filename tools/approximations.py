"""What the tools that approximate adapters share: how far an approximation may go, and a report of how far it went."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Mapping

from torch import Tensor

from library.console import show
from library.errors import SettingError
from networks.adapter_types import rank_of, tensor_shapes
from networks.approximation import Approximation, Limits
from networks.network import part_of


def add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    """--rank and --energy."""
    parser.add_argument("--rank", type=int, help="rank of every module; with --energy, at most")
    parser.add_argument(
        "--energy", type=float, help="share of the squared singular values to keep in each module: 0.95"
    )


def limits_of(arguments: argparse.Namespace) -> Limits:
    """Raises SettingError for limits that cannot be, or none."""
    rank, energy = arguments.rank, arguments.energy
    if rank is None and energy is None:
        raise SettingError("give the rank with --rank N, or the share to keep with --energy 0.95, or both")
    if rank is not None and rank < 1:
        raise SettingError(f"--rank {rank}: a rank is 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise SettingError(f"--energy {energy:g}: a share lies between 0 and 1, such as 0.95")
    return Limits(rank, energy)


def rank_metadata(adapters: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """The one rank and alpha of all modules, or "Dynamic", as Kohya's tools write where they differ."""
    scaled = [own for own in adapters.values() if "alpha" in own]
    values = {
        "ss_network_dim": {rank_of(tensor_shapes(own)) for own in scaled},
        "ss_network_alpha": {float(own["alpha"]) for own in scaled},
    }
    return {key: "Dynamic" if len(found) > 1 or None in found else str(*found) for key, found in values.items()}


def show_approximations(approximations: Mapping[str, Approximation]) -> None:
    """A line for each part of the model: ranks before and after, the error of all its modules and the worst one's.

    approximations: by module path. Their errors are without the rounding to 16 bits (0.2 % with bfloat16).
    """
    parts: dict[str, dict[str, Approximation]] = {}
    for path, found in approximations.items():
        parts.setdefault(part_of(path), {})[path] = found
    for part, own in parts.items():
        before = _ranks_text({found.rank_before for found in own.values()})
        after = _ranks_text({found.rank for found in own.values()})
        norm = math.hypot(*(found.norm for found in own.values()))
        error = math.hypot(*(found.norm * found.relative_error for found in own.values()))
        worst = max(own, key=lambda path: own[path].relative_error)
        show(
            f"{part}: {len(own)} modules, {before if before == after else f'{before} -> {after}'}, "
            f"relative error {_percent(error / norm if norm else 0.0)}, "
            f"at most {_percent(own[worst].relative_error)} ({worst})"
        )


def _ranks_text(ranks: Collection[int | None]) -> str:
    numbers = sorted({rank for rank in ranks if rank is not None})
    texts = [f"rank {numbers[0]}" + (f" to {numbers[-1]}" if len(numbers) > 1 else "")] if numbers else []
    return " or ".join([*texts, *(["whole matrices"] if None in ranks else [])])


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
