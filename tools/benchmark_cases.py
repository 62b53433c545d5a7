"""What is timed: the trainer's own step on random weights of the real size, in the cases of docs/performance.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from anima_train_network import AnimaNetworkTrainer
from library.anima_runtime.config import AnimaConfig
from library.anima_runtime.memory.low_memory import MemorySettings
from library.anima_runtime.text.contexts import CaptionContext
from library.anima_runtime.text.encoding import CaptionStates
from library.anima_runtime.transformer import AnimaTransformer
from library.data.dataset import Batch
from library.settings import Settings
from library.settings.groups import run_groups
from library.training.run import RunSettings
from library.training.speed import SpeedSettings
from networks.settings import NetworkSettings
from networks.setup import create_network, import_network_module, network_arguments

LORA = {"network_dim": 16, "network_alpha": 16.0}
LOKR = {"network_module": "networks.lokr_anima", "network_dim": 100000}
# The LoRA that other trainers were timed with: on the blocks' Linears alone.
LORA_BLOCKS = LORA | {"train_norm": False, "train_llm_adapter": False}
EAGER = SpeedSettings(torch_compile=False, cuda_graphs=False, fused_blocks=False)
COMPILED = SpeedSettings(torch_compile=True, cuda_graphs=False, fused_blocks=False)
RECORDED = SpeedSettings(torch_compile=True, cuda_graphs=True, fused_blocks=False)
FUSED = SpeedSettings(torch_compile=False, cuda_graphs=True, fused_blocks=True)
# Buckets of about 1024² pixels as folders of real pictures give them.
MIXED = tuple((side, 1024 * 1024 // side // 64 * 64) for side in range(704, 1472, 64))


@dataclass(frozen=True)
class Case:
    """One row of the table. sides: (width, height) of each bucket, taken in turn."""

    network: Mapping[str, Any] = field(default_factory=lambda: LORA)
    sides: tuple[tuple[int, int], ...] = ((1024, 1024),)
    batch_size: int = 1
    checkpointing: bool = False
    selective: bool = False
    attention: str = "auto"
    speed: SpeedSettings = FUSED
    memory: MemorySettings = MemorySettings()
    optimizer: str = "AdamW"


CASES = {
    "lora": Case(),
    "lora_blocks": Case(network=LORA_BLOCKS),
    "lora_blocks_512": Case(network=LORA_BLOCKS, sides=((512, 512),)),
    "lora_blocks_batch4": Case(network=LORA_BLOCKS, batch_size=4),
    "lora_blocks_checkpointing": Case(network=LORA_BLOCKS, checkpointing=True),
    "lora_recorded": Case(speed=RECORDED),
    "lora_512": Case(sides=((512, 512),)),
    "lora_batch4": Case(batch_size=4),
    "lokr": Case(network=LOKR),
    "lora_checkpointing": Case(checkpointing=True),
    "lora_selective": Case(selective=True),
    "lora_mixed": Case(sides=MIXED, batch_size=2),
    "lora_fp8": Case(checkpointing=True, memory=MemorySettings(fp8_base=True)),
    "lora_fp8_recorded": Case(checkpointing=True, memory=MemorySettings(fp8_base=True), speed=RECORDED),
    "lora_fp8_swap": Case(checkpointing=True, memory=MemorySettings(fp8_base=True, blocks_to_swap=14)),
    "lora_swap": Case(checkpointing=True, memory=MemorySettings(blocks_to_swap=14)),
    "lora_swap_eager": Case(checkpointing=True, memory=MemorySettings(blocks_to_swap=14), speed=EAGER),
    "lora_adamw8bit": Case(optimizer="AdamW8bit"),
    "lora_lion8bit": Case(optimizer="Lion8bit"),
    "lora_eager": Case(speed=EAGER),
    "lokr_eager": Case(network=LOKR, speed=EAGER),
    "lora_512_eager": Case(sides=((512, 512),), speed=EAGER),
    "lora_cudnn": Case(attention="cudnn"),
    "lora_compiled": Case(speed=COMPILED),
    "lora_checkpointing_eager": Case(checkpointing=True, speed=EAGER),
}


class BenchmarkTrainer(AnimaNetworkTrainer):
    """The trainer with random weights made in place, and captions' states made up."""

    def __init__(self, settings: Settings, accelerator: Accelerator, config: AnimaConfig) -> None:
        super().__init__(settings, accelerator)
        self.config = config
        self.choose_for_model()

    def load_models(self) -> tuple[nn.Module, nn.Module]:
        place = torch.device("cpu") if self.settings.memory.is_used else self.device
        self.transformer = random_transformer(self.config, self.dtype, self.device, place)
        self.transformer.use_attention(self.attention[1])
        self.captions = SimpleNamespace(encode=self._made_up_states)
        return self.transformer, nn.Identity()

    def _made_up_states(self, captions: list[str]) -> list[CaptionStates] | list[CaptionContext]:
        """120 tokens a caption: a long list of tags."""
        generator = torch.Generator().manual_seed(len(captions))
        width = self.config.llm_adapter.source_width
        states = torch.randn(120, width, generator=generator).to(self.dtype)
        if self.has_frozen_context():
            return [CaptionContext(states[:, : self.config.context_width]) for _ in captions]
        return [CaptionStates(states, torch.arange(1, 121)) for _ in captions]


