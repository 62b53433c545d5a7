"""Settings of the training data: the run's own, and those of each dataset and subset of a dataset TOML."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from library.data.caption_mix import parse_caption_mix
from library.data.setting_values import (
    parse_face_crop_range,
    parse_resolution,
    parse_resolutions,
    parse_separator,
)
from library.options import option


@dataclass(frozen=True)
class DataSettings:
    """Where the pictures come from, and what is prepared ahead of training."""

    dataset_config: Path | None = option(None, "Dataset TOML: [general], [[datasets]], [[datasets.subsets]].")
    train_data_dir: Path | None = option(
        None,
        "Folder of pictures, searched recursively; each folder that holds pictures is a subset, and a folder named "
        "'10_subject' repeats its pictures 10 times and has 'subject' as its class_tokens.",
    )
    reg_data_dir: Path | None = option(
        None,
        "Folder of regularisation pictures beside train_data_dir, searched in the same way: pictures of the general "
        "kind (any cat, where you train yours), which keep the model from forgetting it. See is_reg.",
    )
    in_json: Path | None = option(
        None, "Metadata file (.json, .jsonl) with the captions of the pictures in train_data_dir; see metadata_file."
    )
    cache_latents: bool = option(
        False,
        "Encode every picture once, before training, and keep the latents in memory (1 MiB each at 1024x1024): faster "
        "steps with less GPU memory.",
    )
    cache_latents_to_disk: bool = option(
        False,
        "Encode every picture once and keep the latents in files, so that the next run starts at once; includes "
        "cache_latents. A changed picture, size or VAE is noticed and encoded anew.",
    )
    vae_batch_size: int = option(
        1,
        "Pictures encoded at once while latents are cached: more may be faster, and take more GPU memory.",
        zero_is_unset=True,
    )
    cache_text_encoder_outputs: bool = option(
        False,
        "Encode each caption once, ahead of its step, and keep the result in memory; Qwen3 then leaves the GPU while "
        "training. Shuffling and dropout of captions go on as before.",
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        False, "Keep encoded captions in files as well, for the next run; includes cache_text_encoder_outputs."
    )
    text_cache_memory_gb: float = option(
        2.0, "Most main memory for encoded captions, in GiB (2 GiB hold about 10,000 of 100 tokens)."
    )
    text_cache_disk_gb: float = option(
        20.0, "Most disk space for encoded captions, in GiB; those unused for longest are deleted first."
    )
    cache_dir: Path | None = option(
        None,
        "Folder for cached latents and captions, for pictures on a slow or read-only disk. Unset: a folder "
        "'.anima_cache' in each picture folder.",
    )
    skip_cache_check: bool = option(
        False,
        "Start faster with many thousands of cached pictures: take cached files by their names without looking into "
        "them, and pictures whose size and time are the same for unchanged.",
    )
    max_data_loader_n_workers: int = option(
        0,
        "Processes that load pictures beside training; 0 lets threads of the main one do it. More help only where "
        "latents are not cached and the GPU waits for pictures.",
    )
    persistent_data_loader_workers: bool = option(False, "Keep the loading processes alive between epochs.")
    skip_broken_images: bool = option(
        False,
        "Leave out pictures that cannot be read, with a count, rather than stop the run. To find them, every picture "
        "is read whole at the start, which takes a minute for some thousands.",
    )
    masked_loss: bool | None = option(
        None, "Weight the loss by masks. Unset: where a folder has conditioning_data_dir or alpha_mask."
    )

    @property
    def caches_latents(self) -> bool:
        """Whether every picture is encoded before training."""
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def caches_text(self) -> bool:
        """Whether encoded captions are kept."""
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk


@dataclass(frozen=True)
class SubsetSettings:
    """One folder of captioned pictures."""

    image_dir: Path | None = option(None, "Folder with the pictures (not searched recursively).")
    metadata_file: Path | None = option(
        None,
        "JSON file {picture: {caption, tags, nl, image_size}}, or .jsonl with a line {image_path, caption, tags, nl, "
        "image_size} each, instead of caption files; its paths begin at image_dir, else where the file lies.",
    )
    num_repeats: int = option(
        1,
        "How often an epoch shows each picture: give more to folders with few pictures, so that none is lost among "
        "the others.",
        aliases=("dataset_repeats",),
    )
    is_reg: bool = option(
        False,
        "These are regularisation pictures: each epoch shows about as many of them as of the dataset's others, by "
        "repeating them or leaving some out. Their loss is weighted by prior_loss_weight.",
    )
    prior_loss_weight: float = option(
        1.0, "What the loss of regularisation pictures is multiplied by; less holds the model less to what it knew."
    )
    caption_extension: str = option(
        ".txt", "Ending of the caption file beside each picture.", aliases=("caption_extention",)
    )
    class_tokens: str | None = option(None, "Caption of a picture that has none of its own.")
    shuffle_caption: bool = option(
        False, "Shuffle a caption's tags anew each time it is used. Not for sentences: they have shuffle_sentences."
    )
    caption_separator: str = option(",", "What separates tags in a caption.", parse=parse_separator)
    secondary_separator: str = option(
        "",
        "Joins tags that stay together: with ';;;', 'red hat;;;long hat' is moved and dropped as one, and then "
        "separated like the others.",
    )
    keep_tokens: int = option(0, "How many tags at the start stay in place when tags are shuffled or dropped.")
    keep_tokens_separator: str = option(
        "",
        "Tags before this mark stay at the start, those after a second one at the end; used instead of keep_tokens "
        "where a caption contains it.",
    )
    enable_wildcard: bool = option(
        False,
        "Draw anew at each use: one of the choices of each {red|blue} in a caption, and one of its lines, where there "
        "are several. Off: braces are plain text, and the first line is the caption.",
    )
    caption_prefix: str = option("", "Text put before every caption, never shuffled or dropped with the tags.")
    caption_suffix: str = option("", "Text put after every caption, never shuffled or dropped with the tags.")
    caption_dropout_rate: float = option(
        0.0,
        "Share of uses in which the whole caption is left empty (0 to 1). 0.05 to 0.1 makes guidance work on what is "
        "trained, and prompts without its trigger get some of it.",
    )
    caption_dropout_every_n_epochs: int | None = option(
        None, "Leave all captions empty in every n-th epoch: 4 does so in epochs 4, 8, 12.", zero_is_unset=True
    )
    caption_tag_dropout_rate: float = option(
        0.0,
        "Chance of each tag to be left out at each use (0 to 1). 0.1 helps against tags that only work together; "
        "keep_tokens protects a trigger.",
    )
    token_warmup_step: int | float = option(
        0, "Steps over which captions grow from their first tags to all of them; below 1, a fraction of the run."
    )
    token_warmup_min: int = option(1, "How many tags, beside those that are kept, token_warmup_step begins with.")
    caption_mix: str | None = option(
        None,
        "Train tags and natural language (nl) as two fields, and how often each form is used: 'tags=0.4, nl=0.3, "
        "tags+nl=0.2, nl+tags=0.1'. Natural language comes from nl_extension, nl_separator or a metadata file; where "
        "a picture lacks a field, the other is used. Unset: a caption is one text.",
        parse=parse_caption_mix,
    )
    nl_extension: str = option(
        ".nl.txt", "caption_mix: ending of the file with natural language beside each picture; caption_extension's has "
        "the tags."
    )  # fmt: skip
    nl_separator: str = option(
        "",
        "caption_mix: the mark between tags and natural language where one file holds both, such as '###'; used "
        "instead of nl_extension.",
    )
    shuffle_sentences: bool = option(False, "caption_mix: shuffle the sentences of natural language anew at each use.")
    sentence_dropout_rate: float = option(
        0.0, "caption_mix: chance of each sentence of natural language to be left out at each use (0 to 1)."
    )
    flip_aug: bool = option(
        False, "Mirror pictures left to right in half of their uses. Not for what has a side: text, asymmetric clothes."
    )
    color_aug: bool = option(
        False, "Shift hue (up to 16 degrees) or gamma (up to 5 %) a little in a third of the uses. Not with caches."
    )
    random_crop: bool = option(
        False, "Crop pictures at a random place instead of the centre, anew each time. Not with caches."
    )
    face_crop_aug_range: tuple[float, float] | None = option(
        None,
        "Crop around the face, anew each time: '2.0,4.0' makes the crop's short side 2 to 4 times the face. For "
        "pictures whose names end in the face's centre and size in pixels, cat_<x>_<y>_<width>_<height>.png. Not with "
        "caches.",
        parse=parse_face_crop_range,
    )
    resize_interpolation: str | None = option(
        None,
        "How pictures are scaled. Unset: lanczos, which is best for nearly all; nearest keeps pixel art hard.",
        choices=("lanczos", "bicubic", "cubic", "bilinear", "linear", "area", "box", "nearest"),
    )
    alpha_mask: bool = option(
        False, "Train only what is not transparent: a picture's alpha weights the loss. The rest is white."
    )
    conditioning_data_dir: Path | None = option(
        None,
        "Folder with a mask for each picture, of the same name and shape: what is white (in the red channel) is "
        "trained, what is black is not.",
    )
    timestep_offset: int = option(
        0,
        "Moves this folder's timesteps by so many thousandths: 100 trains it nearer to noise, for composition, -100 "
        "nearer to the picture, for detail.",
    )

    @property
    def redrawn_by(self) -> list[str]:
        """The names of the settings in force that make other pixels of a picture at each use, beside mirroring."""
        return [name for name in ("color_aug", "random_crop", "face_crop_aug_range") if getattr(self, name)]


@dataclass(frozen=True)
class DatasetSettings:
    """Pictures that share a resolution and a batch size."""

    resolution: tuple[int, int] = option(
        (1024, 1024),
        "Training size in pixels: a side, or [width, height]; its area is the buckets' budget.",
        parse=parse_resolution,
    )
    resolutions: tuple[tuple[int, int], ...] = option(
        (),
        "Train every picture at each of several sizes, instead of at resolution: [768, 1024], or [[832, 1216], 1024] "
        "with widths and heights. An epoch is as many times longer.",
        parse=parse_resolutions,
    )
    batch_size: int = option(
        1,
        "Pictures in one batch. More make steadier steps and need more memory; --preflight tells what fits.",
        aliases=("train_batch_size",),
    )
    fill_last_batches: bool = option(
        False,
        "Fill up the last batch of each bucket, which is smaller otherwise, by showing some of its pictures once more: "
        "steadier steps where many buckets hold few pictures.",
    )
    enable_bucket: bool = option(
        False,
        "Train each picture at its own aspect ratio, within the area budget. Off: all are cropped to resolution.",
    )
    min_bucket_reso: int = option(256, "Shortest side of a bucket, in pixels.")
    max_bucket_reso: int = option(
        1024, "Longest side of a bucket, in pixels. 1536 leaves wide and tall pictures whole at resolution 1024."
    )
    bucket_reso_steps: int = option(64, "Bucket sides are multiples of this, itself a multiple of 16.")
    bucket_no_upscale: bool = option(False, "Never enlarge a picture: small ones get buckets of their own size.")
    validation_split: float = option(
        0.0,
        "Share of the pictures that is not trained but kept to measure the validation loss: 0.05 to 0.1 for some "
        "hundreds of pictures. 1 keeps all of them, for a dataset of its own.",
    )
    validation_seed: int | None = option(
        None, "What the choice of validation pictures follows from; set it to keep them when seed changes."
    )
    subsets: tuple[SubsetSettings, ...] = field(default=())

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of each size that its pictures are trained at: resolutions, else resolution alone."""
        return self.resolutions or (self.resolution,)
