"""Whole runs on the tiny model, through the same entry point as a user's."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import anima_train_network
import train_network
from anima_train_network import AnimaNetworkTrainer, main
from library.anima_runtime.text.encoding import CaptionStates, PaddedCaptions
from library.anima_runtime.transformer import Block
from library.data.dataset import Batch
from library.errors import Problems
from networks import lora_anima
from train_network import NetworkTrainer


def adapter(tmp_path: Path, name: str = "tiny") -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "output" / f"{name}.safetensors")


def test_a_run_writes_the_adapter_its_steps_and_epochs_with_metadata(config, tmp_path):
    # 4 pictures in 4 buckets, 10 repeats, batch 4: 3 batches a bucket, 12 steps an epoch.
    assert main(config(max_train_epochs=2, save_every_n_epochs=1, save_every_n_steps=10, save_precision="bf16")) == 0
    files = sorted(path.name for path in (tmp_path / "output").iterdir())
    assert files == [
        "tiny-000001.safetensors",
        "tiny-step00000010.safetensors",
        "tiny-step00000020.safetensors",
        "tiny.safetensors",
    ]
    written = tmp_path / "output" / "tiny.safetensors"
    with safe_open(written, "pt") as file:
        metadata = file.metadata()
    tensor_data = written.read_bytes()[8 + int.from_bytes(written.read_bytes()[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(tensor_data).hexdigest()
    assert (metadata["modelspec.architecture"], metadata["modelspec.resolution"]) == ("anima/lora", "64x64")
    assert metadata["ss_sd_model_name"] == "anima.safetensors"
    assert str(tmp_path) not in str(metadata) and json.loads(metadata["ss_anima_settings"])["output_dir"] == "output"
    assert metadata["ss_network_module"] == "networks.lora_anima"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "1.0")
    assert (metadata["ss_steps"], metadata["ss_epoch"], metadata["ss_num_epochs"]) == ("24", "2", "2")
    assert (metadata["ss_num_train_images"], metadata["ss_anima_depth"]) == ("40", "2")
    assert sum(json.loads(metadata["ss_tag_frequency"])["10_subject"].values()) > 4
    with safe_open(tmp_path / "output" / "tiny-000001.safetensors", "pt") as file:
        assert (file.metadata()["ss_steps"], file.metadata()["ss_epoch"]) == ("12", "1")

    tensors = adapter(tmp_path)
    assert len(tensors) == 3 * 40 + 24
    ups = [tensor for key, tensor in tensors.items() if key.endswith("lora_up.weight")]
    assert all(tensor.dtype == torch.bfloat16 and tensor.abs().max() > 0 for tensor in ups)
    assert list((tmp_path / "logs").glob("tiny_*/events.*"))


def test_blocks_in_main_memory_train_the_same_and_8_bit_ones_nearly(config, losses):
    main(config(max_train_steps=3))
    main(config(max_train_steps=3, blocks_to_swap=2))
    assert losses[3:] == losses[:3]
    main(config(max_train_steps=3, blocks_to_swap=1, fp8_base=True))
    assert losses[6:] != losses[:3]
    assert losses[6:] == pytest.approx(losses[:3], rel=0.05)


def test_overfitting_two_pictures_halves_the_frozen_models_loss(config, tiny_anima, tmp_path, losses):
    """The same 8 samples with the same noise each step: what the adapter learns shows as a falling loss."""
    folder = tmp_path / "two"
    folder.mkdir()
    for path in sorted((tiny_anima / "train" / "10_subject").glob("0*"))[:4]:
        shutil.copy(path, folder)
    words = config(
        train_data_dir=folder, max_train_steps=150, learning_rate=1e-2, network_dim=8, network_alpha=8,
        enable_bucket=False, log_with="none",
    )  # fmt: skip
    before = (tiny_anima / "anima.safetensors").read_bytes()
    trained = {}

    class Kept(AnimaNetworkTrainer):
        def train(self):
            super().train()
            trained["model"] = self.transformer

    original, anima_train_network.AnimaNetworkTrainer = anima_train_network.AnimaNetworkTrainer, Kept
    try:
        assert main(words) == 0
    finally:
        anima_train_network.AnimaNetworkTrainer = original

    start, end = losses[0], sum(losses[-20:]) / 20
    assert end < start / 2
    file = load_file(tiny_anima / "anima.safetensors")
    for name, parameter in trained["model"].named_parameters():
        assert torch.equal(parameter.cpu(), file[f"net.{name}"].float()), name
    assert (tiny_anima / "anima.safetensors").read_bytes() == before


def test_the_seed_decides_everything(config, tmp_path, losses):
    main(config(max_train_steps=3))
    first = adapter(tmp_path)
    main(config(max_train_steps=3, output_dir=tmp_path / "output"))
    again = adapter(tmp_path)
    main(config(max_train_steps=3, seed=7))
    other = adapter(tmp_path)
    assert losses[:3] == losses[3:6]
    assert losses[:3] != losses[6:]
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
    assert any(not torch.equal(tensor, other[key]) for key, tensor in first.items())


def test_cached_latents_and_text_give_the_losses_of_fresh_ones(config, losses):
    for cached in (True, False):
        main(config(max_train_steps=4, cache_latents=cached, cache_text_encoder_outputs=cached, log_with="none"))
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-5)


def test_gradient_checkpointing_gives_the_same_losses_and_adapter(config, tmp_path, losses):
    main(config(max_train_steps=4, gradient_checkpointing=False))
    without = adapter(tmp_path)
    main(config(max_train_steps=4, gradient_checkpointing=True))
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-6)
    for key, tensor in adapter(tmp_path).items():
        torch.testing.assert_close(tensor, without[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_and_stays_near_fp32(config, tmp_path, losses, precision):
    main(config(max_train_steps=6))
    main(config(max_train_steps=6, mixed_precision=precision))
    assert losses[6:] == pytest.approx(losses[:6], rel=0.03)
    ups = {key: tensor for key, tensor in adapter(tmp_path).items() if key.endswith("lora_up.weight")}
    assert all(tensor.isfinite().all() and tensor.abs().max() > 0 for tensor in ups.values())


def test_no_autocast_is_active_in_a_block(config, monkeypatch):
    """Products run in bfloat16 because the weights are; autocast would also round what is kept in float32."""
    seen, forward = [], Block.forward

    def watched(self, x_BLD, *others):
        seen.append((x_BLD.dtype, torch.is_grad_enabled(), torch.is_autocast_enabled(x_BLD.device.type)))
        return forward(self, x_BLD, *others)

    monkeypatch.setattr(Block, "forward", watched)
    assert main(config(max_train_steps=2, mixed_precision="bf16", fused_blocks=False)) == 0
    assert len(seen) >= 2 * 2  # steps, blocks
    assert set(seen) == {(torch.bfloat16, True, False)}


def test_accumulated_batches_make_one_step(config, tmp_path):
    assert main(config(train_batch_size=2, gradient_accumulation_steps=4, max_train_epochs=1)) == 0
    # 5 batches in each of 4 buckets, 4 a step
    with safe_open(tmp_path / "output" / "tiny.safetensors", "pt") as file:
        assert file.metadata()["ss_steps"] == "5"


def test_a_resumed_run_equals_an_uninterrupted_one(config, tmp_path, losses):
    options = {
        "network_dropout": 0.3,
        "lr_scheduler": "cosine",
        "shuffle_caption": True,
        "caption_tag_dropout_rate": 0.3,
    }
    main(config(max_train_steps=14, save_every_n_steps=5, save_state=True, **options))
    tensors = adapter(tmp_path)
    main(config(max_train_steps=14, resume=tmp_path / "output" / "tiny-step00000005-state", **options))
    assert losses[5:14] == losses[14:]
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in adapter(tmp_path).items())


def test_an_interrupted_run_saves_and_can_go_on(config, tmp_path, losses, monkeypatch, capsys):
    import os
    import signal

    main(config(max_train_steps=6))
    straight = adapter(tmp_path)
    step = NetworkTrainer.step

    def interrupted_at_three(self, batches, sample_count):
        if self.state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batches, sample_count)

    with monkeypatch.context() as patch:
        patch.setattr(NetworkTrainer, "step", interrupted_at_three)
        assert main(config(max_train_steps=6)) == 130
    state = tmp_path / "output" / "tiny-step00000003-state"
    said = capsys.readouterr().err
    assert f'stopped at step 3 of 6; go on with --resume "{state}"' in said
    assert "error" not in said
    assert any("lora_up" in key for key in adapter(tmp_path, "tiny-step00000003"))
    assert main(config(max_train_steps=6, resume=state)) == 0
    assert all(torch.equal(tensor, straight[key]) for key, tensor in adapter(tmp_path).items())
    assert main(config(max_train_steps=3, resume=state)) == 1
    assert "is at step 3, and this run ends at step 3: raise max_train_steps" in capsys.readouterr().err
    assert all(torch.equal(tensor, straight[key]) for key, tensor in adapter(tmp_path).items())


def test_a_signal_during_the_last_save_does_not_end_it(config, tmp_path, monkeypatch):
    import os
    import signal

    save = NetworkTrainer.save

    def save_with_signal(self, name, with_state):
        os.kill(os.getpid(), signal.SIGTERM)
        save(self, name, with_state)

    monkeypatch.setattr(NetworkTrainer, "save", save_with_signal)
    before = signal.signal(signal.SIGTERM, lambda number, frame: pytest.fail("the signal ended the run"))
    try:
        assert main(config(max_train_steps=2)) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert adapter(tmp_path)


def test_a_picture_lost_during_training_ends_the_run_with_a_message_and_a_state(
    config, tiny_anima, tmp_path, capsys, monkeypatch
):
    shutil.copytree(tiny_anima / "train", tmp_path / "train")
    step = NetworkTrainer.step

    def lose_pictures(self, batches, sample_count):
        if self.state.step == 1:
            shutil.rmtree(tmp_path / "train")
        return step(self, batches, sample_count)

    monkeypatch.setattr(NetworkTrainer, "step", lose_pictures)
    assert main(config(train_data_dir=tmp_path / "train", cache_latents=False, max_train_steps=20)) == 1
    assert "error: picture" in capsys.readouterr().err
    (state,) = (tmp_path / "output").glob("tiny-step*-state/run_state.json")
    step = int(state.parent.name[9:17])
    assert 2 <= step <= 8  # some batches had been loaded ahead
    assert adapter(tmp_path, f"tiny-step{step:08d}")


def test_sample_pictures_that_do_not_fit_the_gpu_are_left_out(config, tiny_anima, tmp_path, capsys, monkeypatch):
    def out_of_memory(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AnimaNetworkTrainer, "render_samples", out_of_memory)
    prompts = tiny_anima / "sample_prompts.txt"
    assert main(config(max_train_steps=2, sample_prompts=prompts, sample_every_n_steps=1)) == 0
    assert "sample pictures left out" in capsys.readouterr().err
    assert adapter(tmp_path)


def test_running_out_of_gpu_memory_saves_and_says_what_helps(config, tmp_path, capsys, monkeypatch):
    losses_of = AnimaNetworkTrainer.losses

    def out_of_memory(self, inputs):
        if self.state.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses_of(self, inputs)

    monkeypatch.setattr(AnimaNetworkTrainer, "losses", out_of_memory)
    assert main(config(max_train_steps=6)) == 1
    message = capsys.readouterr().err
    assert "out of memory while training a batch of" in message
    assert "gradient_checkpointing" in message
    assert adapter(tmp_path, "tiny-step00000002")
    assert (tmp_path / "output" / "tiny-step00000002-state" / "run_state.json").is_file()


def test_what_ended_a_run_is_told_also_where_nothing_can_be_saved(config, capsys, monkeypatch):
    losses = AnimaNetworkTrainer.losses

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def at_the_second_step(self, inputs):
        return losses(self, inputs) if self.state.step == 0 else out_of_memory()

    monkeypatch.setattr(AnimaNetworkTrainer, "losses", at_the_second_step)
    monkeypatch.setattr("train_network.copy_adapters", out_of_memory)
    assert main(config(max_train_steps=6)) == 1
    message = capsys.readouterr().err
    assert "the run ends unsaved: CUDA out of memory" in message
    assert "out of memory while training a batch of" in message


def test_a_long_caption_in_a_batch_leaves_the_others_alone(config, tiny_anima, tmp_path, monkeypatch):
    """A caption of more than 512 tokens lengthens its own context only: zero rows are part of the model's input."""
    trainers = []
    monkeypatch.setattr(AnimaNetworkTrainer, "train", lambda self: trainers.append(self))
    main(config())
    (trainer,) = trainers
    trainer.plan_models(Problems())
    trainer.choose_for_model()
    trainer.network = lora_anima.create_network(1.0, 4, 1.0, None, None, trainer.load_models()[0])
    trainer.prepare_text(tmp_path)
    short, long = "a red square", "a red square " * 300

    def batch(*captions):
        keys = [(0, f"{number}", 0) for number in range(len(captions))]
        latents = torch.zeros(len(captions), 16, 1, 8, 8)
        count = len(captions)
        paths, weights = [Path("x")] * count, torch.ones(count)
        return Batch(None, latents, list(captions), keys, paths, (64, 64), True, weights, [0] * count)

    shorts, longs = trainer.prepare(batch(short, long, short))
    (alone,) = trainer.prepare(batch(short))
    contexts = [trainer.context(PaddedCaptions(*inputs[-4:])) for inputs in (shorts, longs, alone)]
    assert [context.shape[:2] for context in contexts[::2]] == [(2, 512), (1, 512)]
    assert contexts[1].shape[0] == 1 and contexts[1].shape[1] > 512
    torch.testing.assert_close(contexts[0][1], contexts[2][0], rtol=1e-5, atol=1e-6)

    # Own kernels count zero rows without having them; both sides of a caption are padded to the longer one.
    trainer.fuses = True
    own = [trainer.context(PaddedCaptions(*inputs[-4:])) for inputs in trainer.prepare(batch(short, long, short))]
    assert [context.shape[:2] for context in own] == [(2, 128), contexts[1].shape[:2]]
    torch.testing.assert_close(own[0], contexts[0][:, :128], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own[1], contexts[1], rtol=1e-5, atol=1e-6)
    assert not contexts[0][:, 128:].any()
    settings = trainer.settings
    trainer.settings = replace(settings, run=replace(settings.run, preflight=True))
    (inputs,) = trainer.prepare(batch(short, short))
    assert inputs.t5_ids_BL.shape[1] == 512
    trainer.settings = settings
    uneven = CaptionStates(torch.zeros(200, trainer.config.llm_adapter.source_width), torch.tensor([5, 1]))
    trainer.captions = SimpleNamespace(encode=lambda captions: [uneven] * len(captions))
    (inputs,) = trainer.prepare(batch(short, short))
    assert inputs.qwen_states_BSD.shape[1] == inputs.t5_ids_BL.shape[1] == 256


