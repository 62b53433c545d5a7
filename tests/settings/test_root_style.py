import logging
from pathlib import Path

import pytest

from library.errors import SettingError
from library.settings import read_settings, settings_as_flat_dict
from library.settings.collect import gather

MODEL = """\
[model]
transformer_path = "anima.safetensors"
vae_path = "vae.safetensors"
text_encoder_path = "qwen.safetensors"
t5_tokenizer_dir = "t5"
"""
PICTURES = '[dataset]\ndata_dir = "train"\n'
LEAST = MODEL + PICTURES

EXAMPLE = (
    MODEL
    + """
[dataset]
data_dir = "more"
repeats = 10
resolution = 1024
min_reso = 512
max_reso = 2048
reso_step = 64
shuffle_caption = true
caption_extension = ".txt"
keep_tokens = 0
flip_augment = true
cache_latents = true

[training]
epochs = 10
batch_size = 2
grad_accum = 3
learning_rate = 1e-4
mixed_precision = "bf16"
grad_checkpoint = true
num_workers = 2
xformers = true
seed = 43
seq_len = 640
noise_offset = 0
lr_scheduler = "constant"
lr_warmup_steps = 0

[lora]
network_type = "lokr"
lora_rank = 100000
lora_alpha = 100000

[optimizer]
type = "AdamW"
weight_decay = 0.02
eps = 1e-8
beta1 = 0.9
beta2 = 0.95

[output]
output_dir = "out"
output_name = "my_lokr"
save_every = 200
save_state = true
"""
)


def read(workplace: Path, text: str, *words: str):
    (workplace / "root.toml").write_text(text, encoding="utf-8")
    return read_settings(["--config_file", "root", *words])


def flat(workplace: Path, text: str, *words: str) -> dict:
    values = settings_as_flat_dict(read(workplace, text, *words))
    (dataset,) = values.pop("datasets")
    (subset,) = dataset.pop("subsets")
    return {**values, **dataset, **subset}


def error_of(workplace: Path, text: str, *words: str) -> str:
    with pytest.raises(SettingError) as caught:
        read(workplace, text, *words)
    return str(caught.value)


def test_example_file(workplace, caplog):
    caplog.set_level(logging.INFO)
    expected = {
        "pretrained_model_name_or_path": "anima.safetensors",
        "vae": "vae.safetensors",
        "qwen": "qwen.safetensors",
        "t5_tokenizer_dir": "t5",
        "train_data_dir": "more",
        "image_dir": "more",
        "num_repeats": 10,
        "resolution": [1024, 1024],
        "enable_bucket": True,
        "min_bucket_reso": 512,
        "max_bucket_reso": 2048,
        "bucket_reso_steps": 64,
        "shuffle_caption": True,
        "caption_extension": ".txt",
        "keep_tokens": 0,
        "flip_aug": True,
        "cache_latents": True,
        "max_train_epochs": 10,
        "batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-4,
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "max_data_loader_n_workers": 2,
        "seed": 43,
        "anima_seq_len": 640,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "network_module": "networks.lokr_anima",
        "network_dim": 100000,
        "network_alpha": 100000.0,
        "network_args": ["lokr_factor=8"],
        "optimizer_type": "AdamW",
        "optimizer_args": ["weight_decay=0.02", "eps=1e-08", "betas=(0.9,0.95)"],
        "output_dir": "out",
        "output_name": "my_lokr",
        "save_every_n_steps": 200,
        "save_state": True,
    }
    values = flat(workplace, EXAMPLE)
    assert {key: values[key] for key in expected} == expected
    assert "output.save_every counts optimizer steps" in caplog.text


def test_defaults_of_the_form(workplace, caplog):
    caplog.set_level(logging.INFO)
    values = flat(workplace, LEAST)
    expected = {
        "network_module": "networks.lora_anima",
        "network_dim": 32,
        "network_alpha": 16.0,
        "learning_rate": 5e-5,
        "mixed_precision": "bf16",
        "max_train_epochs": 1,
        "resolution": [1024, 1024],
        "enable_bucket": True,
        "min_bucket_reso": 512,
        "max_bucket_reso": 2048,
        "seed": 42,
        "gradient_checkpointing": None,
        "save_state": True,
        "output_dir": "output",
        "output_name": "anima_lora",
        "optimizer_args": ["weight_decay=0.01", "eps=1e-08", "betas=(0.9,0.999)"],
        "network_args": [],
    }
    assert {key: values[key] for key in expected} == expected
    listed = [text for text in caplog.messages if text.startswith("root-style defaults in use: ")]
    assert len(listed) == 1
    assert "network_dim = 32" in listed[0]
    assert "learning_rate = 5e-05" in listed[0]


