from __future__ import annotations

import json
import logging

import pytest

from library.anima_runtime.sampling.prompts import PromptRequest, read_prompts
from library.errors import SettingError


def parse(tmp_path, text, name="prompts.txt"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_prompts(path)


def test_lines_become_requests(tmp_path):
    text = """# a comment
masterpiece, 1girl -- smile, self-made

  cat --w 512 --h 768 --d 7 --s 12 --l 4.5 --fs 1 --n worst quality, (blurry:1.2)
--d 3
dog --n  --l 1
"""
    assert parse(tmp_path, text) == [
        PromptRequest("masterpiece, 1girl -- smile, self-made", "", 1024, 1024, 42, 30, 4.0, 3.0),
        PromptRequest("cat", "worst quality, (blurry:1.2)", 512, 768, 7, 12, 4.5, 1.0),
        PromptRequest("", seed=3),
        PromptRequest("dog", "", cfg=1.0),
    ]


def test_windows_files_are_read(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("﻿猫 --d 1\r\ndog\r\n".encode())
    assert [request.prompt for request in read_prompts(path)] == ["猫", "dog"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--w 1000", "--w 1000: expected a multiple of 16"),
        ("--h 0", "--h 0: expected a multiple of 16"),
        ("--h tall", "--h tall: expected a multiple of 16"),
        ("--s 0", "--s 0: expected a whole number from 1"),
        ("--s 2.5", "--s 2.5: expected a whole number from 1"),
        ("--d -1", "--d -1: expected a whole number from 0"),
        ("--l nan", "--l nan: expected a number above 0"),
        ("--fs 0", "--fs 0: expected a number above 0"),
        ("--g high", "--g high: expected a number above 0"),
        ("--w", "--w : expected a multiple of 16"),
        ("--cn x.png", "unknown flag --cn; known: --w, --h,"),
        ("--ss plms", "--ss plms: no such sampler; there are euler,"),
    ],
)
def test_bad_flags_are_named_with_their_line(tmp_path, flags, complaint):
    with pytest.raises(SettingError) as caught:
        parse(tmp_path, f"cat\n\ndog {flags} --n bad\n")
    assert str(caught.value).startswith(f"{tmp_path / 'prompts.txt'}, line 3: {complaint}")


def test_all_mistakes_of_all_prompts_are_told_at_once(tmp_path):
    with pytest.raises(SettingError) as caught:
        parse(tmp_path, "cat --w 250 --h 256 --s x --q 5\ndog --l 0\n")
    told = [line.removeprefix(f"{tmp_path / 'prompts.txt'}, line ") for line in str(caught.value).splitlines()]
    assert [line.partition(" --")[2].partition(" ")[0] for line in told if line.startswith("1: unknown")] == ["q;"]
    assert [line.rpartition(":")[0] for line in told if "unknown" not in line] == [
        "1: --w 250", "1: --s x", "2: --l 0",
    ]  # fmt: skip
    with pytest.raises(SettingError) as caught:
        parse(tmp_path, '[prompt]\nprompt = "cat"\nwidth = 250\nstep = 4\nseed = "x"\n', "prompts.toml")
    for part in ("width = 250", "unknown key step; did you mean", "seed = x"):
        assert part in str(caught.value)


def test_guidance_is_told_once_to_have_no_effect(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        requests = parse(tmp_path, "cat --g 3.5 --d 1\ndog --g 2\nbird\n")
    assert requests == [PromptRequest("cat", seed=1), PromptRequest("dog"), PromptRequest("bird")]
    assert len(caplog.records) == 1
    assert "--g" in caplog.text


def test_files_that_hold_no_prompts_are_refused(tmp_path):
    with pytest.raises(SettingError, match="holds no prompt"):
        parse(tmp_path, "# only\n\n")
    with pytest.raises(SettingError, match="holds no prompt"):
        parse(tmp_path, "[]", "prompts.json")
    with pytest.raises(SettingError, match=r"sample_prompts = .*nothing\.txt"):
        read_prompts(tmp_path / "nothing.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SettingError, match="UTF-8"):
        read_prompts(tmp_path / "latin.txt")


TOML = """
[prompt]
negative_prompt = "bad"
width = 512
sample_steps = 12
sample_sampler = "heun"
[[prompt.subset]]
prompt = "cat"
height = 768
seed = 7
[[prompt.subset]]
prompt = "dog"
scale = 2.5
flow_shift = 1
guidance_scale = 3
sample_steps = 4
"""
CAT = PromptRequest("cat", "bad", 512, 768, 7, 12, 4.0, 3.0, "heun")
DOG = PromptRequest("dog", "bad", 512, 1024, 42, 4, 2.5, 1.0, "heun")


def test_toml_and_json_say_the_same(tmp_path, caplog):
    assert parse(tmp_path, TOML, "prompts.toml") == [CAT, DOG]
    assert "--g is for guidance-distilled models" in caplog.text
    as_json = json.dumps(
        [
            {"prompt": "cat", "negative_prompt": "bad", "width": 512, "height": 768, "seed": 7, "sample_steps": 12,
             "sample_sampler": "heun"},
            "dog --n bad --w 512 --l 2.5 --fs 1 --s 4 --ss heun",
        ]
    )  # fmt: skip
    assert parse(tmp_path, as_json, "prompts.json") == [CAT, DOG]


def test_prompts_without_a_sampler_take_the_one_given(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("cat\ndog --ss heun\n")
    assert [request.sampler for request in read_prompts(path, "k_euler_a")] == ["euler_ancestral", "heun"]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        (
            "p.toml",
            "[[prompt.subset]]\nprompt = 'a'\nsample_step = 3",
            "prompt 1: unknown key sample_step; did you mean",
        ),
        (
            "p.toml",
            "[[prompt.subset]]\nprompt = 'a'\nwidth = 1000",
            "prompt 1: width = 1000: expected a multiple of 16",
        ),
        ("p.toml", "[prompt", "p.toml: "),
        ("p.toml", "prompt = 'cat'", "holds no prompt"),
        ("p.json", '["cat", {"seed": -1}]', "prompt 2: seed = -1: expected a whole number from 0"),
        ("p.json", "[3]", "expected .* or a list in JSON"),
        ("p.json", "{", "p.json: "),
    ],
)
def test_mistakes_in_tables_are_named(tmp_path, name, text, complaint):
    with pytest.raises(SettingError, match=complaint):
        parse(tmp_path, text, name)


def test_parameters_are_what_picture_viewers_read():
    text = PromptRequest("a (cat:1.2)", "bad", 512, 768, 7, 12, 4.5, 3.0, "heun").parameters()
    assert text.splitlines() == [
        "a (cat:1.2)",
        "Negative prompt: bad",
        "Steps: 12, Sampler: heun, Schedule type: simple, CFG scale: 4.5, Seed: 7, Size: 512x768, Shift: 3",
    ]
