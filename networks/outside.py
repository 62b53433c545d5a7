"""Networks of other packages' network modules, such as lycoris.kohya, behind the methods of `AdapterNetwork`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import ModelFileError, SettingError, first_ten
from networks.adapter_files import export_tensors, load_adapter_file
from networks.adapter_types import Adapters, tensor_shapes, weight_shape
from networks.key_formats import FileKey, find_keys, parse_keys
from networks.module_names import module_names_covering
from networks.network import misfit, numbered, part_of
from networks.settings import NetworkSettings
from networks.targets import named_modules

LYCORIS = "lycoris.kohya"
LYCORIS_PRESET = Path(__file__).parents[1] / "configs" / "lycoris_anima.toml"
_LYCORIS_REFUSED = {
    "train_norm": "LyCORIS cannot train Anima's norms; networks.lora_anima, lokr_anima and loha_anima can",
    "dora_wd": "LyCORIS' DoRA divides by another norm than ComfyUI; networks.lora_anima's renders as it was trained",
}


def check_outside_settings(settings: NetworkSettings, arguments: Mapping[str, str]) -> None:
    """Raises SettingError for what no network of another package, or LyCORIS', can do here."""
    if settings.dim_from_weights:
        raise SettingError("dim_from_weights: builds networks of this project only; set network_module to one of them")
    if settings.network_module != LYCORIS:
        return
    for name, reason in _LYCORIS_REFUSED.items():
        if arguments.get(name, "false").lower() not in ("false", "0"):
            raise SettingError(f"network_args: {name}: {reason}")


def create_outside_network(
    settings: NetworkSettings,
    module: ModuleType,
    arguments: Mapping[str, str],
    model: nn.Module,
    text_encoder: nn.Module,
) -> OutsideNetwork:
    """A new network of another package, for models that are loaded: it may read their weights.

    Raises SettingError for whatever the network module raises, and for a norm limit that it does not know.
    """
    defaults = _lycoris_defaults(arguments) if settings.network_module == LYCORIS else {}
    if settings.network_dropout:
        defaults |= {"dropout": settings.network_dropout, "neuron_dropout": settings.network_dropout}
    try:
        network = module.create_network(
            1.0, settings.network_dim, settings.network_alpha, None, text_encoder, model, **{**defaults, **arguments}
        )
    except Exception as error:  # another package's own checks raise what they like
        given = ", ".join(settings.network_args) or "none"
        raise SettingError(
            f"network_module: {settings.network_module} made no network with network_args {given}: {error!r}"
        ) from error
    if settings.scale_weight_norms is not None and not hasattr(network, "apply_max_norm_regularization"):
        raise SettingError(f"scale_weight_norms: networks of {settings.network_module} cannot do it; leave it out")
    return OutsideNetwork(network)


def _lycoris_defaults(arguments: Mapping[str, str]) -> dict[str, Any]:
    """What makes LyCORIS' networks fit Anima, as far as network_args does not say it.

    bypass_mode adds the adapter's output to the Linear's. Without it LyCORIS adds the change to the weight in the
    model's dtype: in bf16 a change of a hundredth of the weight then comes out 15 % off (measured; 2 % with it).
    """
    defaults: dict[str, Any] = {"preset": str(LYCORIS_PRESET)}
    if arguments.get("algo", "lora").lower() in ("lora", "locon", "loha", "lokr"):
        defaults["bypass_mode"] = True
    return defaults


