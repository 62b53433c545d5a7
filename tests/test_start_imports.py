"""What a process imports until it trains: packages that take seconds to import are left to the runs that use them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENCODERS = ("diffusers", "transformers", "bitsandbytes", "pytorch_optimizer", "sklearn", "pandas")
COMPILERS = ("torch._dynamo", "torch._inductor", "triton", "sympy")


def imported_by(code: str, *words: str) -> set[str]:
    """The modules that a fresh process has imported after `code`, whose sys.argv[1:] are `words`."""
    program = f"{code}\nimport json, sys\nsys.stdout.write('\\n' + json.dumps(sorted(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *words]
    child = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return set(json.loads(child.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", ["anima_train_network", "tools.benchmark_training"])
def test_the_entry_scripts_import_nothing_that_only_some_runs_use(module):
    assert not imported_by(f"import {module}") & {*ENCODERS, *COMPILERS}


def test_a_timed_first_step_needs_no_encoders():
    code = "import sys; from tools.benchmark_training import main; main(sys.argv[1:])"
    modules = imported_by(code, "lora", "--until_first_step", "--tiny")
    assert "tools.benchmark_cases" in modules and not modules & set(ENCODERS)
