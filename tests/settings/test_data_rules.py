"""Where pictures come from, and which settings of them go together."""

from pathlib import Path

import pytest

from library.data.caption_mix import mix_weights
from library.errors import SettingError
from library.settings import read_settings


def lines_of(words):
    with pytest.raises(SettingError) as caught:
        read_settings(words)
    return str(caught.value).splitlines()


def dataset_file(text, subset=""):
    Path("d.toml").write_text(f"[[datasets]]\n{text}\n[[datasets.subsets]]\nimage_dir = 'more'\n{subset}\n")
    return ["--dataset_config", "d.toml"]


def test_regularisation_folders_become_subsets_of_the_same_dataset(needed_flags):
    Path("reg/2_animal").mkdir(parents=True)
    Path("more/a.png").rename("reg/2_animal/a.png")
    (dataset,) = read_settings([*needed_flags, "--reg_data_dir", "reg", "--prior_loss_weight", "0.5"]).datasets
    found = [(each.image_dir, each.is_reg, each.num_repeats, each.class_tokens) for each in dataset.subsets]
    assert found == [(Path("train/10_cat"), False, 10, "cat"), (Path("reg/2_animal"), True, 2, "animal")]
    assert dataset.subsets[1].prior_loss_weight == 0.5


def test_a_metadata_file_makes_the_folder_one_subset(needed_flags):
    (dataset,) = read_settings([*needed_flags, "--in_json", "meta.json", "--dataset_repeats", "3"]).datasets
    (subset,) = dataset.subsets
    assert (subset.image_dir, subset.metadata_file, subset.num_repeats) == (Path("train"), Path("meta.json"), 3)


def test_a_subset_may_have_a_metadata_file_instead_of_a_folder(model_flags):
    Path("d.toml").write_text("[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'meta.jsonl'\n")
    (dataset,) = read_settings([*model_flags, "--dataset_config", "d.toml"]).datasets
    assert (dataset.subsets[0].image_dir, dataset.subsets[0].metadata_file) == (None, Path("meta.jsonl"))


@pytest.mark.parametrize(
    ("written", "sizes"),
    [
        ("[512, 768, 1024]", ((512, 512), (768, 768), (1024, 1024))),
        ("[[512, 512], [768, 1024]]", ((512, 512), (768, 1024))),
        ("[[832, 1216], 1024]", ((832, 1216), (1024, 1024))),
        ("['512', '832,1216']", ((512, 512), (832, 1216))),
        ("[512, 768]", ((512, 768),)),
        ("['512', '768']", ((512, 768),)),
        ("['512,768']", ((512, 768),)),
        ("'512,768'", ((512, 768),)),
        ("[[512, 768]]", ((512, 768),)),
    ],
)
def test_a_resolution_that_can_only_be_several_is_several(model_flags, written, sizes):
    (dataset,) = read_settings([*model_flags, *dataset_file(f"resolution = {written}")]).datasets
    assert dataset.sizes == sizes


def test_an_inner_resolution_wins_over_several_further_out(model_flags):
    text = "[general]\nresolutions = [512, 768]\n" + "".join(
        f"[[datasets]]\n{own}\n[[datasets.subsets]]\nimage_dir = 'train'\n" for own in
        ("resolution = 640", "resolutions = [256, 384]", "batch_size = 2")
    )  # fmt: skip
    Path("d.toml").write_text(text)
    found = [each.sizes for each in read_settings([*model_flags, "--dataset_config", "d.toml"]).datasets]
    assert found == [((640, 640),), ((256, 256), (384, 384)), ((512, 512), (768, 768))]


@pytest.mark.parametrize("resolutions", ["[512, 768]", '["512", 768]', "[[512, 512], [768, 768]]"])
def test_several_resolutions(model_flags, resolutions):
    (dataset,) = read_settings([*model_flags, *dataset_file(f"resolutions = {resolutions}")]).datasets
    assert dataset.sizes == ((512, 512), (768, 768))


