"""What is told before any model is loaded: every mistake in one report, and what a run would be."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import torch

from anima_train_network import AnimaNetworkTrainer, main
from library.training import machine


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(AnimaNetworkTrainer, "load_models", lambda self: pytest.fail("a model was loaded"))


def test_all_mistakes_stand_in_one_report(config, tiny_anima, tmp_path, capsys):
    """One each of the settings, the model's files, the network, the optimizer, the schedule and the pictures."""
    shutil.copytree(tiny_anima / "train", tmp_path / "train")
    (tmp_path / "train" / "10_subject" / "broken.png").write_bytes(b"no picture")
    words = config(
        train_data_dir=tmp_path / "train",
        vae=tiny_anima / "anima.safetensors",
        t5_tokenizer_dir=tmp_path,
        auto_download_t5_tokenizer=False,
        sample_at_first=True,
        optimizer_args=["beta=1"],
        network_args=["target_modules=query"],
        xformers=True,
        anima_attention_backend="flash",
        initial_step=2,
        network_weights=tmp_path / "gone.safetensors",
    )
    assert main(words) == 1
    error = capsys.readouterr().err.partition("error: ")[2]
    for part in (
        "sample_at_first needs sample_prompts",
        "optimizer_args: AdamW takes no 'beta'",
        "these choose flash and xformers for attention; keep one of them",
        "gone.safetensors",
        "was given as a Qwen-Image VAE, and looks like an Anima",
        "spiece.model",
        "1 picture cannot be read",
    ):
        assert error.count(part) == 1, part


def test_mistakes_of_network_files_and_length_are_told_together(config, tiny_anima, capsys):
    words = config(
        network_args=["target_modules=query"], qwen=tiny_anima / "qwen3", initial_step=2, mixed_precision="bf16"
    )
    assert main(words) == 1
    error = capsys.readouterr().err.partition("error: ")[2].strip()
    assert "'query' matches nothing" in error.splitlines()[0]
    assert re.sub(r"^.*/config\.toml:\d+: ", "", error.splitlines()[1]) == (
        "initial_step: the run would start at step 2, and ends at step 2: lower it, or raise max_train_steps or "
        "max_train_epochs, which count from the very beginning"
    )


def test_a_dry_run_says_what_the_run_would_be(config, tmp_path, capsys):
    """12 steps an epoch; saved after steps 10 and 20 and after epoch 1, and at the end."""
    words = config(
        dry_run=True, max_train_epochs=2, save_every_n_steps=10, save_every_n_epochs=1, save_state_on_train_end=True
    )
    assert main(words) == 0
    told = capsys.readouterr().err
    assert "dry run: nothing is wrong" in told
    assert "model: 2 blocks, attention torch, gradient checkpointing off" in told
    assert "device: CPU, 1 process(es), model in float32" in told
    assert "length: 24 steps of 12 an epoch, from 4 pictures" in told
    assert "start: " not in told
    assert "training: AdamW, learning rate 0.001, constant\n" in told
    assert f"output: {tmp_path / 'output' / 'tiny'}.safetensors as comfy, in float\n" in told
    assert "files: 4 adapters of 0.1 MiB, 1 states of up to 0.2 MiB" in told
    assert not (tmp_path / "output").exists() and not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 0.5, "optimizer_args": ["weight_decay=0.1"]},
         "training: AdamW, weight_decay=0.1, learning rate 0.001, cosine, 1 steps of warmup"),
        ({"unet_lr": 3e-4, "llm_adapter_lr": 5e-5},
         "training: AdamW, learning rates transformer 0.0003, llm_adapter 5e-05, constant"),
        ({"optimizer_type": "AdaFactor", "lr_scheduler": "adafactor"},
         "training: AdaFactor, which sets its learning rate itself"),
        ({"optimizer_type": "Prodigy", "learning_rate": 1.0},
         "training: Prodigy, learning rate 1 times what it finds, constant"),
        ({"adapter_format": ["comfy", "kohya"], "save_precision": "fp16"}, ".safetensors as comfy, kohya, in fp16"),
    ],
)  # fmt: skip
def test_a_dry_run_says_how_is_trained_and_what_is_written(config, capsys, settings, line):
    if settings.get("optimizer_type") == "Prodigy":
        pytest.importorskip("prodigyopt")
    assert main(config(dry_run=True, **settings)) == 0
    assert f"{line}\n" in capsys.readouterr().err


def test_a_dry_run_says_that_the_learning_rate_is_a_default(config, capsys):
    words = config(dry_run=True)
    path = Path(words[1])
    path.write_text(path.read_text().replace("learning_rate = 0.001\n", ""))
    assert main(words) == 0
    line = "training: AdamW, learning rate 0.0001 (learning_rate is not set: its default), constant\n"
    assert line in capsys.readouterr().err
    assert main([*words, "--unet_lr", "3e-4"]) == 0
    assert "training: AdamW, learning rate 0.0003, constant\n" in capsys.readouterr().err


