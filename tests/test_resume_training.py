"""Runs that are broken off, changed, and gone on with, through the same entry point as a user's."""

from __future__ import annotations

import errno
import json
import platform
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anima_train_network import AnimaNetworkTrainer, main
from library.anima_runtime import attention_backends
from library.training.saving import saves
from train_network import NetworkTrainer

QUICK = {"log_with": "none"}


def adapter(tmp_path: Path, name: str = "tiny") -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "output" / f"{name}.safetensors")


def state(tmp_path: Path, step: int) -> Path:
    return tmp_path / "output" / f"tiny-step{step:08d}-state"


EXACT = {
    "lokr, dropouts, shuffled and dropped captions, fresh latents": (
        {
            "network_module": "networks.lokr_anima", "network_args": ["module_dropout=0.2", "rank_dropout=0.2"],
            "shuffle_caption": True, "caption_tag_dropout_rate": 0.3, "caption_dropout_rate": 0.2,
            "cache_latents": False, "lr_scheduler": "cosine", "lr_warmup_steps": 2,
        },
        {"max_data_loader_n_workers": 1},
    ),
    "accumulation, one at a time, cached text": (
        {
            "train_batch_size": 1, "gradient_accumulation_steps": 3, "cache_text_encoder_outputs": True,
            "network_dropout": 0.2, "lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ["T_max=6"],
            "max_data_loader_n_workers": 2,
        },
        {"max_data_loader_n_workers": 0, "cache_text_encoder_outputs": False},
    ),
    "fused, averaged, measured, mirrored, cropped and coloured anew, tags held back, norms limited": (
        {
            "optimizer_args": ["fused=True", "weight_decay=0.1"], "ema_decay": 0.9, "validation_split": 0.25,
            "validate_every_n_steps": 2, "flip_aug": True, "color_aug": True, "random_crop": True,
            "cache_latents": False, "token_warmup_min": 1, "token_warmup_step": 5, "scale_weight_norms": 1.0,
            "lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 2, "max_data_loader_n_workers": 0,
        },
        {"max_data_loader_n_workers": 2, "persistent_data_loader_workers": True, "validate_every_n_steps": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_a_run_in_two_parts_equals_one_in_a_piece(name, config, tmp_path, losses):
    """Broken off in the middle of an epoch, and gone on with other workers and caches."""
    settings, changed = EXACT[name]
    assert main(config(max_train_steps=6, save_every_n_steps=4, save_state=True, **settings, **QUICK)) == 0
    straight = adapter(tmp_path)
    assert main(config(max_train_steps=6, resume=state(tmp_path, 4), **{**settings, **changed}, **QUICK)) == 0
    assert losses[6:] == losses[4:6]
    again = adapter(tmp_path)
    assert all(torch.equal(tensor, again[key]) for key, tensor in straight.items())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_state_holds_float32_whatever_is_computed_in(precision, dtype, config, tmp_path, losses):
    common = {"max_train_steps": 3, "mixed_precision": precision, **QUICK}
    assert main(config(save_every_n_steps=2, save_state=True, **common)) == 0
    straight, weights = adapter(tmp_path), load_file(state(tmp_path, 2) / "network.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    trained = [tensor for name, tensor in weights.items() if name.endswith("lora_up.weight") and tensor.any()]
    assert trained and not any(torch.equal(tensor, tensor.to(dtype).float()) for tensor in trained)
    assert main(config(resume=state(tmp_path, 2), **common)) == 0
    assert losses[3:] == losses[2:3]
    again = adapter(tmp_path)
    assert all(torch.equal(tensor, again[key]) for key, tensor in straight.items())


def test_a_state_of_the_end_of_an_epoch(config, tmp_path, losses):
    """Four pictures, each ten times and in a bucket of its own: ten at a time are four steps an epoch."""
    common = {"max_train_steps": 6, "train_batch_size": 10, "lr_scheduler": "cosine", **QUICK}
    assert main(config(save_every_n_epochs=1, save_state=True, **common)) == 0
    straight, folder = adapter(tmp_path), tmp_path / "output" / "tiny-000001-state"
    run_state = json.loads((folder / "run_state.json").read_text())
    assert [run_state[name] for name in ("step", "epoch", "step_in_epoch")] == [4, 1, 0]
    assert main(config(resume=folder, **common)) == 0
    assert losses[6:] == losses[4:6]
    again = adapter(tmp_path)
    assert all(torch.equal(tensor, again[key]) for key, tensor in straight.items())


def at_step(monkeypatch, number, act):
    step = NetworkTrainer.step

    def acting(self, batches, sample_count):
        if self.state.step == number - 1:
            act()
        return step(self, batches, sample_count)

    monkeypatch.setattr(NetworkTrainer, "step", acting)


def test_saving_on_demand_and_going_on_with_the_latest_state(config, tmp_path, losses, monkeypatch, capsys):
    output = tmp_path / "output"
    with monkeypatch.context() as patch:
        at_step(patch, 1, (output / "save").touch)
        at_step(patch, 2, (output / "save_stop").touch)
        assert main(config(max_train_steps=3, resume="latest", **QUICK)) == 130
    told = capsys.readouterr().err
    assert "no state of tiny in" in told
    assert all(told.count(f"saved {output / f'tiny-step0000000{step}-state'}") == 1 for step in (1, 2))
    names = sorted(path.name for path in output.iterdir())
    assert names == [f"tiny-step0000000{step}{end}" for step in (1, 2) for end in ("-state", ".safetensors")]
    assert main(config(max_train_steps=3, resume="latest", **QUICK)) == 0
    assert f"resumed from {state(tmp_path, 2)} at step 2 of 3" in capsys.readouterr().err
    assert main(config(max_train_steps=3, **QUICK)) == 0
    assert losses[3:] == losses[:3]


def test_what_a_resumed_run_may_change_and_what_not(config, tmp_path, losses, capsys, monkeypatch):
    common = {"save_state": True, **QUICK}
    assert main(config(max_train_steps=2, save_every_n_steps=1, **common)) == 0
    capsys.readouterr()

    # Another rate and length act, and are told.
    rates = []
    step = torch.optim.AdamW.step

    def recorded(self, *arguments):
        rates.append({group["lr"] for group in self.param_groups})
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", recorded)
        changed = {"learning_rate": 5e-4, "max_train_steps": 4, "lr_scheduler": "linear"}
        assert main(config(resume=state(tmp_path, 1), **changed, **common)) == 0
    assert rates[-3:] == [{5e-4 * (1 - done / 4)} for done in (1, 2, 3)]
    said = capsys.readouterr().err
    assert "learning_rate was 0.001, and is 0.0005" in said and "number of steps was 2, and is 4" in said
    assert "lr/transformer goes on from 0.000375; in the state it was 0.001" in said

    # Another optimizer starts anew from the same weights, or is refused.
    lion = {"optimizer_type": "SGDNesterov", "resume": state(tmp_path, 1)}
    assert main(config(max_train_steps=2, **lion, **common)) == 0
    assert losses[-1] == losses[1]
    assert "the weights are kept, and the optimizer starts anew: it was torch.optim.adamw" in capsys.readouterr().err
    assert main(config(max_train_steps=2, resume_ignore_optimizer_mismatch=False, **lion, **common)) == 1
    assert "set resume_ignore_optimizer_mismatch = true" in capsys.readouterr().err

    # Other data and another seed are told.
    other = {"seed": 7, "caption_dropout_rate": 0.5, "train_batch_size": 2}
    assert main(config(max_train_steps=2, resume=state(tmp_path, 1), **other, **common)) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning: resume: " in line]
    for text in ("seed was 42, and is 7", "caption_dropout_rate was 0.0, and is 0.5", "batch_size was 4, and is 2"):
        assert sum(text in line for line in warned) == 1

    # Another objective is told, or refused; another network is refused, before a model is loaded.
    monkeypatch.setattr(AnimaNetworkTrainer, "load_models", lambda self: pytest.fail("a model was loaded"))
    other = {"resume": state(tmp_path, 1), "anima_flow_shift": 1.5, "anima_resume_snapshot_strict": True}
    assert main(config(max_train_steps=2, **other, **common)) == 1
    assert "anima_flow_shift was unset, and is 1.5" in capsys.readouterr().err
    for setting, message in (
        ({"network_dim": 8}, "network_dim was 4, and is 8"),
        ({"network_alpha": 2}, r"network_alpha was 1\.0, and is 2\.0"),
        ({"network_args": ["target_modules=q_proj"]}, "network_args target_modules was unset, and is q_proj"),
        ({"network_args": ["rs_lora=True"]}, "network_args rs_lora was false, and is true"),
        ({"network_module": "networks.lokr_anima"}, r"network_module was networks\.lora_anima, and is networks\.lokr"),
        ({"network_module": "networks.loha_anima"}, r"network_module was networks\.lora_anima, and is networks\.loha"),
        ({"train_norm": False}, "train_norm was true, and is false"),
        ({"train_llm_adapter": False}, "train_llm_adapter was true, and is false"),
        ({"network_args": ["dora=True"]}, "network_args dora was false, and is true"),
    ):
        assert main(config(max_train_steps=2, resume=state(tmp_path, 1), **setting, **common)) == 1
        assert re.search(message, capsys.readouterr().err)


@pytest.fixture
def resumed(config, tmp_path, capsys):
    """resumed(qwen=path) -> what is told of the state of step 1 where those settings differ; "" where nothing is."""

    def told(**settings) -> str:
        capsys.readouterr()
        common = {"max_train_steps": 2, "resume": state(tmp_path, 1), "dry_run": True, **QUICK}
        code = main(config(anima_resume_snapshot_strict=True, **common, **settings))
        said = capsys.readouterr().err
        assert ("the run differs from the state" in said) == (code == 1)
        return said if code else ""

    return told


def test_other_weights_of_the_model_are_noticed_and_other_names_are_not(config, tiny_anima, tmp_path, resumed):
    first, second = (tmp_path / f"{name}.safetensors" for name in ("first", "second"))
    for seed, file in enumerate((first, second)):
        assert main(config(max_train_steps=1, seed=seed, **QUICK)) == 0
        (tmp_path / "output" / "tiny.safetensors").rename(file)
    common = {"base_weights": [str(first)], "qwen": tmp_path / "qwen3"}
    shutil.copytree(tiny_anima / "qwen3", tmp_path / "qwen3")
    assert main(config(max_train_steps=2, save_every_n_steps=1, save_state=True, **common, **QUICK)) == 0

    moved = tmp_path / "moved.safetensors"
    shutil.copy(first, moved)
    (tmp_path / "qwen3").rename(tmp_path / "text_encoder")
    common = {"base_weights": [str(moved)], "qwen": tmp_path / "text_encoder"}
    assert resumed(**common) == ""
    assert "base_weights was [" in resumed(**{**common, "base_weights": [str(second)]})
    assert "base_weights was [" in resumed(**{**common, "base_weights": []})
    assert "fp8_base was False, and is True" in resumed(**common, fp8_base=True)

    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "text_encoder", tmp_path / "other" / "text_encoder")
    weights = tmp_path / "other" / "text_encoder" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert "qwen was " in resumed(**{**common, "qwen": tmp_path / "other" / "text_encoder"})


def test_other_natural_language_is_noticed(config, tiny_anima, tmp_path, resumed):
    pictures = tmp_path / "pictures"
    shutil.copytree(next((tiny_anima / "train").iterdir()), pictures)
    texts = [picture.with_suffix(".nl.txt") for picture in pictures.glob("*.png")]
    for text in texts:
        text.write_text("A cat sits.")
    common = {"train_data_dir": pictures, "caption_mix": "tags=1, nl=1"}
    assert main(config(max_train_steps=2, save_every_n_steps=1, save_state=True, **common, **QUICK)) == 0
    assert resumed(**common) == ""
    for text in texts:
        text.write_text("A dog sits.")
    assert "natural language and masks was " in resumed(**common)


def test_a_state_that_knew_less_is_gone_on_with(config, tiny_anima, tmp_path, resumed):
    assert main(config(max_train_steps=2, save_every_n_steps=1, save_state=True, **QUICK)) == 0
    path = state(tmp_path, 1) / "resume_snapshot.json"
    written = json.loads(path.read_text())
    sections = written["sections"]
    del sections["model"]["base_weights"], sections["run"]["fp8_base"], sections["data"]["natural language and masks"]
    for identity in sections["model"].values():
        del identity["first_mib"]
    sections["model"]["qwen"] = {"folder": "qwen3"}
    path.write_text(json.dumps(written))
    assert resumed() == ""


def test_what_was_chosen_is_repeated_where_nothing_is_set(config, tmp_path, capsys, monkeypatch):
    """A CPU alone would not compute activations again; attention that is not there any more is told and replaced."""
    used = []
    losses_of = AnimaNetworkTrainer.losses

    def watched(self, inputs):
        used.append((self.transformer.gradient_checkpointing, self.attention[0]))
        return losses_of(self, inputs)

    monkeypatch.setattr(AnimaNetworkTrainer, "losses", watched)
    common = {"save_state": True, "max_train_steps": 4, **QUICK}
    chosen = {"gradient_checkpointing": True, "anima_attention_backend": "flash"}
    assert main(config(save_every_n_steps=1, **chosen, **common)) == 0
    straight = adapter(tmp_path)
    assert "gradient_checkpointing on: as set" in capsys.readouterr().err

    assert main(config(resume=state(tmp_path, 2), save_every_n_steps=3, **common)) == 0
    said = capsys.readouterr().err
    assert used == [(True, "flash")] * 6
    assert "anima_attention_backend flash: as in the resumed run" in said
    assert "gradient_checkpointing on: as in the resumed run" in said
    assert all(torch.equal(tensor, straight[key]) for key, tensor in adapter(tmp_path).items())
    again = json.loads((state(tmp_path, 3) / "resume_snapshot.json").read_text())["choices"]
    off = (
        "selective_checkpointing", "cpu_offload_checkpointing", "fused_blocks", "torch_compile", "cuda_graphs",
    )  # fmt: skip
    assert again == {**chosen, **dict.fromkeys(off, False), "device": "CPU"}

    monkeypatch.setattr(attention_backends, "_try_out", lambda *arguments: fail_to_run())
    assert main(config(resume=state(tmp_path, 3), gradient_checkpointing=False, **common)) == 0
    said = capsys.readouterr().err
    assert used[6:] == [(False, "torch")]
    assert "warning: attention flash does not work here, so torch's is used. The reason: no such kernel" in said
    assert "anima_attention_backend torch: flash, as in the resumed run, does not work here" in said


def fail_to_run():
    raise RuntimeError("no such kernel")


def test_a_state_tells_what_it_is_of(config, tmp_path):
    other = {
        "network_module": "networks.lokr_anima", "network_args": ["factor=4"], "train_norm": False,
        "anima_flow_shift": 1.5, "optimizer_type": "SGDNesterov", "lr_scheduler": "cosine",
    }  # fmt: skip
    assert main(config(max_train_steps=1, save_state_on_train_end=True, **other, **QUICK)) == 0
    folder = tmp_path / "output" / "tiny-state"
    written = json.loads((folder / "resume_snapshot.json").read_text())
    sections = written["sections"]
    assert (sections["topology"]["network_dim"], sections["topology"]["depth"]) == (4, 2)
    topology = {"network_module": "networks.lokr_anima", "network_args factor": "4", "network_args train_norm": "false"}
    assert topology.items() <= sections["topology"].items()
    assert sections["objective"]["anima_flow_shift"] == 1.5
    assert sections["optimizer"]["optimizer_type"] == "SGDNesterov"
    schedule = {"learning_rate": 1e-3, "lr_scheduler": "cosine", "number of steps": 1}
    assert schedule.items() <= sections["schedule"].items()
    packages = ("torch", "accelerate", "transformers", "diffusers", "safetensors")
    assert written["versions"] == {"python": platform.python_version(), **{name: version(name) for name in packages}}
    assert sections["model"]["vae"]["bytes"] > 0
    assert sections["data"]["number of pictures"] == 4
    assert str(tmp_path) not in json.dumps(written)
    run_state = json.loads((folder / "run_state.json").read_text())
    assert run_state["step"] == 1 and run_state["averages"]["losses_read"] == 1


def test_a_second_run_of_the_same_name_does_not_begin(config, tmp_path, capsys, monkeypatch):
    assert main(config(max_train_steps=1, **QUICK)) == 0
    before = (tmp_path / "output" / "tiny.safetensors").read_bytes()
    monkeypatch.setattr(AnimaNetworkTrainer, "load_models", lambda self: pytest.fail("a model was loaded"))
    assert main(config(max_train_steps=1, overwrite_output=False, **QUICK)) == 1
    assert re.search(r"toml:\d+: output_name: .* holds files of an earlier run named tiny", capsys.readouterr().err)
    assert (tmp_path / "output" / "tiny.safetensors").read_bytes() == before


def test_a_save_that_fails_does_not_end_the_run(config, tmp_path, capsys, monkeypatch):
    write = saves.write_state

    def full_at_first(folder, state):
        if folder.name == "tiny-step00000001-state":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, state)

    monkeypatch.setattr(saves, "write_state", full_at_first)
    assert main(config(max_train_steps=4, save_every_n_steps=1, save_last_n_steps=1, save_state=True, **QUICK)) == 0
    said = capsys.readouterr().err
    assert "saving tiny-step00000001 failed: the disk of" in said and "Free some room there" in said
    names = sorted(path.name for path in (tmp_path / "output").iterdir())
    kept = [f"tiny-step0000000{step}{end}" for step in (2, 3) for end in ("-state", ".safetensors")]
    assert names == ["tiny-state", *kept, "tiny.safetensors"]