@pytest.mark.parametrize(
    ("text", "subset", "words", "message"),
    [
        ("", "random_crop = true", ["--cache_latents"],
         "d.toml:5: datasets.subsets.random_crop: it changes pictures at each use, and cache_latents keeps one form: "
         "turn one of them off"),
        ("color_aug = true", "", ["--cache_latents_to_disk"],
         "d.toml:2: datasets.color_aug: it changes pictures at each use, and cache_latents_to_disk keeps one form: "
         "turn one of them off"),
        ("alpha_mask = true", "conditioning_data_dir = 'm'", [],
         "d.toml:2: datasets.alpha_mask: conditioning_data_dir gives masks as well: keep one of them"),
        ("", "", ["--masked_loss"],
         "command line: --masked_loss: there are no masks: give folders conditioning_data_dir or alpha_mask, or turn "
         "it off"),
        ("", "alpha_mask = true", ["--no-masked_loss"],
         "d.toml:5: datasets.subsets.alpha_mask: it gives masks, and masked_loss = false asks for none: remove one of "
         "them"),
        ("", "is_reg = true", [],
         "d.toml:5: datasets.subsets.is_reg: the dataset has no other pictures than regularisation ones"),
        ("", "", ["--reg_data_dir", "more"],
         "command line: --reg_data_dir: it belongs to train_data_dir; in dataset tables use is_reg and metadata_file"),
        ("enable_bucket = true\nresolutions = [512, 1536]", "", [],
         "d.toml:3: datasets.resolutions: 1536x1536 goes beyond max_bucket_reso, which is 1024: change the one or the "
         "other"),
        ("caption_separator = ';'", "secondary_separator = ';;;'", [],
         "d.toml:5: datasets.subsets.secondary_separator: it contains caption_separator, which would cut it"),
        ("keep_tokens_separator = '|||'", "caption_mix = 'nl=1'\nnl_separator = '|||'", [],
         "d.toml:6: datasets.subsets.nl_separator: it is the same as keep_tokens_separator: choose another mark"),
        ("nl_separator = '###'", "", [],
         "d.toml:2: datasets.nl_separator: without caption_mix the mark would be trained as text: set caption_mix"),
        ("caption_mix = 'nl=1'", "nl_extension = '.txt'", [],
         "d.toml:5: datasets.subsets.nl_extension: it is the same as caption_extension"),
        ("caption_dropout_every_n_epochs = 1", "", [],
         "d.toml:2: datasets.caption_dropout_every_n_epochs: 1 is out of range; give 2 or more"),
        ("caption_mix = 'tag=1'", "", [], "d.toml:2: datasets.caption_mix = 'tag=1': 'tag' is none of the forms tags"),
        ("", "face_crop_aug_range = '4.0,2.0'", [],
         "d.toml:5: datasets.subsets.face_crop_aug_range = '4.0,2.0': expected how many times as long as the face"),
        ("", "face_crop_aug_range = [2, 4]", ["--cache_latents"],
         "d.toml:5: datasets.subsets.face_crop_aug_range: it changes pictures at each use, and cache_latents keeps one "
         "form: turn one of them off"),
        ("resolution = [512, 768, 'x']", "", [], "d.toml:2: datasets.resolution = [512, 768, 'x']: expected a side"),
        ("", "resolution = 512", [], "resolution does not belong here; put it under [general] or [[datasets]]"),
        ("metadata_file = 'm.json'", "", [], "metadata_file does not belong here; put it under [[datasets.subsets]]"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(model_flags, text, subset, words, message):
    Path("m").mkdir()
    (line,) = lines_of([*model_flags, *dataset_file(text, subset), *words])
    assert message in line


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prior_loss_weight = 0.5", "prior_loss_weight does nothing: no pictures are for regularisation"),
        ("resolution = 512\nresolutions = [512, 768]", "resolution does nothing: resolutions is set, and wins"),
        ("validation_seed = 1", "validation_seed does nothing: no dataset is split"),
        ("token_warmup_min = 3", "token_warmup_min does nothing: token_warmup_step is 0"),
        ("keep_tokens = 3", "keep_tokens does nothing: no tags are shuffled or dropped"),
        ("shuffle_sentences = true", "shuffle_sentences does nothing: it is for caption_mix, which is not set"),
        (
            "nl_extension = '.nl'\nnl_separator = '#'\ncaption_mix = 'nl=1'",
            "nl_extension does nothing: nl_separator is set, and wins",
        ),
        ("custom_attributes = {a = 1}", "custom_attributes does nothing"),
        ("cache_info = true", "cache_info does nothing"),
    ],
)
def test_what_does_nothing_is_said(model_flags, caplog, text, reason):
    read_settings([*model_flags, *dataset_file(text)])
    assert reason in caplog.text


def test_a_subset_may_turn_off_what_it_inherits(model_flags):
    outer = "caption_mix = 'nl=1'\nnl_separator = '#'\ncaption_dropout_every_n_epochs = 4"
    inner = "caption_mix = ''\nnl_separator = ''\ncaption_dropout_every_n_epochs = 0"
    (dataset,) = read_settings([*model_flags, *dataset_file(outer, inner)]).datasets
    (subset,) = dataset.subsets
    assert (subset.caption_mix, subset.nl_separator, subset.caption_dropout_every_n_epochs) == (None, "", None)


def test_the_example_of_the_page_is_read(model_flags):
    page = Path(__file__).parents[2] / "docs" / "datasets.md"
    Path("d.toml").write_text(page.read_text(encoding="utf-8").partition("```toml\n")[2].partition("```")[0])
    for folder in ("cat", "other cats"):
        Path("pictures", folder).mkdir(parents=True)
    first, second = read_settings([*model_flags, "--dataset_config", "d.toml"]).datasets
    assert (first.sizes, second.sizes) == (((768, 768), (1024, 1024)), ((832, 1216),))
    assert [subset.is_reg for subset in first.subsets] == [False, True]


def test_the_mix_of_the_page_is_read(model_flags):
    page = Path(__file__).parents[2] / "docs" / "datasets.md"
    text = page.read_text(encoding="utf-8").partition("## Tags and natural language")[2]
    (dataset,) = read_settings(
        [*model_flags, *dataset_file("", text.partition("```toml\n")[2].partition("```")[0])]
    ).datasets
    (subset,) = dataset.subsets
    assert mix_weights(subset.caption_mix) == {"tags": 0.4, "nl": 0.3, "tags+nl": 0.2, "nl+tags": 0.1}
    assert subset.shuffle_sentences and subset.keep_tokens == 1
