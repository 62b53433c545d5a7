"""What each use of a picture makes of its caption."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import factorial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.captions import Use, final_caption
from library.data.settings import SubsetSettings

TAGS = "one, two, three, four, five, six"
NL = "A cat sits. It is red! Is it old?"
SENTENCES = ["A cat sits.", "It is red!", "Is it old?"]
USE = Use(seed=1, epoch=0, picture="0/0/a.png", repeat=0)


def uses(caption, subset, count=400, nl="", use=USE):
    return [final_caption(caption, nl, subset, replace(use, repeat=repeat)) for repeat in range(count)]


def test_plain_caption_is_left_as_it_is():
    text = "A cat,sitting ;  on a {mat}."
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
    step=st.integers(0, 30),
)
def test_kept_tags_stay_and_the_others_are_only_moved_or_dropped(tags, keep, rate, repeat, step):
    subset = SubsetSettings(
        shuffle_caption=True, keep_tokens=keep, caption_tag_dropout_rate=rate, token_warmup_step=20, token_warmup_min=2
    )
    use = replace(USE, repeat=repeat, step=step, total_steps=40)
    result = final_caption(", ".join(tags), "", subset, use)
    left = result.split(", ") if result else []
    assert left[:keep] == tags[:keep]
    if rate == 0 and step >= 20:
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


def test_tags_joined_by_the_secondary_separator_are_moved_and_dropped_as_one():
    subset = SubsetSettings(shuffle_caption=True, secondary_separator=";;;", keep_tokens=1)
    results = uses("sks;;;cat, red hat ;;;long hat, sky", subset)
    assert set(results) == {"sks, cat, red hat, long hat, sky", "sks, cat, sky, red hat, long hat"}
    results = uses("sks;;;cat, red hat;;;long hat", replace(subset, caption_tag_dropout_rate=0.5))
    assert set(results) == {"sks, cat, red hat, long hat", "sks, cat"}
    assert uses("a;;;b,c", SubsetSettings(secondary_separator=";;;"), 1) == ["a, b,c"]


def test_dropout_rates():
    dropped = uses(TAGS, SubsetSettings(caption_dropout_rate=0.25, caption_prefix="kept"), 2000).count("")
    assert 420 <= dropped <= 580  # 500 expected, 4 standard deviations are 77
    left = [len(text.split(", ")) for text in uses(TAGS, SubsetSettings(caption_tag_dropout_rate=0.25), 2000)]
    assert 4.4 <= sum(left) / len(left) <= 4.6  # 6 * 0.75
    everything = SubsetSettings(
        caption_dropout_rate=1.0, caption_mix="tags+nl=1", caption_prefix="a", caption_suffix="b"
    )
    assert set(uses(TAGS, everything, 50, NL)) == {""}


def test_every_nth_epoch_has_empty_captions():
    subset = SubsetSettings(caption_dropout_every_n_epochs=3, caption_prefix="a")
    empty = [final_caption(TAGS, "", subset, replace(USE, epoch=epoch)) == "" for epoch in range(7)]
    assert empty == [False, False, True, False, False, True, False]


def test_every_order_is_equally_likely():
    counts = Counter(uses("a, b, c", SubsetSettings(shuffle_caption=True), 6000))
    assert len(counts) == factorial(3)
    assert all(880 <= count <= 1120 for count in counts.values())  # 1000 expected, 4 standard deviations are 115


@pytest.mark.parametrize(
    ("step", "kept_and_free"),
    # 2 + floor(step * (5 - 2) / 30) of the five free tags
    [(0, 3), (9, 3), (10, 4), (19, 4), (20, 5), (29, 5), (30, 6), (1000, 6)],
)
def test_tags_warm_up(step, kept_and_free):
    subset = SubsetSettings(keep_tokens=1, token_warmup_min=2, token_warmup_step=30)
    caption = final_caption(TAGS, "", subset, replace(USE, step=step, total_steps=100))
    assert caption == ", ".join(TAGS.split(", ")[:kept_and_free])
    of_the_run = replace(subset, token_warmup_step=0.3)
    assert final_caption(TAGS, "", of_the_run, replace(USE, step=step, total_steps=100)) == caption


def test_without_a_length_of_the_run_all_tags_are_used():
    assert uses(TAGS, SubsetSettings(token_warmup_step=30), 1) == [TAGS]
    short = replace(USE, total_steps=3)
    assert uses("a", SubsetSettings(token_warmup_step=30, token_warmup_min=4), 1, use=short) == ["a"]
    assert uses("a, b", SubsetSettings(token_warmup_step=0.1), 1, use=short) == ["a, b"]  # 0.3 steps are none


def test_wildcards_are_drawn_in_the_caption_and_around_it():
    subset = SubsetSettings(
        enable_wildcard=True, caption_prefix="{photo|film} of", caption_suffix="{indoors|outside}", shuffle_caption=True
    )
    counts = Counter(uses("a {red, big|blue} cat", subset, 1200))
    middles = ("a red, big cat", "big cat, a red", "a blue cat")
    expected = [f"{a} of {b} {c}" for a in ("photo", "film") for b in middles for c in ("indoors", "outside")]
    assert sorted(counts) == sorted(expected)
    for caption, count in counts.items():  # 1200 / 8, and half of that for each order; 4 standard deviations
        assert abs(count - (150 if "blue" in caption else 75)) <= (46 if "blue" in caption else 34)


def test_a_line_is_drawn_where_there_are_several():
    counts = Counter(uses("one, two\n{three|four}", SubsetSettings(enable_wildcard=True), 2000))
    assert set(counts) == {"one, two", "three", "four"}
    assert 910 <= counts["one, two"] <= 1090 and 420 <= counts["three"] <= 580


def test_the_mix_is_drawn_by_its_weights():
    subset = SubsetSettings(caption_mix="tags=4, nl=3, tags+nl=2, nl+tags=1")
    counts = Counter(uses("1girl, solo", subset, 4000, "A girl, alone."))
    expected = {
        "1girl, solo": 1600,
        "A girl, alone.": 1200,
        "1girl, solo, A girl, alone.": 800,
        "A girl, alone. 1girl, solo": 400,
    }
    assert set(counts) == set(expected)
    assert all(abs(counts[text] - count) <= 4 * (count * (1 - count / 4000)) ** 0.5 for text, count in expected.items())


def test_the_form_does_not_follow_from_the_dropout():
    subset = SubsetSettings(caption_mix="tags=1, nl=1", caption_dropout_rate=0.5)
    counts = Counter(uses("a", subset, 2000, "b"))
    assert all(420 <= counts[text] <= 580 for text in "ab")  # 500 expected, 4 standard deviations are 77


def test_a_field_that_is_missing_gives_way_to_the_other():
    subset = SubsetSettings(caption_mix="tags=1, nl=1, tags+nl=1, nl+tags=1")
    assert set(uses(TAGS, subset, 100)) == {TAGS}
    assert set(uses("", subset, 100, NL)) == {NL}
    assert set(uses("", subset, 100)) == {""}
    assert set(uses(TAGS, SubsetSettings(), 100, NL)) == {TAGS}  # without a mix there is one field


def test_the_two_fields_are_shuffled_and_dropped_separately():
    subset = SubsetSettings(caption_mix="nl+tags=1", shuffle_caption=True, caption_tag_dropout_rate=0.5)
    results = uses(TAGS, subset, nl=NL)
    assert all(text.startswith(NL) for text in results) and len(set(results)) > 200  # of 1957
    subset = SubsetSettings(caption_mix="tags+nl=1", shuffle_sentences=True)
    results = Counter(uses(TAGS, subset, 3000, NL))
    assert len(results) == factorial(3) and all(text.startswith(f"{TAGS}, ") for text in results)
    assert all(sorted(map(text.find, SENTENCES))[0] == len(TAGS) + 2 for text in results)
    assert all(410 <= count <= 590 for count in results.values())  # 500 expected, 4 standard deviations are 82
    left = [
        sum(part in text for part in SENTENCES)
        for text in uses("", replace(subset, sentence_dropout_rate=0.25), 2000, NL)
    ]
    assert 2.18 <= sum(left) / len(left) <= 2.32  # 3 * 0.75, 4 standard deviations are 0.07


def test_sentences_are_joined_as_their_script_does():
    subset = SubsetSettings(caption_mix="nl=1", shuffle_sentences=True)
    assert set(uses("", subset, 60, "猫。黒い！")) == {"猫。黒い！", "黒い！猫。"}
    assert set(uses("", subset, 60, "It is 3.5 m tall. Red")) == {"It is 3.5 m tall. Red.", "Red. It is 3.5 m tall."}


@settings(max_examples=40, deadline=None)
@given(
    tags=st.lists(st.sampled_from("abcdef"), min_size=1, unique=True),
    sentences=st.lists(st.sampled_from(["One.", "Two!", "Three?"]), min_size=1, unique=True),
    seed=st.integers(0, 2**32 - 1),
)
def test_nothing_is_lost_by_shuffling_both_fields(tags, sentences, seed):
    subset = SubsetSettings(caption_mix="nl+tags=1", shuffle_caption=True, shuffle_sentences=True)
    caption = final_caption(", ".join(tags), " ".join(sentences), subset, replace(USE, seed=seed))
    words = caption.split(" ")
    assert sorted(words[: len(sentences)]) == sorted(sentences)
    assert sorted(word.strip(",") for word in words[len(sentences) :]) == sorted(tags)
    assert caption == final_caption(", ".join(tags), " ".join(sentences), subset, replace(USE, seed=seed))


EVERYTHING = SubsetSettings(
    shuffle_caption=True, enable_wildcard=True, caption_mix="tags=1, nl=1, tags+nl=1, nl+tags=1", shuffle_sentences=True
)


def test_choices_follow_from_seed_epoch_picture_and_repeat():
    long = ", ".join(f"{{a{number}|b{number}|c{number}}}" for number in range(20))

    def caption(**other):
        return final_caption(long, long, EVERYTHING, replace(USE, **other))

    assert caption() == caption() == caption(step=5, total_steps=10)
    others = [caption(seed=2), caption(epoch=1), caption(picture="b"), caption(repeat=1)]
    assert len({caption(), *others}) == 5


def test_a_choice_does_not_move_the_others():
    """So that switching one thing on leaves the rest of the captions as they were."""
    plain = uses(TAGS, SubsetSettings(shuffle_caption=True), 50)
    prefixed = SubsetSettings(
        shuffle_caption=True, enable_wildcard=True, caption_prefix="{a|b}", caption_dropout_rate=0.3
    )
    for text, other in zip(plain, uses(TAGS, prefixed, 50), strict=True):
        assert other in ("", f"a {text}", f"b {text}")
