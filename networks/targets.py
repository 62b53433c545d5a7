"""Which Linears of the model get an adapter."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from torch import nn

from library.errors import SettingError

TRANSFORMER_TARGETS = (
    r"blocks\.\d+\.(self_attn|cross_attn)\.(q_proj|k_proj|v_proj|output_proj)",
    r"blocks\.\d+\.mlp\.layer[12]",
)
LLM_ADAPTER_TARGETS = (
    r"llm_adapter\.blocks\.\d+\.(self_attn|cross_attn)\.(q_proj|k_proj|v_proj|o_proj)",
    r"llm_adapter\.blocks\.\d+\.mlp\.[02]",
)


def find_targets(model: nn.Module, patterns: Sequence[str] | None, include_llm_adapter: bool) -> dict[str, nn.Linear]:
    """The Linears to adapt by dotted path, in the model's order.

    patterns: None for the default targets; else each is a suffix of whole path parts ("self_attn.q_proj"), a glob over
        the whole path ("blocks.1?.mlp.*"), or a regular expression over it after "re:".
    Raises SettingError when a pattern matches nothing, with near names.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not include_llm_adapter:
        linears = {name: linear for name, linear in linears.items() if not name.startswith("llm_adapter.")}
    if patterns is None:
        patterns = [f"re:{pattern}" for pattern in TRANSFORMER_TARGETS]
        patterns += [f"re:{pattern}" for pattern in LLM_ADAPTER_TARGETS] if include_llm_adapter else []
    matched = {pattern: {name for name in linears if matches(name, pattern)} for pattern in patterns}
    for pattern, names in matched.items():
        if not names:
            raise SettingError(_nothing_matched(pattern, linears))
    wanted = set().union(*matched.values())
    return {name: linear for name, linear in linears.items() if name in wanted}


def matches(path: str, pattern: str) -> bool:
    """Whether a dotted module path is meant by a pattern; see `find_targets`. Raises SettingError for a bad regex."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], path) is not None
        except re.error as error:
            raise SettingError(f"target_modules: {pattern!r} is not a regular expression: {error}") from error
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(path, pattern)
    return path == pattern or path.endswith(f".{pattern}")


def _nothing_matched(pattern: str, names: Iterable[str]) -> str:
    suffixes = {suffix for name in names for suffix in (name, ".".join(name.split(".")[-2:]), name.split(".")[-1])}
    near = difflib.get_close_matches(pattern.removeprefix("re:"), sorted(suffixes), n=5, cutoff=0.5)
    hint = f" Near names: {', '.join(near)}." if near else ""
    return f"target_modules: {pattern!r} matches no Linear of the model.{hint}"