def test_a_dry_run_counts_what_trains(config, tiny_anima, capsys):
    """Against the names in the model's file: Linears and norms, those of the LLM adapter apart."""
    common = {"dry_run": True, "network_dim": 3, "network_alpha": 2}
    assert main(config(**common, train_norm=False, network_args=["target_modules=q_proj"], llm_adapter_lr=0)) == 0
    with safetensors.safe_open(tiny_anima / "anima.safetensors", "pt") as file:
        names = [name for name in file.keys() if "llm_adapter" not in name]  # noqa: SIM118
    projections, norms = (sum(name.endswith(f"{part}.weight") for name in names) for part in ("q_proj", "norm"))
    told = capsys.readouterr().err
    assert f"network: networks.lora_anima, alpha 2, target_modules=q_proj: {projections} lora rank 3\n" in told
    assert projections and norms


def test_a_dry_run_says_from_where_it_would_go_on(config, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    assert main(config(max_train_steps=2, save_state_on_train_end=True)) == 0
    state = tmp_path / "output" / "tiny-state"
    looking = {"dry_run": True, "resume": "latest", "overwrite_output": False}
    capsys.readouterr()
    assert main(config(max_train_steps=12, **looking)) == 0
    told = capsys.readouterr().err
    assert (
        "dry run: nothing is wrong\nmodel: " in told
        and f"\nstart: at step 2, from {state}; 10 steps are left\n" in told
    )
    assert main(config(max_train_steps=2, **looking)) == 1
    told = capsys.readouterr().err
    assert f"resume: {state} is at step 2, and this run ends at step 2: raise max_train_steps" in told
    assert "dry run" not in told
    assert main(config(max_train_steps=12, initial_step=5, dry_run=True)) == 0
    assert "\nstart: at step 5, from initial_step or initial_epoch; 7 steps are left\n" in capsys.readouterr().err


def test_a_folder_that_is_no_state_is_told_before_a_model_is_loaded(config, tmp_path, capsys):
    assert main(config(resume=tmp_path)) == 1
    assert f"resume: {tmp_path} is not a state folder (…-state): it has no run_state.json" in capsys.readouterr().err


def test_a_dry_run_reports_although_an_earlier_runs_files_would_stop_the_run(config, tmp_path, capsys):
    """As it writes nothing; with any other mistake there is no report, and both are told."""
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "tiny.safetensors").touch()
    stopped = "holds files of an earlier run named tiny (tiny.safetensors): give another output_name"
    looking = {"dry_run": True, "overwrite_output": False}
    assert main(config(resume="latest", **looking)) == 1
    report, _, error = capsys.readouterr().err.partition("error: ")
    assert "dry run: a run would stop at what is told below; nothing else is wrong\nmodel: " in report
    assert "no state of tiny" in report and "the run begins" not in report
    assert stopped in error
    assert main(config(initial_step=2, **looking)) == 1
    report, _, error = capsys.readouterr().err.partition("error: ")
    assert "dry run" not in report
    assert stopped in error and "initial_step: the run would start at step 2" in error


def test_a_dry_run_says_how_much_room_caches_take(config, tmp_path, capsys):
    """Four pictures of 1024x1024, each with its mirror image, at one byte a pixel."""
    words = config(
        dry_run=True, cache_latents_to_disk=True, flip_aug=True, enable_bucket=False, resolution=1024,
        cache_text_encoder_outputs_to_disk=True, text_cache_disk_gb=0.5,
    )  # fmt: skip
    assert main(words) == 0
    assert (
        "caches: 8 MiB of latents on disk, encoded captions, up to 2 GiB in main memory, and up to 0.5 GiB on disk\n"
    ) in capsys.readouterr().err


def test_the_planned_sizes_are_those_of_the_files(config, tmp_path, monkeypatch):
    """But for names and metadata, which take some 20 KB whatever the network."""
    plans = []
    plan_run = AnimaNetworkTrainer.plan_run
    monkeypatch.undo()
    monkeypatch.setattr(AnimaNetworkTrainer, "plan_run", lambda self: plans.append(plan_run(self)) or plans[-1])
    assert main(config(network_dim=64, max_train_steps=1, save_state=True, save_precision="bf16")) == 0
    files = plans[-1].files
    assert (tmp_path / "output" / "tiny.safetensors").stat().st_size == pytest.approx(files.adapter_bytes, abs=40_000)
    state = sum(file.stat().st_size for file in (tmp_path / "output" / "tiny-state").iterdir())
    assert state == pytest.approx(files.state_bytes, abs=200_000)
    assert files.adapter_bytes > 400_000 and files.state_bytes > 2_400_000


def test_a_dry_run_finds_mistakes_as_well(config, capsys):
    assert main(config(dry_run=True, network_args=["target_modules=query"])) == 1
    assert "'query' matches nothing" in capsys.readouterr().err


@pytest.mark.parametrize("looking", [{"dry_run": True}, {"show_lr_schedule": "rate.png"}])
def test_looking_at_a_run_touches_no_save(config, tmp_path, looking, monkeypatch):
    """Neither what is half written nor a state that was moved aside."""
    monkeypatch.chdir(tmp_path)
    names = {".tiny.99999999-0f.tmp.safetensors", ".tiny-step00000001-state.99999999.old"}
    for name in names:
        (tmp_path / "output" / name).mkdir(parents=True)
    assert main(config(**looking)) == 0
    assert {path.name for path in (tmp_path / "output").iterdir()} == names