class OutsideNetwork(nn.Module):
    """Owns a network that replaces the `forward` of modules, as Kohya's trainers know them.

    Its tensors are known by the names of its state, which are those of a file. Nothing is there before `apply_to`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._changed: list[nn.Module] = []

    def apply_to(
        self, text_encoder: nn.Module | None, unet: nn.Module, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        """Attaches the network. Its weights are float32, so a low-precision module's forward gets autocast of its own.

        Raises ModelFileError where it changes no module, or has tensors that no adapter file can hold.
        """
        self.network.apply_to(text_encoder, unet, apply_text_encoder, apply_unet)
        for module in named_modules(unet, text_encoder).values():
            if "forward" in vars(module):
                module.forward = _in_dtype_of_input(module.forward)
                self._changed.append(module)
        self.network.requires_grad_(True)
        self.adapter_tensors()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model runs without the network."""
        forwards = [vars(module).pop("forward") for module in self._changed]
        try:
            yield
        finally:
            for module, forward in zip(self._changed, forwards, strict=True):
                module.forward = forward

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, learning_rate: float
    ) -> list[dict[str, Any]]:
        """The network's own parameter groups, with names for the curves."""
        found = self.network.prepare_optimizer_params(text_encoder_lr, unet_lr, learning_rate)
        groups = found[0] if isinstance(found, tuple) else found
        paths = self.paths()
        by_name: dict[tuple[str, float], list[nn.Parameter]] = {}
        for group in groups:
            parameters = list(group["params"])
            parts = {part_of(paths[id(parameter)]) for parameter in parameters}
            name = "text_encoder" if parts == {"text_encoder"} else "transformer"
            by_name.setdefault((name, group.get("lr", learning_rate)), []).extend(parameters)
        return [{"name": name, "lr": rate, "params": params} for (name, rate), params in numbered(by_name).items()]

    def adapts(self, part: str) -> bool:
        """Whether anything belongs to "transformer", "llm_adapter" or "text_encoder"."""
        return any(part_of(path) == part for path in self.paths().values())

    def apply_max_norm(self, limit: float) -> None:
        """Shrinks what is longer than `limit`, in the network's own way."""
        self.network.apply_max_norm_regularization(limit, next(self.parameters()).device)

    def paths(self) -> dict[int, str]:
        """{id of a parameter: path of the module it changes}"""
        path_of = {file_key.spelling: file_key.path for file_key in self._keys().values()}
        return {
            id(parameter): path_of[name.partition(".")[0]]
            for name, parameter in self.network.named_parameters()
            if name.partition(".")[0] in path_of
        }

    # --- files ---

    def adapter_tensors(self) -> Adapters:
        """{module path: {suffix: tensor}}, read from the network's state as those of a file would be."""
        tensors = {name: tensor.detach() for name, tensor in self.network.state_dict().items()}
        try:
            parsed = parse_keys(tensors, {}, module_names_covering(tensors))
        except ModelFileError as error:
            raise ModelFileError(f"network_module: ComfyUI cannot read what its network trains: {error}") from error
        if not parsed.adapters:
            raise ModelFileError("network_module: its network changes no module of Anima; choose other targets for it")
        if parsed.unused:
            raise ModelFileError(f"network_module: no adapter file can hold {first_ten(parsed.unused)}")
        return parsed.adapters

    def export(self, file_format: str = "comfy") -> dict[str, Tensor]:
        """The tensors of a file of that format, float32 on the CPU."""
        return export_tensors(self.adapter_tensors(), file_format, None)

    def load_weights(self, file: str | Path, allow_partial: bool = False) -> None:
        """Takes over an adapter file of any readable format.

        Raises ModelFileError naming what does not fit: modules, shapes, or an alpha other than the network's, whose
        strength was fixed when it was made.
        """
        own = self.adapter_tensors()
        shapes = {path: weight_shape(path, tensor_shapes(tensors)) for path, tensors in own.items()}
        given, _ = load_adapter_file(Path(file), shapes, allow_partial)
        if misfits := [problem for path in given if (problem := misfit(path, given[path], own[path]))]:
            raise ModelFileError(f"{file} does not fit this network: {first_ten(misfits)}")
        tensors = {
            name: given[key.path][key.suffix]
            for name, key in self._keys().items()
            if key.path in given and key.suffix != "alpha"
        }
        self.network.load_state_dict(tensors, strict=False)

    def _keys(self) -> dict[str, FileKey]:
        names = list(self.network.state_dict())
        return find_keys(names, module_names_covering(names))


def _in_dtype_of_input(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype in (torch.bfloat16, torch.float16)):
            return forward(x, *arguments, **named).to(x.dtype)

    return run