def test_samples_are_rendered_at_first_and_by_epoch_without_touching_training(config, tiny_anima, tmp_path, losses):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square --w 64 --h 32 --s 2 --d 5\na blue circle --w 32 --h 32 --s 1 --l 1\n")
    main(config(max_train_steps=4))
    main(
        config(
            max_train_steps=4, sample_prompts=prompts, sample_every_n_steps=2, sample_at_first=True,
            network_dropout=0.0, cache_text_encoder_outputs=True,
        )
    )  # fmt: skip
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-5)
    folder = tmp_path / "output" / "sample"
    names = [path.name for path in sorted(folder.glob("tiny_*_[0-9][0-9]_*.png"))]
    assert [name[:15] for name in names] == [
        "tiny_000002_00_", "tiny_000002_01_", "tiny_000004_00_", "tiny_000004_01_",
        "tiny_base_00_20", "tiny_base_01_20", "tiny_e000000_00", "tiny_e000000_01",
    ]  # fmt: skip
    assert names[0].endswith("_5.png")
    with Image.open(folder / names[0]) as picture:
        assert picture.size == (64, 32)
        assert picture.text["parameters"].startswith("a red square\nNegative prompt: \nSteps: 2, Sampler: euler,")
        assert picture.text["adapter"] == "tiny, step 2"
    base, untrained, trained = (np.asarray(Image.open(folder / names[place]), dtype=float) for place in (4, 6, 2))
    assert np.array_equal(base, untrained)  # an adapter begins by changing nothing
    assert np.abs(base - trained).max() > 0
    sheets = [path.name for path in sorted(folder.glob("*_sheet.png"))]
    assert sheets == ["tiny_000002_sheet.png", "tiny_000004_sheet.png", "tiny_e000000_sheet.png"]
    with Image.open(folder / "tiny_grid.png") as grid:
        assert json.loads(grid.text["steps"]) == [-1, 0, 2, 4]
    (events,) = (path for path in (tmp_path / "logs").iterdir() if shown_pictures(path))
    assert shown_pictures(events) == ["sample/00", "sample/01", "sample/sheet", "sample_base/00", "sample_base/01"]