@pytest.mark.parametrize("looking", [{"dry_run": True}, {}])
def test_a_run_over_an_earlier_ones_files_is_warned_of_them(config, tmp_path, capsys, monkeypatch, looking):
    monkeypatch.undo()
    (tmp_path / "output").mkdir()
    for name in ("tiny.safetensors", "tiny-step00000021.safetensors"):
        (tmp_path / "output" / name).touch()
    assert main(config(max_train_steps=1, **looking)) == 0
    told = capsys.readouterr().err
    assert told.count("warning: overwrite_output: an earlier run named tiny has left 2 files and states in") == 1
    assert "tiny.safetensors is the earlier run's until this one has ended" in told


def test_a_resumed_run_is_warned_of_none_of_its_own_files(config, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    assert main(config(max_train_steps=1, save_state=True)) == 0
    assert main(config(max_train_steps=2, save_state=True, resume="latest")) == 0
    assert "overwrite_output" not in capsys.readouterr().err


def test_a_file_in_place_of_the_output_folder_is_told_once(config, tmp_path, capsys):
    (tmp_path / "output").touch()
    assert main(config()) == 1
    assert capsys.readouterr().err.partition("error: ")[2].count("output_dir: ") == 1


def test_a_full_disk_is_told_before_the_run(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert main(config()) == 1
    assert f"output_dir: {tmp_path / 'output'} needs about 0.1 MiB" in capsys.readouterr().err


def test_what_a_resumed_run_has_saved_already_needs_no_room(config, tmp_path, capsys, monkeypatch):
    """Four states and adapters, 1.6 MiB in all, of which three are there; a new run of the kind has too little room."""
    monkeypatch.undo()
    words = config(max_train_steps=4, save_every_n_steps=1, save_state=True)
    assert main(words) == 0
    saved = sum(file.stat().st_size for file in (tmp_path / "output").rglob("*") if file.is_file())
    for path in ("tiny-state", "tiny.safetensors"):
        shutil.move(tmp_path / "output" / path, tmp_path / path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=int(saved * 0.6)))
    assert main([*words, "--dry_run", "--output_name", "other"]) == 1
    assert "its disk has" in capsys.readouterr().err
    assert main([*words, "--dry_run", "--resume", "latest"]) == 0


def test_a_disk_too_small_for_all_latents_is_warned_of(config, tmp_path, capsys, monkeypatch):
    """Pictures of 48x80, 64x64, 80x48 and 96x32, each with its mirror image, at one byte a pixel."""
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * 14848 - 1))
    settings = {"cache_latents_to_disk": True, "cache_dir": tmp_path / "not" / "yet", "dry_run": True}
    assert main(config(**settings, flip_aug=True, network_dim=1, train_norm=False, save_precision="fp16")) == 0
    assert "cache_latents_to_disk: all latents take about 0.0 MiB, and the disk of" in capsys.readouterr().err
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * 14848))
    main(config(**settings, flip_aug=True, network_dim=1, train_norm=False, save_precision="fp16"))
    assert "cache_latents_to_disk" not in capsys.readouterr().err


def test_a_cpu_is_warned_of_and_xformers_falls_back(config, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "xformers", None)
    assert main(config(dry_run=True, xformers=True)) == 0
    told = capsys.readouterr().err
    assert "warning: training on the CPU, which takes days for a real model" in told
    assert "warning: attention xformers does not work here, so torch's is used" in told
    assert "attention torch" in told


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [({"full_bf16": True}, "bfloat16"), ({"full_fp16": True}, "float16"), ({"mixed_precision": "bf16"}, "bfloat16")],
)
def test_the_models_precision(config, capsys, settings, dtype):
    assert main(config(dry_run=True, **settings)) == 0
    assert f"model in {dtype}\n" in capsys.readouterr().err


class OldCard:
    """A card of the Turing generation, or another."""

    def __init__(self, monkeypatch, capability):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 2080")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", None)


def test_a_card_without_bf16_is_told_to_use_fp16(monkeypatch):
    OldCard(monkeypatch, (7, 5))
    run = machine.RunSettings(mixed_precision="bf16")
    with pytest.raises(machine.UserError) as caught:
        machine.check_device(run, torch.device("cuda"))
    assert str(caught.value) == (
        'mixed_precision: NVIDIA GeForce RTX 2080 cannot compute in bf16; set mixed_precision = "fp16"'
    )
    with pytest.raises(machine.UserError, match=r"^full_bf16: "):
        machine.check_device(machine.RunSettings(full_bf16=True), torch.device("cuda"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_card_that_this_pytorch_cannot_use_is_told(monkeypatch, precision):
    OldCard(monkeypatch, (12, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])

    def no_kernel(*arguments, **keywords):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(torch, "ones", no_kernel)
    with pytest.raises(
        machine.UserError, match=r"built for sm_80, sm_90: CUDA error: no kernel image .* device\. Free"
    ):
        machine.check_device(machine.RunSettings(mixed_precision=precision), torch.device("cuda"))
