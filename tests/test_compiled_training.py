"""Runs whose blocks are to be compiled, where that turns out not to work only when they are first called."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.compile_fx
from safetensors.torch import load_file

import train_network
from anima_train_network import main
from library.training.choices import Choice


@pytest.fixture
def broken_compiler(monkeypatch):
    """Blocks are compiled on the CPU as well, by a compiler that fails. Returns its calls."""
    calls = []

    def compile_fx(*args, **kwargs):
        calls.append(args)
        raise RuntimeError("Cannot find a working\n  C compiler")

    monkeypatch.setattr(train_network, "choose_compiling", lambda *_: Choice("torch_compile", True, "as set"))
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    torch._dynamo.reset()
    yield calls
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


@pytest.mark.parametrize("trains_llm_adapter", [True, False])
def test_a_compiler_that_fails_at_the_first_step_is_told_and_done_without(
    config, tmp_path, losses, capsys, broken_compiler, monkeypatch, trains_llm_adapter
):
    settings = {"train_llm_adapter": trains_llm_adapter, "max_train_steps": 3, "validation_split": 0.25}
    settings |= {"validate_every_n_steps": 2, "gradient_checkpointing": True}
    assert main(config(**settings, output_name="tried")) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("torch_compile is off from here on, as the model turns out not to compile") == 1
    assert "Cannot find a working C compiler" in told
    assert len(broken_compiler) == 1
    monkeypatch.setattr(train_network, "choose_compiling", lambda *_: Choice("torch_compile", False, "as set"))
    assert main(config(**settings, output_name="plain")) == 0
    assert losses[:3] == losses[3:]
    tried, plain = (load_file(tmp_path / "output" / f"{name}.safetensors") for name in ("tried", "plain"))
    assert all(torch.equal(tensor, tried[name]) for name, tensor in plain.items())
