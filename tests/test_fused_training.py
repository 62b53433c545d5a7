"""Whole runs with fused blocks, by their plain formulas on the CPU, against runs module by module."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

import anima_train_network
from anima_train_network import main
from library.training import choices


@pytest.fixture
def no_obstacles(monkeypatch):
    """Blocks are fused where that is asked for, whatever the machine and the model's widths."""
    monkeypatch.setattr(choices, "fuse_obstacle", lambda *_: None)
    monkeypatch.setattr(anima_train_network, "fuse_obstacle", lambda *_: None)
    monkeypatch.setattr(anima_train_network, "kernel_obstacle", lambda *_: None)


RUNS = {
    "accumulation, an average, validation and samples": {
        "gradient_accumulation_steps": 2, "ema_decay": 0.9, "validation_split": 0.25, "validate_every_n_steps": 2,
        "sample_every_n_steps": 2, "gradient_checkpointing": True,
    },
    "lokr, a frozen part, weights that the optimizer swaps": {
        "network_module": "networks.lokr_anima", "network_args": ["factor=4", "network_reg_lrs=.*q_proj=0"],
        "optimizer_type": "AdamWScheduleFree", "validation_split": 0.25, "validate_every_n_steps": 2,
    },
    "loraplus, norms limited, a copy to roll back to": {
        "network_args": ["loraplus_lr_ratio=4", "rs_lora=True"], "scale_weight_norms": 0.01,
        "on_nonfinite": "rollback", "cache_text_encoder_outputs": True, "train_llm_adapter": False,
    },
    "weights of 8 bits, some in main memory, samples among the steps": {
        "fp8_base": True, "blocks_to_swap": 1, "gradient_accumulation_steps": 2, "sample_at_first": True,
        "sample_every_n_steps": 2, "validation_split": 0.25, "validate_every_n_steps": 1,
    },
    "all blocks in main memory, one of them trained": {
        "blocks_to_swap": 2, "network_args": ["target_modules=blocks.1.*", "train_norm=False"],
    },
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_a_fused_run_equals_a_plain_one(config, tiny_anima, tmp_path, losses, no_obstacles, capsys, run):
    settings = {"sample_prompts": tiny_anima / "sample_prompts.txt", **RUNS[run], "max_train_steps": 3}
    adapters = []
    for name, fuses in (("plain", False), ("fused", True)):
        assert main(config(**settings, output_name=name, fused_blocks=fuses)) == 0
        assert f"fused_blocks {'on' if fuses else 'off'}" in " ".join(capsys.readouterr().err.split())
        adapters.append([load_file(path) for path in sorted((tmp_path / "output").glob(f"{name}*.safetensors"))])
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-5)
    for plain, fused in zip(*adapters, strict=True):
        for name, tensor in plain.items():
            assert (fused[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


def test_what_is_computed_again_follows_the_cards_memory_and_changes_no_loss(
    config, tmp_path, losses, no_obstacles, capsys, monkeypatch
):
    """A card is made up for which the run would take 18 GiB, 11 selectively."""
    asked = []
    monkeypatch.setattr(
        anima_train_network, "needed_memory", lambda *facts: asked.append(facts) or (18 * 2**30, 11 * 2**30)
    )
    found = []
    for limit in (22, 15, 10):
        monkeypatch.setattr(anima_train_network, "memory_limit", lambda device, limit=limit: limit * 2**30)
        words = {"fused_blocks": True, "max_train_steps": 2, "cache_latents": True, "train_batch_size": 3}
        assert main(config(**words, dry_run=True)) == 0
        told = capsys.readouterr().err
        assert main(config(**words, output_name=f"of_{limit}")) == 0
        said = capsys.readouterr().err
        found.append(
            [
                told.partition("gradient checkpointing ")[2].partition("\n")[0],
                *(said.partition(f"{name}_checkpointing ")[2].partition(":")[0] for name in ("gradient", "selective")),
            ]
        )
    assert found == [["off", "off", "off"], ["selective", "off", "on"], ["on", "on", "off"]]
    assert losses[:2] == losses[2:4] == losses[4:]
    (_, tokens, dtype, eight_bits, fuses, network, also), *_ = asked
    assert (tokens, str(dtype), eight_bits, fuses) == (3 * 64 * 64 // 16**2, "torch.float32", False, True)
    assert sum(parameter.numel() for parameter in network.parameters()) > 0
    assert also == (True, False, False)  # captions are encoded on the way, pictures are not, nothing is rendered
