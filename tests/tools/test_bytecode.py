"""Modules that Python has to compile at each start, against what Python itself does."""

from __future__ import annotations

import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import once
from tools.bytecode import count_uncompiled
sys.stdout.write(str(count_uncompiled([sys.modules["once"]])))
"""


@pytest.fixture
def module(tmp_path) -> Path:
    path = tmp_path / "once.py"
    path.write_text("value = 1\n")
    return path


def uncompiled(module: Path, may_write: bool) -> int:
    """Of the module, in a process that imports it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "" if may_write else "1"}
    command = [sys.executable, "-c", PROGRAM, str(module.parent)]
    return int(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def test_a_module_counts_until_python_may_write_it(module):
    assert uncompiled(module, may_write=False) == uncompiled(module, may_write=False) == 1
    assert uncompiled(module, may_write=True) == 0
    assert uncompiled(module, may_write=False) == 0


def test_a_source_with_another_time_or_size_is_compiled_again(module):
    py_compile.compile(str(module))
    assert uncompiled(module, may_write=False) == 0
    os.utime(module, (0, 0))
    assert uncompiled(module, may_write=False) == 1


def test_what_is_compiled_by_its_sources_hash_stays(module):
    py_compile.compile(str(module), invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    os.utime(module, (0, 0))
    assert uncompiled(module, may_write=False) == 0
