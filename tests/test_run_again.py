"""A run is made again, step by step, from its written settings and from the adapter it saved."""

import pytest

from anima_train_network import main


@pytest.fixture
def first_run(config, losses, tmp_path):
    """Command-line words of a run of 3 steps, already made; its losses."""
    words = config(max_train_steps=3, network_dim=3, lr_scheduler="cosine", seed=7, network_args=["rank_dropout=0.2"])
    assert main(words) == 0
    made = [*losses]
    losses.clear()
    return words, made


def test_the_written_settings_give_the_same_losses(first_run, losses, tmp_path):
    words, made = first_run
    assert main([*words, "--output_config", str(tmp_path / "again.toml")]) == 0
    assert losses == []
    assert main(["--config_file", str(tmp_path / "again.toml")]) == 0
    assert losses == made
    assert len(made) == 3


def test_the_adapter_gives_the_same_losses_on_the_same_files(first_run, losses, tiny_anima, tmp_path, caplog):
    _, made = first_run
    adapter = tmp_path / "output" / "tiny.safetensors"
    files = {
        "pretrained_model_name_or_path": tiny_anima / "anima.safetensors",
        "vae": tiny_anima / "qwen_image_vae.safetensors",
        "qwen": tiny_anima / "qwen3",
        "t5_tokenizer_dir": tiny_anima / "t5",
        "train_data_dir": tiny_anima / "train",
        "output_dir": tmp_path / "again",
        "logging_dir": tmp_path / "logs",
    }
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    assert main(["--from_adapter", str(adapter), *words]) == 0
    assert losses == made
    assert (tmp_path / "again" / "tiny.safetensors").is_file()
    losses.clear()
    assert main(["--from_adapter", str(adapter), *words, "--seed", "8"]) == 0
    assert losses != made