def test_command_line_wins_over_file_and_defaults(workplace, caplog):
    caplog.set_level(logging.INFO)
    values = flat(workplace, LEAST, "--network_dim", "8", "--max_train_steps", "20", "--no-enable_bucket")
    assert (values["network_dim"], values["max_train_steps"], values["max_train_epochs"]) == (8, 20, None)
    assert values["enable_bucket"] is False
    assert "network_dim = 32" not in caplog.text
    assert "replaces" not in caplog.text
    assert "min_bucket_reso does nothing" not in caplog.text


def test_implied_arguments_go_with_what_they_are_for(workplace):
    lokr = LEAST + "[lora]\nnetwork_type = 'lokr'\n"
    assert read(workplace, lokr).network.network_args == ("lokr_factor=8",)
    assert read(workplace, lokr, "--network_module", "networks.lora_anima").network.network_args == ()
    assert read(workplace, LEAST, "--optimizer_type", "SGDNesterov").optimizer.optimizer_args == ()
    written = LEAST + "[optimizer]\nweight_decay = 0.5\n"
    assert "weight_decay=0.5" in read(workplace, written, "--optimizer_type", "AdamW").optimizer.optimizer_args


def test_dataset_config_wins_over_the_dataset_table(workplace, caplog):
    (workplace / "d.toml").write_text("[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'more'\n")
    settings = read(workplace, LEAST, "--dataset_config", "d.toml")
    assert settings.data.train_data_dir is None
    assert [subset.image_dir for subset in settings.datasets[0].subsets] == [Path("more")]
    assert settings.datasets[0].resolution == (512, 512)
    assert "--dataset_config = d.toml (command line) replaces dataset.data_dir = train (root.toml:7)" in caplog.text


def test_inline_kohya_tables_beside_root_style_keys(workplace):
    text = MODEL + "[lora]\nlora_rank = 5\n[[datasets]]\nresolution = 768\n[[datasets.subsets]]\nimage_dir = 'more'\n"
    settings = read(workplace, text)
    assert settings.network.network_dim == 5
    assert settings.datasets[0].resolution == (768, 768)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("[training]\nepochs = 3\nmax_steps = 70", {"max_train_steps": 70, "max_train_epochs": None}),
        ("[training]\nepochs = 3\nmax_steps = 0", {"max_train_steps": 1600, "max_train_epochs": 3}),
        ("[training]\nepochs = 2\nmax_steps = -1", {"max_train_epochs": 2}),
        ("[training]\nmax_steps = 5", {"max_train_steps": 5, "max_train_epochs": None}),
        (
            "[training]\nlr_scheduler = 'cosine'\nlr_min_ratio = 0.1",
            {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1},
        ),
        ("[training]\nlr_scheduler = 'cosine'\nlr_min_ratio = 0.0", {"lr_scheduler": "cosine"}),
        ("[training]\nlr_warmup_steps = 12\nlr_warmup_ratio = 0.5", {"lr_warmup_steps": 12}),
        ("[training]\nlr_scheduler = 'linear'\nlr_min_ratio = 0.1", {"lr_scheduler": "linear"}),
        ("[training]\nlr_warmup_ratio = 0.5", {"lr_warmup_steps": 0.5}),
        ("[training]\nlr_warmup_steps = 0\nlr_warmup_ratio = 0.5", {"lr_warmup_steps": 0.5}),
        ("[training]\nlr_scheduler = 'cosine'\nlr_scheduler_num_cycles = 0.5", {"lr_scheduler_num_cycles": 0.5}),
        ("[training]\nmixed_precision = 'fp32'", {"mixed_precision": "no"}),
        ("[training]\ngrad_checkpoint = false", {"gradient_checkpointing": False}),
        ("[training]\ngrad_clip = 0.5", {"max_grad_norm": 0.5}),
        ("[training]\ncaption_tag_dropout_rate = 0.2", {"caption_tag_dropout_rate": 0.2}),
        ("[training]\nlog_every = 3", {"log_every_n_steps": 3}),
        ("[lora]\nlora_name = 'a'", {"output_name": "a"}),
        ("[lora]\nlora_name = 'a'\n[output]\noutput_name = 'b'", {"output_name": "b"}),
        ("[lora]\nlora_targets = ['q_proj', 'k_proj']", {"network_args": ["target_modules=q_proj,k_proj"]}),
        (
            "[lora]\nnetwork_type = 'lokr'\nlokr_factor = 4\nlokr_full_matrix = true",
            {"network_args": ["lokr_factor=4", "lokr_full_matrix=True"]},
        ),
        (
            "[optimizer]\nbeta1 = 0.8",
            {"optimizer_args": ["weight_decay=0.01", "eps=1e-08", "betas=(0.8,0.999)"]},
        ),
        ("[output]\nsave_every_n_epochs = 2", {"save_every_n_epochs": 2, "save_every_n_steps": None}),
        ("[network]\ntrain_llm_adapter = false", {"train_llm_adapter": False}),
    ],
)
def test_computed_keys(workplace, lines, expected):
    values = flat(workplace, f"{LEAST}\n{lines}\n")
    assert {key: values[key] for key in expected} == expected


