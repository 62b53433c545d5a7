"""network_args: typed and strict."""

import pytest

from library.errors import SettingError
from library.options import options_of
from networks.arguments import NetworkArguments, by_pattern, read_arguments

LOKR_ONLY = {"factor", "full_matrix", "decompose_both"}


def test_text_becomes_typed_values():
    arguments = read_arguments(
        {"factor": "4", "full_matrix": "True", "rank_dropout": "0.1", "target_modules": "q_proj, mlp.layer1",
         "exclude_patterns": "[r'.*mlp.*', 'final_layer.linear']", "llm_adapter_lr": "1e-5", "train_norm": "false"},
        "lokr",
    )  # fmt: skip
    assert (arguments.factor, arguments.full_matrix, arguments.rank_dropout) == (4, True, 0.1)
    assert arguments.target_modules == ("q_proj", "mlp.layer1")
    assert arguments.exclude_patterns == (".*mlp.*", "final_layer.linear")
    assert (arguments.llm_adapter_lr, arguments.train_norm) == (1e-5, False)


@pytest.mark.parametrize(
    ("spelling", "name", "adapter_type"),
    [("lokr_factor", "factor", "lokr"), ("lokr_full_matrix", "full_matrix", "lokr"),
     ("lokr_decompose_both", "decompose_both", "lokr"), ("lokr_rank_dropout", "rank_dropout", "lokr"),
     ("lokr_module_dropout", "module_dropout", "lokr"), ("use_rslora", "rs_lora", "lora"), ("dora_wd", "dora", "lora")],
)  # fmt: skip
def test_other_spellings(spelling, name, adapter_type):
    value = {"factor": "2"}.get(name, "0" if "dropout" in name else "true")
    assert getattr(read_arguments({spelling: value}, adapter_type), name) is not None
    with pytest.raises(SettingError, match=f"{name} is given twice"):
        read_arguments({spelling: value, name: value}, adapter_type)


@pytest.mark.parametrize(
    ("given", "adapter_type", "message"),
    [
        ({"facto": "4"}, "lokr", "no argument 'facto'; did you mean factor"),
        ({"factor": "4"}, "lora", "factor belongs to networks.lokr_anima"),
        ({"factor": "four"}, "lokr", "factor = 'four': expected a whole number"),
        ({"factor": "0"}, "lokr", "factor = 0"),
        ({"train_norm": "maybe"}, "lora", "train_norm = 'maybe': expected true or false"),
        ({"rank_dropout": "1"}, "lora", "rank_dropout = 1.0 is not a chance"),
        ({"rank_dropout_scale": "true"}, "lora", "rank_dropout_scale belongs to LoKr and LoHa"),
        ({"loraplus_lr_ratio": "0"}, "lora", "loraplus_lr_ratio = 0.0"),
        ({"exclude_patterns": "['a'"}, "lora", "is not a list of strings"),
        ({"conv_dim": "4"}, "lora", "conv_dim: the model has no convolutions that adapters change; remove it"),
        ({"conv_alpha": "4"}, "lokr", "conv_alpha: the model has no convolutions that adapters change; remove it"),
        ({"xyz": "4"}, None, "this project's networks have no argument 'xyz'; it takes target_modules"),
    ],
)
def test_mistakes_are_named(given, adapter_type, message):
    with pytest.raises(SettingError) as error:
        read_arguments(given, adapter_type)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("adapter_type", "foreign"),
    [("lora", {*LOKR_ONLY, "rank_dropout_scale"}), ("loha", LOKR_ONLY), ("lokr", set())],
)
def test_only_what_the_type_takes_is_named(adapter_type, foreign):
    with pytest.raises(SettingError) as error:
        read_arguments({"xyz": "1"}, adapter_type)
    listed = set(str(error.value).partition("it takes ")[2].split(", "))
    assert listed == {each.name for each in options_of(NetworkArguments)} - foreign
    with pytest.raises(SettingError) as error:
        read_arguments({"facto": "1"}, adapter_type)
    assert ("did you mean factor" in str(error.value)) == (adapter_type == "lokr")


def test_all_mistakes_are_told_at_once():
    given = {"conv_dim": "4", "factor": "8", "lokr_full_matrix": "true", "modul": "1", "rank_dropout": "2",
             "dora": "perhaps"}  # fmt: skip
    with pytest.raises(SettingError) as error:
        read_arguments(given, "lora")
    lines = str(error.value).splitlines()
    assert len(lines) == len(given)
    for name in given:
        assert sum(line.startswith("network_args: ") and name in line.partition(";")[0] for line in lines) == 1


def test_values_by_pattern():
    assert by_pattern("x", ("mlp.layer1=8", "re:a=b=4"), int) == {"mlp.layer1": 8, "re:a=b": 4}
    for entry in ("mlp", "mlp=", "=4", "mlp=big"):
        with pytest.raises(SettingError, match="pattern=number"):
            by_pattern("network_reg_dims", (entry,), int)
