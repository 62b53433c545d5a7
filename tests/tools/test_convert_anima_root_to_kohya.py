"""Root-style files as Kohya's two files: the same settings, the same training, nothing lost in silence."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from PIL import Image

from anima_train_network import main as train
from library.errors import SettingError
from library.settings import Settings, read_settings
from library.settings.listing import PICTURE_SOURCES
from tools.convert_anima_root_to_kohya import main

MODEL = """\
[model]
transformer_path = "anima.safetensors"
vae_path = "vae.safetensors"
text_encoder_path = "qwen.safetensors"
t5_tokenizer_dir = "t5"
"""
FULL = (
    MODEL
    + r"""
[dataset]
data_dir = "train"
repeats = 3
resolution = 832
min_reso = 256
max_reso = 1536
reso_step = 32
shuffle_caption = true
caption_extension = ".caption"
keep_tokens = 2
keep_tokens_separator = "|||"
flip_augment = true
cache_latents = true
cache_dir = "cache"

[training]
epochs = 4
batch_size = 2
grad_accum = 3
grad_clip = 0.5
learning_rate = 2e-4
mixed_precision = "fp32"
grad_checkpoint = false
num_workers = 2
persistent_data_loader_workers = true
seed = 7
seq_len = 512
lr_scheduler = "cosine"
lr_min_ratio = 0.1
lr_warmup_ratio = 0.05
lr_scheduler_num_cycles = 0.5
caption_tag_dropout_rate = 0.1
auto_install = true
training_comment = 'by "me", C:\new'

[lora]
network_type = "lokr"
lora_rank = 100000
lora_alpha = 100000
lora_targets = ["q_proj", "v_proj"]
lokr_factor = 4
network_args = ["rank_dropout=0.1"]
lokr_constraint = 0.0

[optimizer]
type = "adamw"
weight_decay = 0.02
beta2 = 0.95

[output]
output_dir = "out"
output_name = "my_lokr"
save_every = 200
save_state_every = 2
"""
)
INLINE = (
    MODEL
    + """
[training]
batch_size = 2
[general]
shuffle_caption = true
resolution = 640
[[datasets]]
batch_size = 3
keep_tokens = 1
[[datasets.subsets]]
image_dir = "more"
num_repeats = 5
[[datasets.subsets]]
image_dir = "train/10_cat"
keep_tokens = 0
[[datasets]]
enable_bucket = false
[[datasets.subsets]]
image_dir = "more"
"""
)
REGULARISATION = MODEL + '[dataset]\ndata_dir = "train"\nreg_data_dir = "more"\nrepeats = 2\nkeep_tokens = 1\n'
EMPTY_TEXTS = MODEL + '[dataset]\ndata_dir = "train"\n[training]\nresume = ""\nepochs = ""\n[lora]\nlora_rank = "8"\n'


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: stand-ins for the model's files, and pictures in train/, train/10_cat/ and more/."""
    for name in ("anima.safetensors", "vae.safetensors", "qwen.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "t5").mkdir()
    for folder in ("train/10_cat", "train/deep/er", "more"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / folder / "a.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "train" / "a.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def convert(text: str, *words: str) -> int:
    Path("old.toml").write_text(text, encoding="utf-8")
    return main(["--input", "old.toml", *words])


def comparable(settings: Settings) -> Settings:
    """Without what only says where settings and pictures were named; the datasets hold the pictures."""
    data = dataclasses.replace(settings.data, **dict.fromkeys(PICTURE_SOURCES))
    return dataclasses.replace(settings, data=data, given={})


PAIR = ["--config_file", "kohya_converted/train_args.toml", "--dataset_config", "kohya_converted/dataset.toml"]


@pytest.mark.parametrize("text", [FULL, MODEL + '[dataset]\ndata_dir = "train"\n', INLINE, REGULARISATION, EMPTY_TEXTS])
def test_the_pair_resolves_to_the_same_settings(workplace, text):
    assert convert(text) == 0
    original, pair = read_settings(["--config_file", "old.toml"]), read_settings(PAIR)
    assert comparable(pair) == comparable(original)


def test_the_pair_says_what_came_from_what(workplace):
    assert convert(FULL) == 0
    train_args = Path("kohya_converted/train_args.toml").read_text(encoding="utf-8").splitlines()
    dataset = Path("kohya_converted/dataset.toml").read_text(encoding="utf-8").splitlines()
    for line in (
        "learning_rate = 0.0002  # training.learning_rate",
        'mixed_precision = "no"  # training.mixed_precision',
        "max_train_epochs = 4  # training.epochs",
        'network_args = ["lokr_factor=4", "target_modules=q_proj,v_proj", "rank_dropout=0.1"]'
        "  # lora.lora_targets, lora.lokr_factor, lora.network_args",
        'optimizer_args = ["weight_decay=0.02", "eps=1e-08", "betas=(0.9,0.95)"]'
        "  # optimizer.beta2, optimizer.weight_decay",
        "network_dropout = 0.0  # root-style default",
        "save_every_n_steps = 200  # output.save_every",
        "#   training.auto_install: nothing is installed while training",
        "#   lora.lokr_constraint: LoKr is trained without constraint",
    ):
        assert line in train_args
    first, second, third = (
        dataset.index(f'  image_dir = "{folder}"  # dataset.data_dir')
        for folder in ("train", "train/10_cat", "train/deep/er")
    )
    assert dataset[first + 1] == "  num_repeats = 3  # dataset.repeats"
    assert dataset[second + 1 : second + 3] == [
        "  num_repeats = 10  # its folder",
        '  class_tokens = "cat"  # its folder',
    ]
    assert dataset[third + 1 :] == ["  num_repeats = 3  # dataset.repeats"]


def test_what_is_not_mapped_is_listed(workplace, capsys):
    assert convert(FULL) == 0
    out = capsys.readouterr().out
    lines = FULL.splitlines()
    install, constraint = lines.index("auto_install = true") + 1, lines.index("lokr_constraint = 0.0") + 1
    assert f"not mapped: old.toml:{install}: training.auto_install: nothing is installed while training" in out
    assert f"not mapped: old.toml:{constraint}: lora.lokr_constraint: LoKr is trained without constraint" in out
    assert "--config_file kohya_converted/train_args.toml --dataset_config kohya_converted/dataset.toml" in out


def test_keys_to_services_are_not_shown(workplace, capsys):
    assert convert(FULL + "[wandb]\napi_key = 'hush'\n") == 0
    train_args = Path("kohya_converted/train_args.toml").read_text(encoding="utf-8")
    assert "#   wandb.api_key: " in train_args
    said = capsys.readouterr()
    assert not any("hush" in text for text in (train_args, said.out, said.err))


def test_names_folder_and_overwriting(workplace, capsys):
    words = ["--output_dir", "new", "--train_args_name", "a", "--dataset_name", "b.toml"]
    assert convert(FULL, *words) == 0
    written = {path.name: path.read_bytes() for path in Path("new").iterdir()}
    assert set(written) == {"a.toml", "b.toml"}
    assert convert(INLINE, *words) == 1
    message = f"{Path('new/a.toml')} exists; choose another --output_dir or add --overwrite"
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path("new").iterdir()} == written
    assert convert(INLINE, *words, "--overwrite") == 0
    assert "[[datasets]]" in Path("new/b.toml").read_text()
    assert Path("new/a.toml").read_bytes() != written["a.toml"]


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("learning_rate = 1e-4\n[model]\nvae = 'x'\n", [], "old.toml is not a root-style file"),
        (FULL.replace("grad_accum", "grad_acum"), [], "old.toml:25: unknown setting training.grad_acum; did you mean"),
        (FULL.replace("batch_size = 2", "batch_size = 'two'"), [], "old.toml:24: training.batch_size = 'two'"),
        (MODEL, [], "no pictures are named"),
        (INLINE + "[dataset]\ndata_dir = 'train'", [], "both name the pictures"),
        ("[model\n", [], "old.toml:1: is not valid TOML"),
        (FULL, ["--train_args_name", "a/b"], "--train_args_name: 'a/b' is not a file name"),
        (FULL, ["--train_args_name", "a", "--dataset_name", "a.toml"], "are the same; give two names"),
        (FULL, ["--output_dir", ".", "--dataset_name", "old", "--overwrite"], "old.toml is the input itself"),
    ],
)
def test_errors_end_with_1_and_write_nothing(workplace, capsys, text, words, message):
    assert convert(text, *words) == 1
    assert message in capsys.readouterr().err
    assert Path("old.toml").read_text(encoding="utf-8") == text
    assert not Path("kohya_converted").exists()


