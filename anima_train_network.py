"""Trains an adapter for Anima:  accelerate launch anima_train_network.py --config_file my.toml"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from library.anima_runtime.attention_backends import choose_attention
from library.anima_runtime.checkpoint import check_transformer_file, load_transformer
from library.anima_runtime.devices import to_device
from library.anima_runtime.encoders import LazyTextEncoder, LazyVAE
from library.anima_runtime.known_models import KnownModels
from library.anima_runtime.memory.low_memory import BlockSwap, check_swap, place_transformer
from library.anima_runtime.memory.parking import Parking
from library.anima_runtime.memory.step_memory import AlsoThere, needed_memory
from library.anima_runtime.memory.weight_swap import WeightSwap
from library.anima_runtime.objective.flow import add_noise, velocity_target
from library.anima_runtime.objective.losses import elementwise_losses, timestep_weights
from library.anima_runtime.objective.noise import draw_noise, perturb_noise
from library.anima_runtime.objective.step_inputs import (
    CONTEXT_STEP,
    ContextInputs,
    Samples,
    TrainingInputs,
    by_context_length,
    context_step,
)
from library.anima_runtime.objective.timestep_plot import save_timestep_histogram
from library.anima_runtime.objective.timesteps import base_sampling, draw_timesteps, flow_shift, timestep_at
from library.anima_runtime.ops.block_ops import kernel_obstacle
from library.anima_runtime.sampling.prompts import read_prompts
from library.anima_runtime.sampling.recorded import RecordedForward
from library.anima_runtime.text.cache import TextCache
from library.anima_runtime.text.contexts import CaptionContext, ContextEncoder
from library.anima_runtime.text.encoding import CaptionStates, PaddedCaptions
from library.anima_runtime.text.tokenizer_plans import (
    TokenizerPlan,
    check_tokenizer,
    plan_qwen_tokenizer,
    plan_t5_tokenizer,
)
from library.anima_runtime.transformer import AnimaTransformer
from library.console import show_error, show_log_messages
from library.data.dataset import Batch
from library.data.picture_index import cache_folder
from library.data.pictures import Picture
from library.errors import Problems, UserError
from library.model_hashes import sha256_of
from library.planning.plan import RunPlan
from library.settings import settings_and_problems
from library.settings.answers import answers_instead
from library.tensor_cache import TensorCache, cache_key, identity_of
from library.training.captured import MOST_GRAPHS
from library.training.choices import (
    Choice,
    StepMemory,
    attention_choice,
    attention_wanted,
    choose_checkpointing,
    choose_fusing,
    choose_parking,
    choose_selecting,
)
from library.training.interrupts import Interrupted
from library.training.launcher import end_with_launcher
from library.training.preflight import memory_limit
from library.training.processes import is_first_to_tell, make_accelerator
from library.training.saving.snapshot import file_identity
from library.training.speed import MOST_FIXED_SHAPES, compile_modules, or_uncompiled
from library.training.watching.samples import SamplePicture
from networks.fused.blocks import fuse_blocks, fuse_obstacle
from networks.fused.checkpoint import parked_bytes
from networks.setup import may_change_text_encoder
from train_network import NetworkTrainer

logger = logging.getLogger("anima_train_network")

T = TypeVar("T")


class AnimaNetworkTrainer(NetworkTrainer):
    """What is Anima's own in a training run."""

    fuses = checkpoints = selects = parks = False
    context_step = CONTEXT_STEP

    def plan_models(self, problems: Problems) -> tuple[nn.Module, nn.Module] | None:
        def check(function: Callable[..., T], path: Path | None, *others: object) -> T | None:
            return problems.attempt(function, path, *others) if path is not None and path.exists() else None

        model, tokenizers = self.settings.model, self.settings.tokenizers
        self.config = check(check_transformer_file, model.pretrained_model_name_or_path)
        check(self.plan_vae, model.vae)
        qwen_tokenizer = check(plan_qwen_tokenizer, model.qwen, model.qwen_tokenizer_dir, tokenizers)
        t5_tokenizer = plan_t5_tokenizer(model.t5_tokenizer_dir, tokenizers)
        qwen = check(self.plan_text_encoder, model.qwen, qwen_tokenizer, t5_tokenizer)
        for tokenizer in (qwen_tokenizer, t5_tokenizer):
            if tokenizer is not None:
                problems.attempt(check_tokenizer, tokenizer)
        sampling = self.settings.sampling
        self.prompts = check(read_prompts, sampling.sample_prompts, sampling.sample_sampler) or []
        if self.config is None or qwen is None:
            return None
        problems.attempt(check_swap, self.settings.memory, self.config.depth)
        with torch.device("meta"):
            return AnimaTransformer(self.config), qwen

    def plan_vae(self, path: Path) -> None:
        """ModelFileError: the file is not a VAE."""
        dtype = torch.float32 if self.settings.model.no_half_vae else self.dtype
        known = self.known_models(self.settings.data.cache_latents_to_disk)
        self.vae = LazyVAE(path, dtype, self.device, known)
        if not self.vae.is_known:
            self.vae.check()

    def plan_text_encoder(self, path: Path, qwen_tokenizer: TokenizerPlan, t5_tokenizer: TokenizerPlan) -> nn.Module:
        """Qwen3 on the meta device, or what stands for it. ModelFileError: the files are not Qwen3's."""
        # Qwen3's activations are not known to stay within fp16.
        dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        stays_as_it_is = not may_change_text_encoder(self.settings.network)
        known = self.known_models(self.settings.data.cache_text_encoder_outputs_to_disk and stays_as_it_is)
        strict = self.settings.tokenizers.t5_tokenizer_validate_strict
        self.text_encoder = LazyTextEncoder(path, dtype, self.device, qwen_tokenizer, t5_tokenizer, strict, known)
        return nn.Module() if self.text_encoder.is_known else self.text_encoder.plan_qwen()

    def known_models(self, caches_to_disk: bool) -> KnownModels:
        """What is remembered in the cache folder of the first pictures; nothing where the run leaves no files there."""
        subsets = [subset for dataset in self.settings.datasets for subset in dataset.subsets]
        folder = next((subset.image_dir for subset in subsets if subset.image_dir is not None), None)
        if folder is None or not caches_to_disk:
            return KnownModels(None)
        file = cache_folder(folder, self.settings.data.cache_dir) / "models.json"
        return KnownModels(file, writes=self.accelerator.is_main_process)

    def plan_run(self) -> RunPlan:
        plan = super().plan_run()
        self.choose_for_model()
        return plan

    def choose_for_model(self) -> None:
        """Chooses how the model computes attention."""
        asked = self.settings.model.attention_backend
        wanted = attention_wanted(asked, self.before)
        self.attention = choose_attention(wanted, self.config.head_size, self.dtype, self.device)
        self.choices = [attention_choice(asked, self.before, self.attention[0])]

    def described(self, plan: RunPlan) -> str:
        if self.settings.run.dry_run:  # else it was chosen when the models were there
            fuses = choose_fusing(self.settings.speed, self.before, self.device, self.dtype, lambda: None)
            self.choose_memory(bool(fuses.value), plan.network)
        checkpointing = "on" if self.checkpoints else "selective" if self.selects else "off"
        model = f"{self.config.depth} blocks, attention {self.attention[0]}, gradient checkpointing {checkpointing}"
        return f"model: {model}\n{super().described(plan)}"

    def shows_only(self, plan: RunPlan) -> bool:
        shows_schedule = super().shows_only(plan)
        path = self.settings.timesteps.show_timesteps
        if path is not None and self.accelerator.is_main_process:
            uses = (
                ((epoch, picture.key, repeat), picture.bucket, picture.subset.timestep_offset)
                for epoch in range(-(-plan.total_steps // plan.epoch_steps))
                for picture in plan.pictures
                for repeat in range(picture.repeats)
            )
            save_timestep_histogram(path, uses, self.settings.run.seed, self.settings.timesteps)
        return path is not None or shows_schedule

    def load_models(self) -> tuple[nn.Module, nn.Module]:
        model = self.settings.model
        # Those that are sure to be used: both for samples, and one that no earlier run has loaded.
        for encoder in (self.text_encoder, self.vae):
            if self.prompts or not encoder.is_known:
                encoder.load()
        place = "cpu" if self.settings.memory.is_used else self.device
        self.transformer = load_transformer(model.pretrained_model_name_or_path, self.dtype, place)
        self.transformer.use_attention(self.attention[1])
        path, dtype = model.pretrained_model_name_or_path, str(self.dtype).removeprefix("torch.")
        logger.info("%s with %d blocks in %s on %s", path, self.config.depth, dtype, self.device)
        return self.transformer, nn.Module() if self.text_encoder.is_known else self.text_encoder.loaded.qwen

    def place_models(self) -> None:
        if self.settings.memory.is_used:
            place_transformer(self.transformer, self.settings.memory, self.device)

    def encode_pixels(self, pixels_BCHW: Tensor) -> Tensor:
        return self.vae.loaded.encode(pixels_BCHW)

    def latent_identity(self) -> str:
        return self.vae.identity()

    def prepare_text(self, folder: Path) -> None:
        data = self.settings.data
        encoder, kind = self.text_encoder, CaptionStates
        if self.has_frozen_context():
            encoder, kind = ContextEncoder(self.text_encoder, self.transformer, self.device), CaptionContext
        if data.caches_text:
            files, identity = None, ""
            if data.cache_text_encoder_outputs_to_disk:
                files = TensorCache(folder, limit=int(data.text_cache_disk_gb * 2**30))
                identity = cache_key(self.text_encoder.identity(), identity_of(self.transformer.llm_adapter))
            encoder = TextCache(encoder, kind, int(data.text_cache_memory_gb * 2**30), files, identity)
            self.text_encoder.leave_device()
        self.captions = encoder

    def encode_ahead(self, captions: Sequence[str]) -> None:
        # Recorded steps may hold the memory that Qwen3 takes meanwhile.
        self.with_room(lambda: self.captions.encode(captions))

    def latents_are_cached(self) -> None:
        self.vae.leave_device()

    def prepare(self, batch: Batch) -> list[TrainingInputs] | list[ContextInputs]:
        """Draws noise and timesteps, which follow from the samples' keys, and looks up the captions."""
        seed = self.settings.run.seed
        timesteps = draw_timesteps(batch.keys, seed, self.settings.timesteps, batch.bucket, batch.timestep_offsets)
        return self.inputs(batch, timesteps, seed)

    def prepare_at(self, batch: Batch, share: float) -> list[TrainingInputs] | list[ContextInputs]:
        timesteps = [
            timestep_at(share, self.settings.timesteps, batch.bucket, offset) for offset in batch.timestep_offsets
        ]
        # Each share its own noise, and the same in runs of any seed.
        return self.inputs(batch, torch.tensor(timesteps), seed=round(share * 1000))

    def timestep_at(self, share: float, picture: Picture) -> float:
        return timestep_at(share, self.settings.timesteps, picture.bucket, picture.subset.timestep_offset)

    def inputs(self, batch: Batch, drawn: Tensor, seed: int) -> list[TrainingInputs] | list[ContextInputs]:
        """What the batch is at timesteps [B], with noise that follows from its keys and the seed."""
        if batch.latents_BCTHW is None:
            latents = self.encode_pixels(batch.pixels_BCHW)
        else:
            latents = to_device(batch.latents_BCTHW, self.device)
        settings, keys = self.settings, batch.keys
        weights = batch.loss_weights * timestep_weights(drawn, settings.timesteps.weighting_scheme)
        mask = batch.loss_mask_B1HW if batch.loss_mask_B1HW is not None else torch.ones(len(keys), 1, 1, 1)
        timesteps, weights, mask = (to_device(each, self.device) for each in (drawn, weights, mask))
        noise = draw_noise(keys, seed, settings.noise, latents)
        noisy = add_noise(latents, perturb_noise(noise, keys, seed, settings.noise), timesteps)
        target = velocity_target(latents, noise)
        samples = Samples(noisy, timesteps, target, weights, mask)
        # A trial has all zero rows, as other captions of its bucket may be longer.
        row_step = self.context_step if self.fuses and not settings.run.preflight else None
        captions = self.encoded_captions(batch.captions)
        return by_context_length(samples, captions, settings.model.anima_seq_len, row_step)

    def has_frozen_context(self) -> bool:
        """Whether nothing that makes the text context has adapters; a file's change it at rate 0 as well."""
        return not (self.network.adapts("text_encoder") or self.network.adapts("llm_adapter"))

    def encoded_captions(self, captions: Sequence[str]) -> list[CaptionStates] | list[CaptionContext]:
        """What of each caption goes into `losses`; with gradients where the text encoder is trained."""
        if self.network.adapts("text_encoder"):
            return self.text_encoder.encode(captions, with_gradient=True)
        return self.captions.encode(captions)

    def losses(self, inputs: TrainingInputs | ContextInputs) -> Tensor:
        """Flow-matching loss of each sample, weighted; of masked ones the mean over what they train."""
        if isinstance(inputs, ContextInputs):
            context = inputs.context_BLD
        else:
            context = self.context(PaddedCaptions(*inputs[-4:]))
        zero_rows = max(0, self.settings.model.anima_seq_len - context.shape[1])
        velocity = self.transformer(inputs.noisy_BCTHW, inputs.timesteps_B, context, zero_rows)
        errors = elementwise_losses(velocity, inputs.target_BCTHW, inputs.timesteps_B, self.settings.loss)
        errors = errors * inputs.mask_B1HW[:, :, None]
        return errors.mean(dim=(1, 2, 3, 4)) * inputs.weights_B

    def compile_blocks(self, buckets: int) -> None:
        self.transformer.lengths_vary = buckets > MOST_FIXED_SHAPES
        compile_modules(self.transformer.blocks, self.transformer.lengths_vary)
        self.transformer.run_blocks = or_uncompiled(self.transformer.run_blocks)
        # A frozen LLM adapter runs ahead of the steps, and as it is: compiled it would round otherwise, and a cache's
        # entries depend on that.
        if not self.has_frozen_context():
            llm_adapter = self.transformer.llm_adapter
            compile_modules(llm_adapter.blocks, shapes_vary=False)
            llm_adapter.run_rows = or_uncompiled(llm_adapter.run_rows)

    def fuse_obstacle(self) -> str | None:
        return fuse_obstacle(self.transformer, self.network) or kernel_obstacle(self.device)

    def choose_memory(self, fuses: bool, network: nn.Module | None) -> list[Choice]:
        run, tokens = self.settings.run, self.most_tokens()
        swaps, memory = self.settings.memory.blocks_to_swap > 0, self.step_memory(tokens, fuses, network)
        checkpointing = choose_checkpointing(run, self.before, self.device, swaps, fuses, memory)
        self.checkpoints = bool(checkpointing.value)
        selecting = choose_selecting(run, self.checkpoints, fuses, memory)
        waiting = parked_bytes(self.config, tokens, self.dtype) * self.accelerator.num_processes
        parking = choose_parking(run, self.device, self.checkpoints, fuses, waiting)
        self.selects, self.parks = bool(selecting.value), bool(parking.value)
        return [checkpointing, selecting, parking]

    def step_memory(self, tokens: int, fuses: bool, network: nn.Module | None) -> StepMemory | None:
        """What the run takes of the card without gradient checkpointing; None without a card."""
        limit = memory_limit(self.device)
        if limit is None:
            return None
        data, eight_bits = self.settings.data, self.settings.memory.fp8_base
        renders = self.settings.sampling.sample_prompts is not None
        also = AlsoThere(qwen=not data.caches_text, vae=not data.caches_latents, samples=renders)
        needed = needed_memory(self.config, tokens, self.dtype, eight_bits, fuses, network, also)
        return StepMemory(*needed, limit)

    def most_tokens(self) -> int:
        """Of a batch, by the buckets that there may be."""
        pixels = max(
            (
                width * height * dataset.batch_size
                for dataset in self.settings.datasets
                for width, height in dataset.sizes
            ),
            default=0,
        )
        return pixels // (8 * self.config.patch_size) ** 2

    def fuse_blocks(self, buckets: int) -> None:
        self.context_step = context_step(buckets, self.settings.model.anima_seq_len, MOST_GRAPHS)
        swapped = self.settings.memory.blocks_to_swap
        swap = WeightSwap(swapped, self.device) if swapped else None
        parking = Parking(self.device) if self.parks else None
        fuse_blocks(self.transformer, self.network, parking, swap, self.selects)
        self.transformer.gradient_checkpointing = self.checkpoints
        self.fuses = True
        torch.cuda.empty_cache()  # weights have moved: where they were, as much again would stay reserved

    def keep_modules(self) -> None:
        self.transformer.gradient_checkpointing = self.checkpoints
        if self.settings.memory.blocks_to_swap:
            BlockSwap(self.transformer, self.settings.memory.blocks_to_swap, self.device)

    def compile_obstacle(self) -> str | None:
        if self.fuses:  # trying the compiler takes seconds, for nothing then
            return "own kernels compute them (fused_blocks)"
        if self.settings.memory.blocks_to_swap:
            return "blocks_to_swap moves the weights"
        is_cuda = self.device.type == "cuda"
        if self.settings.memory.fp8_base and is_cuda and torch.cuda.get_device_capability(self.device) < (8, 9):
            return "fp8_base needs compute capability 8.9 for that"
        return None

    def capture_obstacle(self) -> str | None:
        if self.settings.memory.blocks_to_swap and not self.fuses:
            return "blocks_to_swap moves the weights"
        if self.network.adapts("text_encoder"):
            return "Qwen3 has adapters, and its inputs are of any length"
        return super().capture_obstacle()

    def memory_savers(self) -> list[str]:
        data, memory = self.settings.data, self.settings.memory
        subsets = [subset for dataset in self.settings.datasets for subset in dataset.subsets]
        changes_pictures = any(subset.redrawn_by for subset in subsets)
        offers = {
            "cache_latents = true": not (data.caches_latents or changes_pictures),
            "cache_text_encoder_outputs = true": not (data.caches_text or self.network.adapts("text_encoder")),
            "selective_checkpointing = true": self.fuses and not (self.checkpoints or self.selects),
            "gradient_checkpointing = true": not self.checkpoints,
            "cpu_offload_checkpointing = true": self.checkpoints and self.fuses and not self.parks,
            "fp8_base = true": not memory.fp8_base,
            f"blocks_to_swap = {self.config.depth // 2}": memory.blocks_to_swap == 0,
        }
        return [setting for setting, helps in offers.items() if helps]

    def context(self, text: PaddedCaptions) -> Tensor:
        """The text context, with gradients, as long as the captions are padded."""
        return self.transformer.encode_context(*text, min_length=0)

    def render_samples(self) -> list[SamplePicture]:
        from library.anima_runtime.sampling.rendering import render

        vae = self.vae.loaded.to(self.device)
        min_length = self.settings.model.anima_seq_len
        # Recorded anew each time, as the adapter may lie elsewhere by then, or be left out.
        forward = self.transformer if self.captured is None else RecordedForward(self.transformer)
        try:
            pictures = [
                render(self.transformer, vae, self.text_encoder, request, self.device, min_length, forward)
                for request in self.prompts
            ]
        finally:
            if self.settings.data.caches_latents:
                self.vae.leave_device()
        return [
            SamplePicture(picture, request.seed, request.parameters())
            for picture, request in zip(pictures, self.prompts, strict=True)
        ]

    def model_files(self) -> Mapping[str, Path]:
        return {"sd_model": self.settings.model.pretrained_model_name_or_path, "vae": self.settings.model.vae}

    def model_identity(self) -> Mapping[str, Mapping[str, Any]]:
        model = self.settings.model
        files = ("pretrained_model_name_or_path", "vae", "qwen")
        identities: dict[str, Any] = {name: file_identity(getattr(model, name)) for name in files}
        merged = [sha256_of(file)[:16] for file in self.settings.network.base_weights]
        return {"topology": asdict(self.config), "model": {**identities, "base_weights": merged or None}}

    def model_facts(self) -> Mapping[str, Any]:
        timesteps = self.settings.timesteps
        shift_varies = timesteps.timestep_sampling == "flux_shift"
        return {
            "ss_base_model_version": "anima",
            "ss_anima_depth": self.config.depth,
            "ss_anima_attention_backend": self.attention[0],
            "ss_gradient_checkpointing": self.transformer.gradient_checkpointing,
            "ss_fp8_base": self.settings.memory.fp8_base,
            "ss_timestep_sampling": timesteps.timestep_sampling or base_sampling(timesteps),
            "ss_sigmoid_scale": timesteps.anima_sigmoid_scale,
            "ss_discrete_flow_shift": None if shift_varies else flow_shift(timesteps, (1024, 1024)),
            "ss_noise_offset": self.settings.noise.anima_noise_offset,
            # Adapters of every type are ".../lora" to readers of this key; ss_network_module tells the type.
            "modelspec.architecture": "anima/lora",
            "modelspec.implementation": "https://github.com/comfyanonymous/ComfyUI",
            # The specification lists epsilon and v, which are of another kind: this model predicts ε - x_0.
            "modelspec.prediction_type": "rectified_flow",
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the trainer; returns the exit code: 0 done, 1 something to put right, 130 interrupted."""
    end_with_launcher()
    accelerator = make_accelerator()
    show_log_messages(accelerator.is_main_process)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        if answers_instead(words, accelerator.is_main_process):
            return 0
        settings, problems = settings_and_problems(words)
        AnimaNetworkTrainer(settings, accelerator, problems).train()
        accelerator.end_training()  # else the threads of a process group may abort a process at its exit
    except Interrupted as stop:
        logger.info("%s", stop)
        accelerator.end_training()
        return 130
    except UserError as error:
        if is_first_to_tell(str(error)):
            show_error(error)
        return 1
    except KeyboardInterrupt:
        logger.error("stopped at once: what was not saved by then is lost")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