T = TypeVar("T", bound=BenchmarkTrainer)


def random_transformer(
    config: AnimaConfig, dtype: torch.dtype, device: torch.device, place: torch.device
) -> AnimaTransformer:
    """A frozen transformer that lies on `place`; its weights are drawn on `device`, one after the other."""
    with torch.device("meta"):
        transformer = AnimaTransformer(config)
    transformer = transformer.to(dtype).to_empty(device=place).requires_grad_(False)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in transformer.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, device=device, dtype=dtype) * weight.shape[-1] ** -0.5)
            else:
                weight.fill_(1.0)
    return transformer


def ready_trainer(case: Case, device: torch.device, config: AnimaConfig) -> BenchmarkTrainer:
    """A trainer with model, network and optimizer in place."""
    return made_trainer(BenchmarkTrainer, case_settings(case, device), config, len(case.sides))


def made_trainer(kind: type[T], settings: Settings, config: AnimaConfig, buckets: int) -> T:
    """The same of another kind, or with other settings. Those that run in float32 run on the CPU."""
    trainer = kind(settings, Accelerator(mixed_precision="no", cpu=settings.run.precision == "no"), config)
    models = trainer.load_models()
    module = import_network_module(settings.network.network_module)
    trainer.network = create_network(settings.network, module, network_arguments(settings.network, {}), *models)
    trainer.network.to(trainer.device).apply_to(None, models[0], False, True)
    trainer.place_models()
    trainer.network.train()
    trainer.make_parts(total_steps=1000, buckets=buckets)
    return trainer


def case_settings(case: Case, device: torch.device) -> Settings:
    """The settings that matter to a step; the rest as by default."""
    groups = {name: group() for name, group in run_groups().items()}
    precision = "bf16" if device.type == "cuda" else "no"
    run = RunSettings(
        mixed_precision=precision, gradient_checkpointing=case.checkpointing, selective_checkpointing=case.selective
    )
    optimizer = replace(groups["optimizer"], optimizer_type=case.optimizer, learning_rate=1e-4)
    network = NetworkSettings(**case.network)
    model = replace(groups["model"], anima_attention_backend=case.attention)
    changed = {"model": model, "run": run, "optimizer": optimizer, "network": network}
    changed |= {"speed": case.speed, "memory": case.memory}
    return Settings(**{**groups, **changed}, datasets=(), given={})


def endless_batches(case: Case, config: AnimaConfig, rank: int = 0) -> Iterator[Batch]:
    """Batches of random latents, bucket after bucket; each process of a run has its own."""
    generator = torch.Generator().manual_seed(rank)
    number = 0
    while True:
        width, height = case.sides[number % len(case.sides)]
        shape = (case.batch_size, config.latent_channels, 1, height // 8, width // 8)
        names = [f"{number}_{rank}_{row}" for row in range(case.batch_size)]
        yield Batch(
            pixels_BCHW=None,
            latents_BCTHW=torch.randn(shape, generator=generator),
            captions=names,
            keys=[(0, name, 0) for name in names],
            paths=[Path(name) for name in names],
            bucket=(width, height),
            counted=True,
            loss_weights=torch.ones(case.batch_size),
            timestep_offsets=[0] * case.batch_size,
        )
        number += 1


def step_teraflops(case: Case, config: AnimaConfig) -> float:
    """What a step must compute without recomputing: 2 x the forward's products and 3 x (forward, 2 backward) attention.

    The frozen weights need no gradient, so a product costs its forward and one backward product.
    """
    linear, attention = zip(*(forward_teraflops(side, config) for side in case.sides), strict=True)
    return case.batch_size * (2 * statistics.fmean(linear) + 3 * statistics.fmean(attention))


def forward_teraflops(side: tuple[int, int], config: AnimaConfig) -> tuple[float, float]:
    """Of the blocks' matrix products and of their attention, for one picture of (width, height) pixels."""
    tokens, width, context = image_tokens(side, config), config.width, 512
    linear = 2 * tokens * width * (6 * width + 2 * config.mlp_width)
    linear += 2 * context * 2 * config.context_width * width
    attention = 4 * tokens * width * (tokens + context)
    return config.depth * linear / 1e12, config.depth * attention / 1e12


def image_tokens(side: tuple[int, int], config: AnimaConfig) -> int:
    """Of a picture of (width, height) pixels."""
    return side[0] * side[1] // (8 * config.patch_size) ** 2