def test_optimizers_that_are_not_there_are_named(workplace):
    message = error_of(workplace, LEAST + "[optimizer]\ntype = 'no_such'\n")
    assert "root.toml:9: optimizer.type: 'no_such'" in message


def test_keys_of_another_network_or_optimizer_are_listed_and_not_used(workplace, caplog):
    lora = "[lora]\nnetwork_type = 'lora'\nlokr_factor = 8\nlokr_full_matrix = false\n"
    values = flat(workplace, LEAST + lora + "[optimizer]\ntype = 'AdamW'\nprodigy_d_coef = 2\n")
    assert values["network_args"] == []
    assert values["optimizer_args"] == ["weight_decay=0.01", "eps=1e-08", "betas=(0.9,0.999)"]
    assert warnings_in(caplog) == [
        "root.toml:10: lora.lokr_factor is not used: it is for LoKr, and a LoRA is trained",
        "root.toml:14: optimizer.prodigy_d_coef is not used: it is for Prodigy, and the optimizer is AdamW",
    ]


def test_keys_that_others_win_over_are_listed(workplace, caplog):
    text = "[training]\nepochs = 3\nmax_steps = 70\nlr_warmup_steps = 5\nlr_warmup_ratio = 0.1\n"
    values = flat(workplace, LEAST + text + "[lora]\nlora_name = 'a'\n[output]\noutput_name = 'b'\n")
    assert (values["max_train_steps"], values["max_train_epochs"]) == (70, None)
    assert (values["lr_warmup_steps"], values["output_name"]) == (5, "b")
    assert warnings_in(caplog) == [
        "root.toml:9: training.epochs is not used: max_steps is above 0 and wins",
        "root.toml:12: training.lr_warmup_ratio is not used: lr_warmup_steps is above 0 and wins",
        "root.toml:14: lora.lora_name is not used: output.output_name names the files",
    ]


def gathered(workplace: Path, text: str) -> tuple[dict, list[str]]:
    (workplace / "root.toml").write_text(text, encoding="utf-8")
    problems = []
    given = gather(["--config_file", "root.toml"], problems).given
    return {name: value.value for name, value in given.items()}, problems


def test_keys_of_prodigy_become_its_arguments(workplace):
    lines = "[optimizer]\ntype = 'prodigy'\nweight_decay = 0.02\nprodigy_d_coef = 2\nprodigy_decouple = true\n"
    values, problems = gathered(workplace, LEAST + lines)
    assert problems == []
    assert values["optimizer_args"] == ("weight_decay=0.02", "d_coef=2", "decouple=True")


