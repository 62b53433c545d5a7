"""The network_args of this project's adapters: declared, typed, checked."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from library.errors import SettingError, did_you_mean
from library.options import Option, option, options_of
from library.values import convert, takes_several


@dataclass(frozen=True)
class NetworkArguments:
    """What 'network_args' may say. Patterns are those of `networks.targets`."""

    target_modules: tuple[str, ...] = option((), "Linears to adapt, by pattern, in place of the default ones.")
    exclude_patterns: tuple[str, ...] = option((), "Modules to leave alone.")
    include_patterns: tuple[str, ...] = option((), "Further Linears to adapt, excluded ones too.")
    train_llm_adapter: bool = option(True, "Adapters and norms of the LLM adapter as well.")
    train_text_encoder: bool = option(False, "Adapters on Qwen3's Linears as well.")
    train_norm: bool = option(True, "Train every norm weight as a difference.")
    network_reg_dims: tuple[str, ...] = option((), "Ranks by pattern: 'pattern=rank'.")
    network_reg_alphas: tuple[str, ...] = option((), "Alphas by pattern: 'pattern=alpha'.")
    network_reg_lrs: tuple[str, ...] = option((), "Learning rates by pattern: 'pattern=rate'.")
    llm_adapter_lr: float | None = option(None, "Learning rate of the LLM adapter's part; 0 leaves it untrained.")
    loraplus_lr_ratio: float | None = option(None, "LoRA+: output-side factors learn this many times faster.")
    rank_dropout: float = option(0.0, "Chance of a rank (LoRA) or a row of the change (LoKr, LoHa) to be left out.")
    rank_dropout_scale: bool = option(False, "Scale up what rank dropout keeps (LoKr, LoHa).")
    module_dropout: float = option(0.0, "Chance of an adapter to be skipped for a batch.")
    rs_lora: bool = option(False, "Scale by alpha / sqrt(rank).", aliases=("use_rslora", "rslora"))
    dora: bool = option(False, "Train each row's length too, in ComfyUI's arithmetic.", aliases=("dora_wd", "use_dora"))
    factor: int = option(8, "LoKr: size of the small factor; -1 for the most balanced.", aliases=("lokr_factor",))
    full_matrix: bool = option(False, "LoKr: both factors whole.", aliases=("lokr_full_matrix",))
    decompose_both: bool = option(False, "LoKr: the small factor low-rank too.", aliases=("lokr_decompose_both",))


NO_ARGUMENTS = NetworkArguments()

# Names of LyCORIS and of root-style files for arguments above.
_PREFIXED = {f"lokr_{name}": name for name in ("rank_dropout", "module_dropout", "rank_dropout_scale")}
_LOKR_ONLY = ("factor", "full_matrix", "decompose_both")
# Of Kohya's networks, for convolutions.
_CONVOLUTIONS = ("conv_dim", "conv_alpha")


def read_arguments(given: Mapping[str, Any], adapter_type: str | None) -> NetworkArguments:
    """Typed arguments from text or values; adapter_type is "lora", "lokr", "loha", or None where a file decides it.

    Raises SettingError, a line for each, for an unknown name, two spellings of one, a wrong type, or one without effect
    on the type.
    """
    problems: list[str] = []
    arguments = _typed(given, adapter_type, problems)
    problems += _problems_of(arguments, adapter_type)
    if problems:
        raise SettingError("\n".join(f"network_args: {problem}" for problem in problems))
    return arguments


def _typed(given: Mapping[str, Any], adapter_type: str | None, problems: list[str]) -> NetworkArguments:
    """The arguments that can be read; what is wrong with the others is added to `problems`."""
    options = {spelling: each for each in options_of(NetworkArguments) for spelling in (each.name, *each.aliases)}
    options |= {spelling: options[name] for spelling, name in _PREFIXED.items()}
    values: dict[str, Any] = {}
    for name, value in given.items():
        known = options.get(name)
        if known is None:
            problems.append(_unknown(name, adapter_type, options))
        elif known.name in _LOKR_ONLY and adapter_type not in ("lokr", None):
            problems.append(f"{name} belongs to networks.lokr_anima, not {adapter_type}: remove it")
        elif known.name in values:
            problems.append(f"{known.name} is given twice, once as {name}: keep one")
        else:
            try:
                values[known.name] = convert(known, _items(value) if takes_several(known) else value)
            except ValueError as error:
                problems.append(f"{name} = {value!r}: {error}")
    return NetworkArguments(**values)


def _unknown(name: str, adapter_type: str | None, options: Mapping[str, Option]) -> str:
    """What is said of a name that no type has: the nearest that this type takes, or all of them."""
    if name in _CONVOLUTIONS:
        return f"{name}: the model has no convolutions that adapters change; remove it"
    foreign = {"lora": (*_LOKR_ONLY, "rank_dropout_scale"), "loha": _LOKR_ONLY}.get(adapter_type, ())
    taken = {spelling: option.name for spelling, option in options.items() if option.name not in foreign}
    owner = "this project's networks have" if adapter_type is None else f"networks.{adapter_type}_anima has"
    hint = did_you_mean(name, taken) or f"; it takes {', '.join(dict.fromkeys(taken.values()))}"
    return f"{owner} no argument {name!r}{hint}"


def _items(value: Any) -> list[str]:
    """A list, the text of a Python list (with r'' strings, as Kohya's users write it), or a comma-separated string."""
    if not isinstance(value, str):
        return [str(item) for item in value]
    text = value.strip()
    if text.startswith("["):
        try:
            return [str(item) for item in ast.literal_eval(text)]
        except (ValueError, SyntaxError) as error:
            raise ValueError("it is not a list of strings, such as ['q_proj', 'mlp.layer1']") from error
    return [item.strip() for item in text.split(",") if item.strip()]


def _problems_of(arguments: NetworkArguments, adapter_type: str | None) -> Iterator[str]:
    """Values out of range, and those that the type does not know."""
    for name in ("rank_dropout", "module_dropout"):
        if not 0 <= getattr(arguments, name) < 1:
            yield f"{name} = {getattr(arguments, name)} is not a chance from 0 to below 1"
    if arguments.rank_dropout_scale and adapter_type == "lora":
        yield "rank_dropout_scale belongs to LoKr and LoHa; LoRA always scales up"
    if arguments.factor == 0 or arguments.factor < -1:
        yield f"factor = {arguments.factor}; give 1 or more, or -1 for the most balanced"
    if arguments.loraplus_lr_ratio is not None and arguments.loraplus_lr_ratio <= 0:
        yield f"loraplus_lr_ratio = {arguments.loraplus_lr_ratio}; give a number above 0"


def described(arguments: NetworkArguments) -> dict[str, str]:
    """Each argument as text by its name, whether it was given or not; "unset" for none."""
    found = {}
    for name, value in asdict(arguments).items():
        text = ",".join(value) if isinstance(value, tuple) else "" if value is None else str(value)
        found[name] = text or "unset"
    return found


def by_pattern(name: str, entries: tuple[str, ...], convert: type) -> dict[str, Any]:
    """('mlp.layer1=8', …) -> {'mlp.layer1': 8}; SettingError for an entry of another form."""
    values = {}
    for entry in entries:
        pattern, separator, text = entry.rpartition("=")
        try:
            values[pattern.strip()] = convert(text)
        except ValueError:
            separator = ""
        if not separator or not pattern.strip():
            raise SettingError(f"network_args: {name}: {entry!r} is not of the form pattern=number")
    return values