def test_sampling_leaves_what_training_draws_as_it_was(config, tmp_path, losses):
    """Sampled after each step or never: the same losses and weights bit for bit, whatever is drawn in a step."""
    (tmp_path / "prompts.txt").write_text("a red square --w 32 --h 32 --s 2\n", encoding="utf-8")
    settings = {
        "max_train_steps": 4, "network_dropout": 0.3, "shuffle_caption": True, "caption_tag_dropout_rate": 0.3,
        "cache_latents": False, "color_aug": True,
    }  # fmt: skip
    assert main(config(**settings)) == 0
    without = adapter(tmp_path)
    sampled = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 1, "sample_at_first": True}
    assert main(config(**settings, **sampled)) == 0
    assert len(list((tmp_path / "output" / "sample").glob("*_sheet.png"))) == 5
    assert losses[:4] == losses[4:]
    assert all(torch.equal(tensor, without[key]) for key, tensor in adapter(tmp_path).items())


def shown_pictures(folder: Path) -> list[str]:
    """The names of the pictures in a TensorBoard folder."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return sorted(events.Tags()["images"])


def test_a_failure_in_sampling_is_told_and_the_run_goes_on(config, tiny_anima, tmp_path, capsys, monkeypatch, losses):
    def broken(self):
        raise OSError("no space left")

    monkeypatch.setattr(AnimaNetworkTrainer, "render_samples", broken)
    prompts = tiny_anima / "sample_prompts.txt"
    assert main(config(max_train_steps=2, sample_prompts=prompts, sample_every_n_steps=1, network_dropout=0.5)) == 0
    assert capsys.readouterr().err.count("sample pictures left out: OSError: no space left") == 2
    assert len(losses) == 2


def test_samples_are_compiled_from_the_second_time_on(config, tiny_anima, monkeypatch):
    """Two renderings, without and with the adapter, the first time; then one."""
    depth, depths, render_samples = [], [], AnimaNetworkTrainer.render_samples

    @contextmanager
    def uncompiled():
        depth.append(True)
        yield
        depth.pop()

    def render(self):
        depths.append(len(depth))
        return render_samples(self)

    monkeypatch.setattr(train_network, "uncompiled", uncompiled)
    monkeypatch.setattr(AnimaNetworkTrainer, "render_samples", render)
    assert main(config(sample_prompts=tiny_anima / "sample_prompts.txt", sample_every_n_steps=1)) == 0
    assert depths == [1, 1, 0]


def test_recorded_steps_give_their_memory_to_samples(config, tiny_anima, tmp_path, capsys, monkeypatch):
    """The first try finds no room; after the recorded steps have given theirs back, the second does."""
    released, render_samples = [], AnimaNetworkTrainer.render_samples

    def short_of_memory(self):
        if self.captured is None:
            self.captured = SimpleNamespace(release=lambda: released.append(True))
            raise torch.OutOfMemoryError("CUDA out of memory")
        try:
            return render_samples(self)
        finally:
            self.captured = None

    monkeypatch.setattr(AnimaNetworkTrainer, "render_samples", short_of_memory)
    prompts = tiny_anima / "sample_prompts.txt"
    settings = {"sample_prompts": prompts, "sample_sampler": "euler_a", "sample_every_n_steps": 1}
    assert main(config(max_train_steps=1, **settings)) == 0
    assert "left out" not in capsys.readouterr().err
    assert len(released) == 2  # for the base model's pictures, and for the adapter's
    assert (tmp_path / "output" / "sample" / "tiny_grid.png").is_file()


def test_recorded_steps_give_their_memory_to_captions():
    """As to samples. Captions are encoded between steps, by a text encoder that comes to the card for that."""
    released, encoded = [], []

    def encode(captions):
        if not released:
            raise torch.OutOfMemoryError("CUDA out of memory")
        encoded.append(captions)

    trainer = object.__new__(AnimaNetworkTrainer)
    trainer.captured = SimpleNamespace(release=lambda: released.append(True))
    trainer.captions = SimpleNamespace(encode=encode)
    trainer.encode_ahead(["a cat", "a dog"])
    assert (len(released), encoded) == (1, [["a cat", "a dog"]])


def test_the_llm_adapter_can_be_left_out(config, tmp_path):
    main(config(train_llm_adapter=False))
    assert len(adapter(tmp_path)) == 3 * 20 + 9
    assert not any("llm_adapter" in key for key in adapter(tmp_path))


def test_training_can_start_from_an_adapter(config, tmp_path):
    main(config(max_train_steps=3))
    shutil.move(tmp_path / "output" / "tiny.safetensors", tmp_path / "start.safetensors")
    main(config(max_train_steps=1, network_weights=tmp_path / "start.safetensors", learning_rate=1e-9))
    start = load_file(tmp_path / "start.safetensors")
    for key, tensor in adapter(tmp_path).items():
        torch.testing.assert_close(tensor, start[key], rtol=0, atol=1e-7)


def test_empty_captions_train_alone_and_in_batches(config, losses):
    """Every caption dropped: one unmasked pad token for Qwen3 and the end token for T5, at any batch size."""
    for batch_size in (1, 4):
        assert main(config(caption_dropout_rate=1.0, train_batch_size=batch_size, max_train_steps=2)) == 0
    assert all(0 < loss < 10 for loss in losses)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network_args": ["target_modules=query"]}, "'query' matches nothing"),
        ({"network_args": ["target_modul=q_proj"]}, "no argument 'target_modul'"),
        ({"network_args": ["network_dim=8"]}, "network_args: network_dim cannot stand here"),
        ({"network_module": "networks.lora"}, "has no create_network"),
        ({"optimizer_args": ["beta=1"]}, "takes no 'beta'"),
        ({"resume": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_end_with_a_message_before_any_model_is_loaded(config, capsys, monkeypatch, settings, message):
    monkeypatch.setattr(AnimaNetworkTrainer, "load_models", lambda self: pytest.fail("a model was loaded"))
    assert main(config(**settings)) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "given", "message"),
    [
        ("pretrained_model_name_or_path", "qwen_image_vae.safetensors", "VAE"),
        ("pretrained_model_name_or_path", "qwen3.safetensors", "Qwen3"),
        ("vae", "anima.safetensors", "Anima"),
        ("qwen", "anima.safetensors", "Anima"),
        ("t5_tokenizer_dir", "qwen3", "spiece.model"),
        ("train_data_dir", "missing_folder", "missing_folder"),
        ("pretrained_model_name_or_path", "missing.safetensors", "missing.safetensors"),
    ],
)
def test_wrong_files_are_told_before_any_model_is_loaded(
    config, tiny_anima, capsys, monkeypatch, setting, given, message
):
    monkeypatch.setattr(AnimaNetworkTrainer, "load_models", lambda self: pytest.fail("a model was loaded"))
    assert main(config(**{setting: tiny_anima / given})) == 1
    error = capsys.readouterr().err
    assert message in error
    assert given in error
