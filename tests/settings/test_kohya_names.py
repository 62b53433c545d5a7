"""Every setting name that Kohya's users, GUIs and scripts rely on: read with the right type, or spoken of by name."""

import logging
from pathlib import Path

import pytest

from library.settings import read_settings
from library.settings.command_line import parse_command_line, program_options
from library.settings.groups import by_spelling, subset_options, top_level_options
from library.settings.kohya_only import FIXED, NO_EFFECT, REFUSED
from library.settings.resolve import resolve
from library.settings.toml_files import read_toml

# What a train_args.toml says, one to a line: spelling = value. "-> name" where the setting has another name. "!" marks
# what is no setting here: it is said to have no effect, or refused with what to do instead.
RUN = """
pretrained_model_name_or_path = "a/b.safetensors"
anima_transformer = "a/b.safetensors" -> pretrained_model_name_or_path
vae = "a/b.safetensors"
qwen = "a/qwen"
qwen3 = "a/qwen" -> qwen
t5_tokenizer_dir = "t5"
t5_tokenizer_path = "t5" -> t5_tokenizer_dir
anima_seq_len = 512
anima_attention_backend = "torch"
attn_mode = "xformers" -> anima_attention_backend
xformers = true
sdpa = true
mem_eff_attn = true
xfomers = false
anima_timestep_sampling = "uniform"
anima_sigmoid_scale = 1.5
sigmoid_scale = 1.5 -> anima_sigmoid_scale
anima_flow_shift = 2.5
discrete_flow_shift = 2.5 -> anima_flow_shift
anima_noise_offset = 0.05
noise_offset = 0.05 -> anima_noise_offset
noise_offset_type = "Original" !
noise_offset_random_strength = true
adaptive_noise_scale = 0.1 !
multires_noise_iterations = 6
multires_noise_discount = 0.3
ip_noise_gamma = 0.1
ip_noise_gamma_random_strength = true
timestep_sampling = "shift"
weighting_scheme = "mode"
logit_mean = 0.5
logit_std = 1.5
mode_scale = 1.5
min_timestep = 100
max_timestep = 900
loss_type = "smooth_l1"
huber_schedule = "constant"
huber_c = 0.2
huber_scale = 0.5
prior_loss_weight = 0.5
masked_loss = true
model_prediction_type = "raw" !
guidance_scale = 3.5 !
training_shift = 3.0 !
network_module = "networks.lokr_anima"
adapter_format = ["kohya", "comfy"]
train_llm_adapter = false
llm_adapter_lr = 1e-5
network_dim = 16
network_alpha = 8
network_dropout = 0.1
network_args = ["conv_dim=4", "a=b=c"]
network_weights = "a.safetensors"
dim_from_weights = true
base_weights = ["a.safetensors", "b.safetensors"]
base_weights_multiplier = [0.5, 1.0]
network_train_unet_only = true
network_train_text_encoder_only = true !
unet_lr = "1e-4"
text_encoder_lr = 1e-5
scale_weight_norms = 1.0
train_norm = false
training_comment = "a note"
no_metadata = true
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.1", "betas=(0.9,0.99)"]
learning_rate = 2e-4
max_grad_norm = 0.5
lr_scheduler = "cosine_with_restarts"
lr_warmup_steps = 0.05
lr_decay_steps = 100
lr_scheduler_num_cycles = 3
lr_scheduler_power = 2.0
lr_scheduler_min_lr_ratio = 0.1
lr_scheduler_timescale = 100
lr_scheduler_type = "torch.optim.lr_scheduler.ConstantLR"
lr_scheduler_args = ["factor=1.0"]
use_8bit_adam = true !
use_lion_optimizer = true !
optimizer_schedulefree_wrapper = true !
schedulefree_wrapper_args = ["a=1"] !
fused_backward_pass = true !
max_train_steps = 100
max_train_epochs = 3
train_batch_size = 2 -> batch_size
gradient_accumulation_steps = 2
gradient_checkpointing = true
cpu_offload_checkpointing = true
mixed_precision = "bf16"
full_bf16 = true
full_fp16 = true
fp8_base = true
seed = 7
max_data_loader_n_workers = 2
persistent_data_loader_workers = true
cache_latents = true
cache_latents_to_disk = true
vae_batch_size = 4
cache_text_encoder_outputs = true
cache_text_encoder_outputs_to_disk = true
text_encoder_batch_size = 4 !
skip_cache_check = true
blocks_to_swap = 4
torch_compile = true
compile = true -> torch_compile
dynamo_backend = "inductor" !
lowram = true !
highvram = true !
initial_step = 10
initial_epoch = 2
skip_until_initial_step = true
ddp_timeout = 10 !
ddp_gradient_as_bucket_view = true !
ddp_static_graph = true !
deepspeed = true !
zero_stage = 2 !
offload_optimizer_device = "cpu" !
offload_optimizer_nvme_path = "x" !
offload_param_device = "cpu" !
offload_param_nvme_path = "x" !
zero3_init_flag = true !
zero3_save_16bit_model = true !
fp16_master_weights_and_gradients = true !
output_dir = "out"
output_name = "my_lora"
save_model_as = "safetensors" !
save_precision = "bf16"
save_every_n_epochs = 2
save_every_n_steps = 100
save_n_epoch_ratio = 5
save_last_n_epochs = 3
save_last_n_steps = 300
save_last_n_epochs_state = 2
save_last_n_steps_state = 200
save_state = true
save_state_on_train_end = true
resume = "a-state"
huggingface_repo_id = "me/my_lora"
huggingface_repo_type = "model"
huggingface_path_in_repo = "a"
huggingface_token = "hf_x"
huggingface_repo_visibility = "private"
save_state_to_huggingface = true
resume_from_huggingface = true
async_upload = true
log_with = "none"
log_every_n_steps = 5
logging_dir = "curves"
log_prefix = "x_"
log_tracker_name = "x"
log_tracker_config = "x.toml"
wandb_run_name = "x"
wandb_api_key = "abc"
log_config = true
auto_start_tensorboard = false
tensorboard_host = "0.0.0.0"
tensorboard_port = 6007
tensorboard_logdir = "curves"
console_log_level = "DEBUG" !
console_log_file = "x.log" !
console_log_simple = true !
validation_split = 0.1
validation_seed = 3
validate_every_n_steps = 10
validate_every_n_epochs = 2
max_validation_steps = 5
sample_prompts = "prompts.txt"
sample_every_n_steps = 100
sample_every_n_epochs = 2
sample_at_first = true
sample_sampler = "euler_a"
anima_resume_snapshot_strict = true
resume_ignore_optimizer_mismatch = false
on_nonfinite = "raise"
anima_monitor_memory = false
anima_monitor_alert_policy = "raise"
anima_monitor_memory_warn_ratio = 0.8
anima_monitor_loss_spike_ratio = 5.0
auto_download_t5_tokenizer = false
t5_tokenizer_repo_id = "a/b"
t5_tokenizer_subfolder = "x"
t5_tokenizer_modelscope_fallback = false
t5_tokenizer_modelscope_repo_id = "a/b"
t5_tokenizer_modelscope_revision = "v1"
t5_tokenizer_modelscope_subfolder = "x"
t5_tokenizer_validate_strict = true
metadata_title = "x"
metadata_author = "x"
metadata_description = "x"
metadata_license = "x"
metadata_tags = "a, b"
metadata_usage_hint = "x"
metadata_trigger_phrase = "x"
metadata_thumbnail = "x" !
metadata_merged_from = "x" !
train_data_dir = "train"
reg_data_dir = "reg"
in_json = "meta.json"
dataset_repeats = 3 -> num_repeats
dataset_config = "d.toml"
dataset_class = "a.B" !
debug_dataset = true !
no_half_vae = true
v2 = true !
v_parameterization = true !
zero_terminal_snr = true !
clip_skip = 2 !
max_token_length = 225 !
weighted_captions = true !
min_snr_gamma = 5.0 !
scale_v_pred_loss_like_noise_pred = true !
v_pred_like_loss = 0.1 !
debiased_estimation_loss = true !
tokenizer_cache_dir = "x" !
disable_mmap_load_safetensors = true !
"""

