"""Caption files, and what each use of a picture makes of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.captions import final_caption, read_caption_lines
from library.data.settings import SubsetSettings
from library.errors import DataError

TAGS = "one, two, three, four, five, six"


def uses(caption, subset, count=400, seed=1):
    return [final_caption(caption, subset, seed, epoch=0, key="0/0/a.png", repeat=repeat) for repeat in range(count)]


def test_lines_are_stripped_and_the_byte_order_mark_goes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff 1girl, käse \r\n\r\nsecond\n".encode())
    assert read_caption_lines(path) == ["1girl, käse", "second"]


def test_empty_file_has_no_lines(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    assert read_caption_lines(tmp_path / "a.txt") == []


def test_other_encodings_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("käse".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 \(byte 1\)"):
        read_caption_lines(tmp_path / "a.txt")


def test_plain_caption_is_left_as_it_is():
    text = "A cat,sitting ;  on a mat."
    assert uses(text, SubsetSettings(keep_tokens=2), 3) == [text] * 3


def test_prefix_and_suffix():
    subset = SubsetSettings(caption_prefix="photo of", caption_suffix="outside", shuffle_caption=True)
    assert all(text.startswith("photo of ") and text.endswith(" outside") for text in uses(TAGS, subset, 20))
    assert uses("", subset, 1) == ["photo of outside"]


@settings(max_examples=40, deadline=None)
@given(
    tags=st.lists(st.text("abc d", min_size=1).map(str.strip).filter(bool), max_size=8),
    keep=st.integers(0, 9),
    rate=st.sampled_from([0.0, 0.5, 1.0]),
    repeat=st.integers(0, 1000),
)
def test_kept_tags_stay_and_the_others_are_only_moved_or_dropped(tags, keep, rate, repeat):
    subset = SubsetSettings(shuffle_caption=True, keep_tokens=keep, caption_tag_dropout_rate=rate)
    result = final_caption(", ".join(tags), subset, 5, epoch=1, key="k", repeat=repeat)
    left = result.split(", ") if result else []
    assert left[:keep] == tags[:keep]
    if rate == 0:
        assert sorted(left) == sorted(tags)
    elif rate == 1:
        assert left == tags[:keep]
    else:
        assert all(left.count(tag) <= tags.count(tag) for tag in left)


def test_keep_tokens_separator_keeps_both_ends():
    subset = SubsetSettings(shuffle_caption=True, keep_tokens_separator="|||", caption_tag_dropout_rate=0.5)
    results = uses("sks, cat ||| one, two, three, four ||| best", subset)
    assert all(text.startswith("sks, cat") and text.endswith(", best") and "|" not in text for text in results)
    assert len(set(results)) > 40  # of 65 orders of subsets


def test_the_mark_never_reaches_the_model_even_without_shuffling():
    assert uses("a |||b", SubsetSettings(keep_tokens_separator="|||"), 1) == ["a, b"]


def test_keep_tokens_counts_where_the_mark_is_absent():
    subset = SubsetSettings(shuffle_caption=True, keep_tokens_separator="|||", keep_tokens=2)
    assert all(text.startswith("one, two, ") for text in uses(TAGS, subset))


def test_other_separator():
    subset = SubsetSettings(caption_separator=";", caption_tag_dropout_rate=1e-9)
    assert uses("a, b;c ; d", subset, 1) == ["a, b; c; d"]
    assert uses("a b c", SubsetSettings(caption_separator=" ", caption_tag_dropout_rate=1e-9), 1) == ["a b c"]


def test_dropout_rates():
    dropped = uses(TAGS, SubsetSettings(caption_dropout_rate=0.25, caption_prefix="kept"), 2000).count("")
    assert 420 <= dropped <= 580  # 500 expected, 4 standard deviations are 77
    left = [len(text.split(", ")) for text in uses(TAGS, SubsetSettings(caption_tag_dropout_rate=0.25), 2000)]
    assert 4.4 <= sum(left) / len(left) <= 4.6  # 6 * 0.75
    assert set(uses(TAGS, SubsetSettings(caption_dropout_rate=1.0), 50)) == {""}


def test_every_order_appears():
    assert len(set(uses("a, b, c", SubsetSettings(shuffle_caption=True)))) == 6


def test_choices_follow_from_seed_epoch_picture_and_repeat():
    subset = SubsetSettings(shuffle_caption=True)
    long = ", ".join(map(str, range(20)))

    def caption(seed=1, epoch=0, key="a", repeat=0):
        return final_caption(long, subset, seed, epoch, key, repeat)

    assert caption() == caption()
    assert len({caption(), caption(seed=2), caption(epoch=1), caption(key="b"), caption(repeat=1)}) == 5