def test_argument_lists_and_single_keys_are_put_together(workplace):
    lora = "[lora]\nnetwork_type = 'lokr'\nlora_targets = ['q_proj', 'v_proj']\nnetwork_args = ['factor=4', 'dora=1']\n"
    lines = f"{lora}[optimizer]\nbeta2 = 0.99\noptimizer_args = ['weight_decay=0.5']\n"
    values, problems = gathered(workplace, LEAST + lines)
    assert problems == []
    assert values["network_args"] == ("factor=4", "target_modules=q_proj,v_proj", "dora=1")
    assert values["optimizer_args"] == ("weight_decay=0.5", "eps=1e-08", "betas=(0.9,0.99)")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "[lora]\nnetwork_type = 'lokr'\nlokr_factor = 8\nnetwork_args = ['factor=4']",
            "root.toml:11: lora.network_args = ['factor=4']: contradicts root.toml:10: lora.lokr_factor = 8; keep one",
        ),
        (
            "[optimizer]\nbeta1 = 0.8\noptimizer_args = ['betas=(0.9,0.99)']",
            "root.toml:9: optimizer.beta1 = '(0.8,0.999)'",
        ),
        (
            "[optimizer]\noptimizer_args = ['eps']",
            "root.toml:9: optimizer.optimizer_args = ['eps']: 'eps' is not",
        ),
        ("[output]\nsave_every_n_epochs = 2\nsave_state_every = 3", "contradicts output.save_state_every = 3"),
    ],
)
def test_contradictions_name_both_keys(workplace, lines, message):
    _, problems = gathered(workplace, f"{LEAST}{lines}\n")
    assert message in "\n".join(problems)


def test_states_every_so_many_epochs(workplace, caplog):
    caplog.set_level(logging.INFO)
    values = flat(workplace, LEAST + "[output]\nsave_state_every = 3\n")
    assert (values["save_every_n_epochs"], values["save_every_n_steps"], values["save_state"]) == (3, None, True)
    assert "output.save_state_every counts epochs; the adapter is saved together with each state" in caplog.text
    caplog.clear()
    values = flat(workplace, LEAST + "[output]\nsave_state = false\nsave_state_every = 3\n")
    assert (values["save_every_n_epochs"], values["save_state"]) == (None, False)
    assert "root.toml:10: output.save_state_every is not used: save_state is off" in caplog.text


def warnings_in(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_known_keys_without_counterpart_are_listed_with_the_reason(workplace, caplog):
    lora = "[lora]\nnetwork_type = 'lokr'\nlokr_constraint = 0.1\nlokr_normalize = false\n"
    read(workplace, f"{LEAST}[training]\nauto_install = true\n{lora}[monitor]\ngpu = true\n")
    assert warnings_in(caplog) == [
        "root.toml:9: training.auto_install is not used: nothing is installed while training",
        "root.toml:12: lora.lokr_constraint is not used: LoKr is trained without constraint",
        "root.toml:15: monitor.gpu is not used: losses and memory are watched by this trainer's own settings",
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "[training]\ngrad_acum = 2",
            "root.toml:9: unknown setting training.grad_acum; did you mean training.grad_accum",
        ),
        ("[training]\nlora_rank = 2", "root.toml:9: unknown setting training.lora_rank; did you mean lora.lora_rank?"),
        ("[lora]\nlora_rank = 'x'", "root.toml:9: lora.lora_rank = 'x': expected a whole number"),
        ("[lora]\nnetwork_type = 'loha'", "root.toml:9: lora.network_type = 'loha': expected one of lora, lokr"),
        ("[lora]\nlora_targets = {a = 1}", "root.toml:9: lora.lora_targets = {'a': 1}: expected a number, a text"),
        ("[training]\nnoise_offset = 'a'", "root.toml:9: training.noise_offset = 'a': expected a number"),
        ("[training]\nmax_steps = 'many'", "root.toml:9: training.max_steps = 'many': expected a whole number"),
        (
            "[training]\nbatch_size = 1\ntrain_batch_size = 2",
            "root.toml:10: training.train_batch_size = 2: contradicts",
        ),
    ],
)
def test_wrong_keys_are_named_as_written(workplace, lines, message):
    assert message in error_of(workplace, f"{LEAST}{lines}\n")


def test_t5_folder_is_required_unless_typed(workplace):
    text = LEAST.replace('t5_tokenizer_dir = "t5"\n', "")
    assert "t5_tokenizer_dir is not set" in error_of(workplace, text)
    assert read(workplace, text, "--t5_tokenizer_dir", "t5").model.t5_tokenizer_dir == Path("t5")