DATASET = """
resolution = [832, 1216]
batch_size = 2
enable_bucket = true
min_bucket_reso = 512
max_bucket_reso = 2048
bucket_reso_steps = 32
bucket_no_upscale = true
resize_interpolation = "area"
network_multiplier = 0.5
num_repeats = 3
caption_extension = ".caption"
caption_extention = ".caption" -> caption_extension
class_tokens = "a cat"
is_reg = true
shuffle_caption = true
keep_tokens = 2
keep_tokens_separator = "|||"
secondary_separator = ";;;"
caption_separator = "|"
enable_wildcard = true
caption_prefix = "a "
caption_suffix = " b"
caption_dropout_rate = 0.1
caption_dropout_every_n_epochs = 3
caption_tag_dropout_rate = 0.1
token_warmup_min = 2
token_warmup_step = 100
flip_aug = true
color_aug = true
random_crop = true
face_crop_aug_range = "2.0,4.0"
alpha_mask = true
conditioning_data_dir = "masks"
cache_info = true !
custom_attributes = {a = 1} !
image_dir = "pictures"
metadata_file = "meta.jsonl"
"""

OWN_TYPES = {  # values that are not what TOML reads
    "resolution": (832, 1216),
    "unet_lr": 1e-4,
    "network_alpha": 8.0,
    "lr_scheduler_num_cycles": 3.0,
    "adapter_format": ("kohya", "comfy"),
    "base_weights": (Path("a.safetensors"), Path("b.safetensors")),
    "base_weights_multiplier": (0.5, 1.0),
    "face_crop_aug_range": (2.0, 4.0),
}


