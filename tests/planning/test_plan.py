"""What a planned run is compared by when another resumes it."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest

from library.planning.plan import compared_by

SETTINGS = {"data": {"flip_aug": False}, "schedule": {"learning_rate": 1e-4}, "topology": {"network_dim": 4}}
MODEL = {"topology": {"depth": 28}, "model": {"vae": {"bytes": 10}}}


def picture(**changed) -> SimpleNamespace:
    return SimpleNamespace(
        **{"key": "a.png", "bucket": (64, 64), "repeats": 2, "caption": "a cat", "nl": "", "mask": None} | changed
    )


def test_settings_model_data_and_length_stand_in_their_sections():
    sections = compared_by(SETTINGS, MODEL, [picture()], 80)
    assert sections["topology"] == {"network_dim": 4, "depth": 28}
    assert sections["model"] == {"vae": {"bytes": 10}}
    assert sections["schedule"] == {"learning_rate": 1e-4, "number of steps": 80}
    assert sections["data"]["number of pictures"] == 1
    assert "number of steps" not in SETTINGS["schedule"]


@pytest.mark.parametrize(
    "changed",
    [{"key": "b.png"}, {"bucket": (64, 80)}, {"repeats": 3}, {"caption": "a dog"}],
    ids=lambda c: next(iter(c)),
)
def test_another_picture_or_caption_is_other_data(changed):
    one, other = (compared_by(SETTINGS, MODEL, [each], 80)["data"] for each in (picture(), picture(**changed)))
    assert one["pictures and captions"] != other["pictures and captions"]


def test_other_natural_language_or_another_mask_is_other_data(tmp_path):
    """A mask may lie in another folder, but is of another content where its size is another."""
    for folder, content in (("here", b"white"), ("there", b"white"), ("changed", b"black and white")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(content)

    def digest(**changed) -> str:
        return compared_by(SETTINGS, MODEL, [picture(**changed)], 80)["data"]["natural language and masks"]

    assert len({digest(), digest(nl="A cat sits."), digest(nl="A dog sits.")}) == 3
    here, there, changed = (digest(mask=tmp_path / folder / "a.png") for folder in ("here", "there", "changed"))
    assert here == there
    assert len({digest(), here, changed}) == 3


def test_captions_are_told_apart_as_earlier_states_told_them():
    expected = hashlib.sha256(b"a.png (64, 64) 2 a cat").hexdigest()[:16]
    for each in (picture(), picture(nl="A cat sits.")):
        assert compared_by(SETTINGS, MODEL, [each], 80)["data"]["pictures and captions"] == expected
