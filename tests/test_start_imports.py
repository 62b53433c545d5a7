"""What a process imports until it trains: packages that take seconds to import are left to the runs that use them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENCODERS = ("diffusers", "transformers", "bitsandbytes", "pytorch_optimizer", "sklearn", "pandas")
HUB = ("huggingface_hub.hf_api", "requests")
COMPILERS = ("torch._dynamo", "torch._inductor", "triton", "sympy")

FILES = {
    "pretrained_model_name_or_path": "anima.safetensors",
    "vae": "qwen_image_vae.safetensors",
    "qwen": "qwen3",
    "t5_tokenizer_dir": "t5",
}
# Runs the trainer with all words but the last, and writes the losses of its steps into the file that this one names.
RUN = """
import json, sys
from anima_train_network import AnimaNetworkTrainer, main
losses, step = [], AnimaNetworkTrainer.step
def recorded(self, *arguments):
    loss = step(self, *arguments)
    losses.append(loss.item())
    return loss
AnimaNetworkTrainer.step = recorded
assert main(sys.argv[1:-1]) == 0
open(sys.argv[-1], "w").write(json.dumps(losses))
"""


def imported_by(code: str, *words: str) -> set[str]:
    """The modules that a fresh process has imported after `code`, whose sys.argv[1:] are `words`."""
    program = f"{code}\nimport json, sys\nsys.stdout.write('\\n' + json.dumps(sorted(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *words]
    child = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return set(json.loads(child.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", ["anima_train_network", "tools.benchmark_training"])
def test_the_entry_scripts_import_nothing_that_only_some_runs_use(module):
    assert not imported_by(f"import {module}") & {*ENCODERS, *HUB, *COMPILERS}


def test_a_timed_first_step_needs_no_encoders():
    code = "import sys; from tools.benchmark_training import main; main(sys.argv[1:])"
    modules = imported_by(code, "lora", "--until_first_step", "--tiny")
    assert "tools.benchmark_cases" in modules and not modules & set(ENCODERS)


def test_a_run_with_everything_cached_imports_no_encoders(config, tmp_path, tiny_anima):
    """Its losses are those of the run that filled the caches; a changed file is loaded again."""
    models = Path(shutil.copytree(tiny_anima, tmp_path / "models"))
    words = config(
        **{name: models / file for name, file in FILES.items()}, train_data_dir=models / "train", max_train_steps=3,
        cache_latents_to_disk=True, cache_text_encoder_outputs_to_disk=True, log_with="none",
    )  # fmt: skip
    first = imported_by(RUN, *words, str(tmp_path / "first"))
    second = imported_by(RUN, *words, str(tmp_path / "second"))
    assert {"diffusers", "transformers"} <= first and not second & {*ENCODERS, *HUB}
    losses = [(tmp_path / name).read_text() for name in ("first", "second")]
    assert losses[0] == losses[1] and len(json.loads(losses[0])) == 3
    (models / "qwen_image_vae.safetensors").touch()
    third = imported_by(RUN, *words, str(tmp_path / "third"))
    assert "diffusers" in third and "transformers.models.qwen3" not in third
    assert (tmp_path / "third").read_text() == losses[0]
