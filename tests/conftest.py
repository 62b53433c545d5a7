"""Fixtures that tests of several parts share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

# Asked of the driver, or the question itself keeps processes forked later (tests/training_runs.py) from using a GPU.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
# Read at the first product on a GPU: products that always add in the same order, for tests in deterministic mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run in Triton's interpreter, which is chosen when it is imported

from tools.make_tiny_anima import make_tiny_anima
from train_network import NetworkTrainer


@pytest.fixture(scope="session")
def tiny_anima(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Anima and four training pictures; read it, do not write into it."""
    folder = tmp_path_factory.mktemp("tiny_anima")
    make_tiny_anima(folder)
    return folder


@pytest.fixture
def config(tiny_anima, tmp_path):
    """config(max_train_steps=2) -> command-line words for a run on the tiny model that writes into tmp_path."""

    def words(**settings) -> list[str]:
        values = {
            "pretrained_model_name_or_path": tiny_anima / "anima.safetensors",
            "vae": tiny_anima / "qwen_image_vae.safetensors",
            "qwen": tiny_anima / "qwen3",
            "t5_tokenizer_dir": tiny_anima / "t5",
            "auto_download_t5_tokenizer": False,
            "auto_download_qwen_tokenizer": False,
            "train_data_dir": tiny_anima / "train",
            "output_dir": tmp_path / "output",
            "output_name": "tiny",
            "overwrite_output": True,
            "logging_dir": tmp_path / "logs",
            "auto_start_tensorboard": False,
            "html_report": False,
            "resolution": 64,
            "enable_bucket": True,
            "min_bucket_reso": 32,
            "max_bucket_reso": 128,
            "bucket_reso_steps": 16,
            "train_batch_size": 4,
            "cache_latents": True,
            "learning_rate": 1e-3,
            "max_train_steps": 2,
            **settings,
        }
        lines = [f"{key} = {json.dumps(str(v) if isinstance(v, Path) else v)}" for key, v in values.items()]
        path = tmp_path / "config.toml"
        path.write_text("\n".join(lines), encoding="utf-8")
        return ["--config_file", str(path)]

    return words


@pytest.fixture
def losses(monkeypatch) -> list[float]:
    """Collects the loss of every optimizer step of the runs of a test."""
    seen: list[float] = []
    step = NetworkTrainer.step

    def recorded(self, batches, sample_count):
        loss = step(self, batches, sample_count)
        seen.append(loss.item())
        return loss

    monkeypatch.setattr(NetworkTrainer, "step", recorded)
    return seen