def table(text):
    for line in text.strip().splitlines():
        written, _, name = line.removesuffix(" !").partition(" -> ")
        spelling, _, toml = written.partition(" = ")
        yield pytest.param(spelling, toml, name or spelling, line.endswith(" !"), id=spelling)


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(("spelling", "toml", "name", "is_elsewhere"), [*table(RUN), *table(DATASET)])
def test_the_name_is_known(spelling, toml, name, is_elsewhere, tmp_path, caplog):
    (tmp_path / "a.toml").write_text(f"[heading]\n{spelling} = {toml}")
    options, problems = {**top_level_options(), **subset_options()}, []
    (entry,) = read_toml(tmp_path / "a.toml").flat_entries()
    given = resolve([entry], options, problems)
    if spelling in by_spelling(options):
        assert not is_elsewhere
        assert problems == told(caplog) == []
        assert list(given) == [name]
        assert_is(given[name].value, entry.value, name)
    elif spelling in NO_EFFECT:
        assert [spelling in text for text in told(caplog)] == ([] if toml == "false" else [True])
        assert problems == []
    elif spelling in FIXED:
        assert len(problems) in (0, 1)
    else:
        assert [f"{spelling} is not available here: " in text for text in problems] == [True]


def assert_is(value, toml_value, name):
    """The value is what the file says, in the type of the setting."""
    if name in OWN_TYPES:
        assert (value, type(value)) == (OWN_TYPES[name], type(OWN_TYPES[name]))
    elif hasattr(value, "reveal"):
        assert value.reveal() == toml_value
    elif isinstance(value, tuple):
        assert list(value) == toml_value
    else:
        assert (value.as_posix() if isinstance(value, Path) else value) == toml_value


@pytest.mark.parametrize(("spelling", "toml", "name", "is_elsewhere"), [*table(RUN)])
def test_the_name_is_a_flag(spelling, toml, name, is_elsewhere):
    values = toml.strip("[]").split(", ") if toml.startswith("[") else [toml]
    words = [f"--{spelling}", *(value.strip('"') for value in values if value not in ("true", "false"))]
    (entry,) = parse_command_line(words).entries
    assert entry.name == spelling


def test_a_file_with_every_harmless_name_is_read_and_each_is_named_once(workplace, needed_flags, caplog):
    lines = [line for line in RUN.strip().splitlines() if line.endswith("!") and line.split(" ")[0] in NO_EFFECT]
    (workplace / "all.toml").write_text("\n".join(line.removesuffix(" !") for line in lines))
    read_settings([*needed_flags, "--config_file", "all.toml"])
    assert [text.split(" ")[1] for text in told(caplog)] == [line.split(" ")[0] for line in lines]


def test_every_option_of_ours_is_in_no_table_of_kohyas():
    known = {*by_spelling({**top_level_options(), **subset_options()}), *program_options()}
    assert not known & {*NO_EFFECT, *FIXED, *REFUSED}
