"""What a mistake in a settings file says, and the exit code the trainer ends with, before any model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from anima_train_network import AnimaNetworkTrainer, main

ROOT_STYLE = """\
[model]
transformer_path = "{model}/anima.safetensors"
vae_path = "{model}/qwen_image_vae.safetensors"
text_encoder_path = "{model}/qwen3"
t5_tokenizer_dir = "{model}/t5"
[dataset]
data_dir = "{model}/train"
"""
KOHYA = """\
pretrained_model_name_or_path = "{model}/anima.safetensors"
vae = "{model}/qwen_image_vae.safetensors"
qwen = "{model}/qwen3"
t5_tokenizer_dir = "{model}/t5"
train_data_dir = "{model}/train"
"""

# (file's text, a line to add, parts of what is said; ":6:" is the line)
MISTAKES = [
    (KOHYA, "learning_rat = 1e-4", [":6: unknown setting learning_rat; did you mean learning_rate"]),
    (KOHYA, "seed = true", [":6: seed = True: expected a whole number"]),
    (KOHYA, "learning_rate = 'fast'", [":6: learning_rate = 'fast': expected a number"]),
    (
        KOHYA,
        "mixed_precision = 'bf61'",
        [":6: mixed_precision = 'bf61': expected one of no, fp16, bf16"],
    ),
    (KOHYA, "cache_latents = 'yes'", [":6: cache_latents = 'yes': expected true or false"]),
    (KOHYA, "anima_seq_len = 256", [":6: anima_seq_len: 256 is out of range; give 512 or more"]),
    (KOHYA, "config = 'a.toml'", [":6: config is not available here: a settings file is named by"]),
    (
        KOHYA,
        "anima_transformer = 'b'",
        [":6: anima_transformer = 'b': contradicts pretrained_model_name_or"],
    ),
    (KOHYA, "network_module = 'networks.none'", [":6: network_module: 'networks.none' cannot be imported"]),
    (KOHYA, "network_args = ['ran=4']", [":6: network_args: networks.lora_anima has no argument 'ran'"]),
    (KOHYA, "network_args = ['network_dim=4']", [":6: network_args: network_dim cannot stand here"]),
    (
        KOHYA,
        "network_args = ['train_norm=false']\ntrain_norm = true",
        [":7: train_norm is True, but network_args says"],
    ),
    (KOHYA, "adapter_format = ['diffusers']", ["diffusers", "train_norm"]),
    (KOHYA, "optimizer_type = 'AdamX'", [":6: optimizer_type: 'AdamX'", "AdamW"]),
    (KOHYA, "optimizer_args = ['momentun=0.9']", [":6: optimizer_args: AdamW takes no 'momentun'"]),
    (
        KOHYA,
        "network_args = ['factor=8', 'train_norm']",
        [":6: network_args: factor belo", ":6: network_args: 'train_n"],
    ),
    (KOHYA, "resume = 'none-state'", [":6: resume: there is no folder none-state"]),
    (KOHYA, "[[datasets]]\nresolution = 512", [":6: ", "[[datasets.subsets]]"]),
    (KOHYA, "sample_every_n_steps = 5", [":6: sample_every_n_steps needs sample_prompts"]),
    (ROOT_STYLE, "[lora]\nlora_rnk = 4", [":9: unknown setting lora.lora_rnk; did you mean lora.lora_rank"]),
    (
        ROOT_STYLE,
        "[lora]\nnetwork_type = 'loha'",
        [":9: lora.network_type = 'loha': expected one of lora, lokr"],
    ),
    (
        ROOT_STYLE,
        "[training]\nseq_len = 100",
        [":9: training.seq_len: 100 is out of range; give 512 or more"],
    ),
    (
        ROOT_STYLE,
        "[training]\nlr_scheduler = 'cosine'\n[optimizer]\ntype = 'radam_schedulefree'",
        ["RAdamScheduleFree", "training.lr_scheduler", "constant"],
    ),
    (
        ROOT_STYLE,
        "[training]\nlr_warmup_steps = 5\n[optimizer]\ntype = 'radam_schedulefree'",
        ["RAdamScheduleFree", "lr_warmup_steps"],
    ),
    (
        ROOT_STYLE,
        "[lora]\nlora_targets = ['q_prj']",
        [":9: lora.lora_targets: target_modules: 'q_prj' matches nothing in the model"],
    ),
    (ROOT_STYLE.replace('t5_tokenizer_dir = "{model}/t5"\n', ""), "", ["t5_tokenizer_dir is not set"]),
    (ROOT_STYLE.replace("{model}/train", "nowhere"), "", [":7: dataset.data_dir", "nowhere does not exist"]),
    (
        ROOT_STYLE.replace("anima.safetensors", "none.safetensors"),
        "",
        [":2: model.transformer_path", "does not"],
    ),
]


@pytest.fixture
def run(tiny_anima, tmp_path, monkeypatch, capsys):
    """run(text, *words) -> exit code and what was said; models must not be loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AnimaNetworkTrainer, "load_models", lambda trainer: pytest.fail("models were loaded"))

    def start(text: str, *words: str) -> tuple[int, str]:
        Path("config.toml").write_text(text.replace("{model}", tiny_anima.as_posix()), encoding="utf-8")
        code = main(["--config_file", "config.toml", *words])
        return code, capsys.readouterr().err

    return start


@pytest.mark.parametrize(("text", "line", "parts"), MISTAKES, ids=[line or parts[0] for _, line, parts in MISTAKES])
def test_a_mistake_is_named_and_ends_with_1(run, text, line, parts):
    code, said = run(f"{text}{line}\n")
    assert code == 1
    error = said.partition("\nerror: ")[2]
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--config", "a.toml"], "--config"),
        (["--learning_rat", "1"], "command line: unknown option --learning_rat; did you mean --learning_rate"),
        (["--cache_latents", "true"], "'true' follows no option; a switch takes no value"),
        (["--seed", "x"], "command line: --seed = 'x': expected a whole number"),
        (["--lr_warmup_steps", "500", "--max_train_steps", "5"], "command line: --lr_warmup_steps: 500 steps of"),
    ],
)
def test_mistakes_on_the_command_line(run, words, part):
    code, said = run(KOHYA, *words)
    assert code == 1
    assert part in said.partition("\nerror: ")[2]


def test_all_mistakes_are_told_at_once(run):
    code, said = run(KOHYA + "typo_one = 1\nseed = 'x'\ntypo_two = 2\n")
    assert code == 1
    assert said.count("config.toml:") == 3