def test_a_missing_input_is_named(workplace, capsys):
    assert main(["--input", "none.toml"]) == 1
    assert "--input: there is no file none.toml" in capsys.readouterr().err


def test_pictures_of_another_machine_are_named_as_one_folder(workplace, capsys):
    assert convert(FULL.replace('"train"', '"/nowhere/pictures"')) == 0
    assert "/nowhere/pictures does not exist" in capsys.readouterr().err
    dataset = Path("kohya_converted/dataset.toml").read_text(encoding="utf-8")
    subset = '  image_dir = "/nowhere/pictures"  # dataset.data_dir\n  num_repeats = 3  # dataset.repeats\n'
    assert dataset.endswith(f"[[datasets.subsets]]\n{subset}")
    with pytest.raises(SettingError, match="nowhere"):
        read_settings(["--config_file", "old.toml"])


def test_training_from_the_pair_gives_the_same_losses(tiny_anima, tmp_path, monkeypatch, losses):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_anima / "train", "train")
    shutil.copytree(tiny_anima / "train" / "10_subject", "train/2_more")
    text = f"""
[model]
transformer_path = "{(tiny_anima / "anima.safetensors").as_posix()}"
vae_path = "{(tiny_anima / "qwen_image_vae.safetensors").as_posix()}"
text_encoder_path = "{(tiny_anima / "qwen3").as_posix()}"
t5_tokenizer_dir = "{(tiny_anima / "t5").as_posix()}"
[dataset]
data_dir = "train"
resolution = 64
min_reso = 32
max_reso = 128
reso_step = 16
shuffle_caption = true
flip_augment = true
[training]
max_steps = 3
batch_size = 2
grad_accum = 2
mixed_precision = "fp32"
lr_scheduler = "cosine"
lr_min_ratio = 0.1
caption_tag_dropout_rate = 0.3
[lora]
network_type = "lokr"
lora_rank = 4
"""
    assert convert(text) == 0
    assert train(["--config_file", "old.toml", "--output_dir", "a"]) == 0
    original = losses.copy()
    losses.clear()
    assert train([*PAIR, "--output_dir", "b"]) == 0
    assert len(original) == 3
    assert losses == original
