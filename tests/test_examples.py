"""Every shipped config trains, and every command of the README is one that a test runs.

What an example cannot have here is swapped: the model files for the tiny model's, the pictures, sizes that would be
slow on a CPU, and the length. Everything else of the file stays in force.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from anima_train_network import main
from networks.adapter_files import read_adapter_file
from networks.adapter_types import infer_types

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "configs" / "examples"


@pytest.fixture
def overlay(tiny_anima, tmp_path):
    """Command-line words that put the tiny model and short, small training in place of an example's."""
    return [
        *("--pretrained_model_name_or_path", str(tiny_anima / "anima.safetensors")),
        *("--vae", str(tiny_anima / "qwen_image_vae.safetensors")),
        *("--qwen", str(tiny_anima / "qwen3")),
        *("--t5_tokenizer_dir", str(tiny_anima / "t5")),
        *("--output_dir", str(tmp_path / "output")),
        *("--logging_dir", str(tmp_path / "logs")),
        *("--max_train_steps", "2"),
    ]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


SMALL = ["--resolution", "64", "--min_bucket_reso", "32", "--max_bucket_reso", "128", "--bucket_reso_steps", "16"]


def test_the_single_file_example(overlay, tiny_anima, tmp_path):
    words = ["--config_file", str(EXAMPLES / "lora_single_file.toml"), "--train_data_dir", str(tiny_anima / "train")]
    assert main([*words, *overlay, *SMALL]) == 0
    written = metadata(tmp_path / "output" / "my_anima_lora.safetensors")
    assert written["ss_network_dim"] == "32"
    assert written["ss_mixed_precision"] == "bf16"
    assert written["ss_lr_scheduler"] == "cosine_with_min_lr"
    assert (tmp_path / "output" / "my_anima_lora-state" / "run_state.json").is_file()


def test_the_lokr_example(overlay, tiny_anima, tmp_path):
    words = ["--config_file", str(EXAMPLES / "lokr_single_file.toml"), "--train_data_dir", str(tiny_anima / "train")]
    assert main([*words, *overlay, *SMALL]) == 0
    file = tmp_path / "output" / "my_anima_lokr.safetensors"
    assert metadata(file)["ss_network_module"] == "networks.lokr_anima"
    parsed, _ = read_adapter_file(file)
    types = infer_types(parsed.adapters).values()
    assert {(found.kind, found.factor, found.full_matrix) for found in types} == {
        ("lokr", 8, True), ("norm", None, False),
    }  # fmt: skip


def test_the_two_file_example(overlay, tiny_anima, tmp_path):
    for name in ("subject", "style"):
        shutil.copytree(tiny_anima / "train" / "10_subject", tmp_path / "train" / name)
    text = (EXAMPLES / "lora_dataset.toml").read_text(encoding="utf-8")
    swaps = {
        '"train/': f'"{(tmp_path / "train").as_posix()}/',
        "resolution = 1024 ": "resolution = 64 ",
        "min_bucket_reso = 512": "min_bucket_reso = 32",
        "max_bucket_reso = 2048": "max_bucket_reso = 128",
        "bucket_reso_steps = 64": "bucket_reso_steps = 16",
    }
    for old, new in swaps.items():
        assert old in text
        text = text.replace(old, new)
    dataset = tmp_path / "lora_dataset.toml"
    dataset.write_text(text, encoding="utf-8")
    words = ["--config_file", str(EXAMPLES / "lora_train_args.toml"), "--dataset_config", str(dataset)]
    assert main([*words, *overlay]) == 0
    written = metadata(tmp_path / "output" / "my_anima_lora.safetensors")
    assert written["ss_num_train_images"] == "44"  # 4 pictures 10 times, 4 once
    assert written["ss_optimizer"] == "AdamW(weight_decay=0.01,betas=(0.9, 0.99))"
    assert (tmp_path / "output" / "my_anima_lora-state" / "run_state.json").is_file()


RUN_BY_TESTS = {
    "python tools/quickstart.py demo",  # tests/tools/test_quickstart.py
    "python tools/quickstart.py test",  # tests/tools/test_quickstart.py, up to starting pytest
    "python -m venv .venv",  # tests/tools/test_quickstart.py
    "source .venv/bin/activate        # Windows: .venv\\Scripts\\activate",
    "pip install -r requirements.txt",  # tests/tools/test_quickstart.py
    "accelerate launch anima_train_network.py --config_file configs/examples/lora_single_file.toml",  # above
}


def test_the_readme_names_only_commands_that_tests_run_and_files_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"^    ((?:python|source|pip|accelerate)\b.*)$", readme, re.MULTILINE))
    assert commands == RUN_BY_TESTS
    for target in re.findall(r"\]\(([^)]+)\)", readme):
        assert (ROOT / target).is_file(), target


def test_every_example_is_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(path.name in readme for path in EXAMPLES.glob("*.toml"))
