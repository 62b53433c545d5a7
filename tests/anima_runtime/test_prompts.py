from __future__ import annotations

import logging

import pytest

from library.anima_runtime.prompts import PromptRequest, parse_prompt_lines
from library.errors import SettingError


def parse(tmp_path, text, name="prompts.txt"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return parse_prompt_lines(path)


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
    assert [request.prompt for request in parse_prompt_lines(path)] == ["猫", "dog"]


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
        ("--ss euler", "unknown flag --ss; known: --w, --h,"),
    ],
)
def test_bad_flags_are_named_with_their_line(tmp_path, flags, complaint):
    with pytest.raises(SettingError) as caught:
        parse(tmp_path, f"cat\n\ndog {flags} --n bad\n")
    assert str(caught.value).startswith(f"{tmp_path / 'prompts.txt'}, line 3: {complaint}")


def test_guidance_is_told_once_to_have_no_effect(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        requests = parse(tmp_path, "cat --g 3.5 --d 1\ndog --g 2\nbird\n")
    assert requests == [PromptRequest("cat", seed=1), PromptRequest("dog"), PromptRequest("bird")]
    assert len(caplog.records) == 1
    assert "--g" in caplog.text


def test_files_that_hold_no_prompts_are_refused(tmp_path):
    with pytest.raises(SettingError, match="holds no prompt"):
        parse(tmp_path, "# only\n\n")
    with pytest.raises(SettingError, match="plain text file"):
        parse(tmp_path, '[{"prompt": "cat"}]', "prompts.json")
    with pytest.raises(SettingError, match=r"sample_prompts = .*nothing\.txt"):
        parse_prompt_lines(tmp_path / "nothing.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SettingError, match="UTF-8"):
        parse_prompt_lines(tmp_path / "latin.txt")
