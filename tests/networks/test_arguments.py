"""network_args: typed and strict."""

import pytest

from library.errors import SettingError
from networks.arguments import by_pattern, read_arguments


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
    ],
)
def test_mistakes_are_named(given, adapter_type, message):
    with pytest.raises(SettingError) as error:
        read_arguments(given, adapter_type)
    assert message in str(error.value)


def test_values_by_pattern():
    assert by_pattern("x", ("mlp.layer1=8", "re:a=b=4"), int) == {"mlp.layer1": 8, "re:a=b": 4}
    for entry in ("mlp", "mlp=", "=4", "mlp=big"):
        with pytest.raises(SettingError, match="pattern=number"):
            by_pattern("network_reg_dims", (entry,), int)
