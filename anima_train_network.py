"""Trains an adapter for Anima:  accelerate launch anima_train_network.py --config_file my.toml"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from library.anima_runtime.checkpoint import check_transformer_file, load_transformer
from library.anima_runtime.devices import to_device
from library.anima_runtime.flow import add_noise, velocity_target
from library.anima_runtime.losses import elementwise_losses, timestep_weights
from library.anima_runtime.noise import draw_noise, perturb_noise
from library.anima_runtime.prompts import parse_prompt_lines
from library.anima_runtime.qwen3 import check_qwen_file, load_qwen3, plan_qwen3
from library.anima_runtime.sampling import render
from library.anima_runtime.text_encoding import (
    CachedTextEncoder,
    CaptionStates,
    PaddedCaptions,
    TextEncoder,
    pad_captions,
)
from library.anima_runtime.timesteps import base_sampling, draw_timesteps, flow_shift
from library.anima_runtime.tokenizers import (
    check_tokenizer,
    load_qwen_tokenizer,
    load_t5_tokenizer,
    plan_qwen_tokenizer,
    plan_t5_tokenizer,
    provide_tokenizer,
)
from library.anima_runtime.transformer import AnimaTransformer
from library.anima_runtime.vae import check_vae_file, load_vae
from library.console import show_error, show_log_messages
from library.data.dataset import Batch
from library.errors import UserError
from library.files import write_atomically
from library.settings import read_settings
from library.settings.answers import answers_instead
from library.training.interrupts import Interrupted
from library.training.run import chooses_checkpointing
from train_network import NetworkTrainer

logger = logging.getLogger("anima_train_network")


class TrainingInputs(NamedTuple):
    """Samples whose contexts are of one length, on the device; the last four are `PaddedCaptions`.

    weights_B: what each sample's loss is multiplied by.
    """

    noisy_BCTHW: Tensor
    timesteps_B: Tensor
    target_BCTHW: Tensor
    weights_B: Tensor
    qwen_states_BSD: Tensor
    qwen_mask_BS: Tensor
    t5_ids_BL: Tensor
    t5_mask_BL: Tensor


class AnimaNetworkTrainer(NetworkTrainer):
    """What is Anima's own in a training run."""

    def check_model_files(self) -> None:
        model, prompts = self.settings.model, self.settings.sampling.sample_prompts
        self.config = check_transformer_file(model.pretrained_model_name_or_path)
        check_vae_file(model.vae)
        check_qwen_file(model.qwen)
        tokenizers = self.settings.tokenizers
        self.qwen_tokenizer = plan_qwen_tokenizer(model.qwen, model.qwen_tokenizer_dir, tokenizers)
        self.t5_tokenizer = plan_t5_tokenizer(model.t5_tokenizer_dir, tokenizers)
        for tokenizer in (self.qwen_tokenizer, self.t5_tokenizer):
            check_tokenizer(tokenizer)
        self.prompts = parse_prompt_lines(prompts) if prompts is not None else []

    def planned_models(self) -> tuple[nn.Module, nn.Module]:
        return AnimaTransformer(self.config), plan_qwen3(self.settings.model.qwen)

    def load_models(self) -> tuple[nn.Module, nn.Module]:
        model = self.settings.model
        # Qwen3's activations are not known to stay within fp16.
        text_dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        # Tokenizers first: their download may fail, and the models take longer.
        tokenizers = (
            load_qwen_tokenizer(provide_tokenizer(self.qwen_tokenizer)),
            load_t5_tokenizer(
                provide_tokenizer(self.t5_tokenizer), self.settings.tokenizers.t5_tokenizer_validate_strict
            ),
        )
        text_encoder = TextEncoder(load_qwen3(model.qwen, text_dtype, self.device), *tokenizers)
        caches_text = self.settings.data.cache_text_encoder_outputs
        self.text_encoder = CachedTextEncoder(text_encoder) if caches_text else text_encoder
        self.vae = load_vae(model.vae, self.dtype, self.device)
        self.transformer = load_transformer(model.pretrained_model_name_or_path, self.dtype, self.device)
        self.transformer.gradient_checkpointing = chooses_checkpointing(self.settings.run, self.device)
        logger.info(
            "%s with %d blocks in %s on %s, gradient checkpointing %s",
            model.pretrained_model_name_or_path,
            self.config.depth,
            str(self.dtype).removeprefix("torch."),
            self.device,
            "on" if self.transformer.gradient_checkpointing else "off",
        )
        return self.transformer, text_encoder.qwen

    def encode_pixels(self, pixels_BCHW: Tensor) -> Tensor:
        return self.vae.encode(pixels_BCHW)

    def latents_are_cached(self) -> None:
        self.vae.to("cpu")

    def prepare(self, batch: Batch) -> list[TrainingInputs]:
        """Draws noise and timesteps, which follow from the samples' keys, and looks up the captions.

        A context is as long as its caption alone would make it, so captions that need more than the least length go
        through the model apart from the others: zero rows are part of the model's input, more of them change a result.
        """
        if batch.latents_BCTHW is None:
            latents = self.encode_pixels(batch.pixels_BCHW)
        else:
            latents = batch.latents_BCTHW.to(self.device, non_blocking=True)
        settings, keys, seed = self.settings, batch.keys, self.settings.run.seed
        drawn = draw_timesteps(keys, seed, settings.timesteps, batch.bucket, batch.timestep_offsets)
        weights = batch.loss_weights * timestep_weights(drawn, settings.timesteps.weighting_scheme)
        timesteps, weights = to_device(drawn, self.device), to_device(weights, self.device)
        noise = draw_noise(keys, seed, settings.noise, latents)
        noisy = add_noise(latents, perturb_noise(noise, keys, seed, settings.noise), timesteps)
        target = velocity_target(latents, noise)
        states = self.caption_states(batch.captions)
        rows_of: dict[int, list[int]] = {}
        for row, caption in enumerate(states):
            rows_of.setdefault(max(self.settings.model.anima_seq_len, len(caption.t5_ids)), []).append(row)
        prepared = []
        for length, rows in rows_of.items():
            text = pad_captions([states[row] for row in rows], self.device, length)
            chosen = slice(None) if len(rows_of) == 1 else rows
            prepared.append(TrainingInputs(noisy[chosen], timesteps[chosen], target[chosen], weights[chosen], *text))
        return prepared

    def caption_states(self, captions: Sequence[str]) -> list[CaptionStates]:
        """What the text encoder makes of each caption; with gradients where it is trained."""
        if self.network.trains("text_encoder"):
            return self.text_encoder.encode(captions, with_gradient=True)
        return self.text_encoder.encode(captions)

    def losses(self, inputs: TrainingInputs) -> Tensor:
        """Flow-matching loss of each sample, weighted."""
        context = self.context(PaddedCaptions(*inputs[-4:]))
        velocity = self.transformer(inputs.noisy_BCTHW, inputs.timesteps_B, context)
        errors = elementwise_losses(velocity, inputs.target_BCTHW, inputs.timesteps_B, self.settings.loss)
        return errors.mean(dim=(1, 2, 3, 4)) * inputs.weights_B

    def repeated_modules(self) -> Iterable[nn.Module]:
        return (*self.transformer.blocks, *self.transformer.llm_adapter.blocks)

    def capture_obstacle(self) -> str | None:
        if self.network.trains("text_encoder"):
            return "Qwen3 is trained, and its inputs are of any length"
        return super().capture_obstacle()

    def context(self, text: PaddedCaptions) -> Tensor:
        """The text context, with gradients where what makes it is trained."""
        with torch.set_grad_enabled(self.network.trains("text_encoder") or self.network.trains("llm_adapter")):
            return self.transformer.encode_context(*text, min_length=self.settings.model.anima_seq_len)

    def render_samples(self, folder: Path, tag: str) -> None:
        self.vae.to(self.device)
        for number, request in enumerate(self.prompts):
            picture = render(
                self.transformer, self.vae, self.text_encoder, request, self.device, self.settings.model.anima_seq_len
            )
            stamp = f"{datetime.now():%Y%m%d%H%M%S}"
            path = folder / f"{self.settings.saving.output_name}_{tag}_{number:02d}_{stamp}_{request.seed}.png"
            write_atomically(path, lambda file, picture=picture: picture.save(file, format="PNG"))
            logger.info("sample: %s", path.resolve())
        if self.settings.data.cache_latents:
            self.vae.to("cpu")

    def model_files(self) -> Mapping[str, Path]:
        return {"sd_model": self.settings.model.pretrained_model_name_or_path, "vae": self.settings.model.vae}

    def model_facts(self) -> Mapping[str, Any]:
        timesteps = self.settings.timesteps
        shift_varies = timesteps.timestep_sampling == "flux_shift"
        return {
            "ss_base_model_version": "anima",
            "ss_anima_depth": self.config.depth,
            "ss_gradient_checkpointing": self.transformer.gradient_checkpointing,
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
    # The main process renders samples and saves while others wait for it; by default they give up after 10 minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[patience])
    show_log_messages(accelerator.is_main_process)
    disable_progress_bar()  # transformers' own, for the second that Qwen3 takes to load
    words = sys.argv[1:] if arguments is None else arguments
    try:
        if answers_instead(words, accelerator.is_main_process):
            return 0
        AnimaNetworkTrainer(read_settings(words), accelerator).train()
    except Interrupted as stop:
        logger.info("%s", stop)
        return 130
    except UserError as error:
        if accelerator.is_main_process:
            show_error(error)
        return 1
    except KeyboardInterrupt:
        logger.error("stopped at once, without saving")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
