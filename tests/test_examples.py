"""Every shipped config trains, and every command of the README is one that a test runs.

What a config cannot have here is swapped, as `cpu_overlay.toml` declares. Everything else of it stays in force.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors import safe_open

from anima_train_network import main
from library.settings import read_settings
from networks.adapter_files import read_adapter_file
from networks.adapter_types import infer_types
from tests.shipped_configs import NAMES, OVERLAY, ROOT, small_words_for, words_for


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


EXPECTED = {
    "examples/lora_single_file.toml": {"ss_network_dim": "32", "ss_lr_scheduler": "cosine_with_min_lr"},
    "examples/lokr_single_file.toml": {"ss_network_module": "networks.lokr_anima"},
    "examples/lora_train_args.toml": {
        "ss_num_train_images": "44",  # 4 pictures 10 times, 4 once
        "ss_optimizer": "AdamW(weight_decay=0.01,betas=(0.9, 0.99))",
    },
    "examples/several_datasets.toml": {"ss_num_train_images": "28"},  # 4 pictures 4 times, twice, and once
    "examples/lora_6gb.toml": {"ss_fp8_base": "True", "ss_gradient_checkpointing": "True"},
    "examples/lora_8gb.toml": {"ss_network_dim": "16", "ss_gradient_checkpointing": "True"},
    "examples/lora_24gb.toml": {"ss_gradient_checkpointing": "False", "ss_gradient_accumulation_steps": "4"},
    "smoke/lokr.toml": {"ss_network_dim": "100000"},
}


@pytest.mark.parametrize("name", NAMES)
def test_config_trains(name, tiny_anima, tmp_path, losses):
    words = small_words_for(words_for(name), tiny_anima, tmp_path)
    saving = read_settings(words).saving
    assert main(words) == 0
    assert len(losses) == OVERLAY["command_line"]["max_train_steps"]
    adapter = saving.output_dir / f"{saving.output_name}.safetensors"
    written = metadata(adapter)
    expected = EXPECTED.get(name, {})
    assert {key: written[key] for key in expected} == expected
    has_state = (adapter.parent / f"{saving.output_name}-state" / "run_state.json").is_file()
    assert has_state == (saving.save_state or saving.save_state_on_train_end)
    if "lokr" in name:
        types = infer_types(read_adapter_file(adapter)[0]).values()
        assert {(found.kind, found.factor, found.full_matrix) for found in types} == {
            ("lokr", 8, True), ("norm", None, False),
        }  # fmt: skip


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


def test_every_config_is_in_the_list_of_configs():
    page = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([^)]+)\)", page))
    assert linked == {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").glob("*/*.toml")}
