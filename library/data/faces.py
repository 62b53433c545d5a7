"""face_crop_aug_range: crops around the face whose place a picture's name tells, as Kohya's scripts make them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from library.data.pictures import Picture
from library.data.sources import listed

logger = logging.getLogger(__name__)

_NAMED = re.compile(r".*_(\d+)_(\d+)_(\d+)_(\d+)")
# How far from the face a crop is centred, without random_crop: a share of the face's longer side.
_SHIFT = 1 / 20


@dataclass(frozen=True)
class Face:
    """A face's centre and size, in pixels of the upright picture."""

    centre: tuple[int, int]
    size: tuple[int, int]


def face_of(picture: Picture) -> Face | None:
    """The face that the file's name ends in, as in cat_<x>_<y>_<width>_<height>.png.

    None without such an ending, and where the picture has no such place: then the numbers are something else.
    """
    found = _NAMED.fullmatch(picture.path.stem)
    if found is None:
        return None
    x, y, width, height = map(int, found.groups())
    is_inside = x < picture.size[0] and y < picture.size[1]
    fits = 0 < width <= picture.size[0] and 0 < height <= picture.size[1]
    return Face((x, y), (width, height)) if is_inside and fits else None


def draw_crop(face: Face, picture: Picture, random: Random) -> tuple[tuple[float, float], float]:
    """(centring, zoom), as `library.data.pixels.fit` takes them, of one crop around the face.

    The crop's short side is face_crop_aug_range times the face's long one; of the range, only what neither leaves the
    picture nor enlarges it more than training it whole would. The face is whole in it, where it is not larger.
    """
    least, most = picture.subset.face_crop_aug_range
    longest, short = max(face.size), min(picture.bucket)
    # Pixels of the bucket for one of the picture.
    whole = max(own / side for own, side in zip(picture.bucket, picture.size, strict=True))
    low, high = (min(max(short / (longest * times), whole), max(whole, 1.0)) for times in (most, least))
    scale = random.uniform(low, high)
    centring = tuple(_centring(face, axis, picture.bucket[axis] / scale, picture, random) for axis in (0, 1))
    return centring, whole / scale


def _centring(face: Face, axis: int, length: float, picture: Picture, random: Random) -> float:
    """Where a crop of so many pixels of the picture begins on an axis, as a share of where it may."""
    centre, half, side = face.centre[axis], face.size[axis] / 2, picture.size[axis]
    # The first and last places from which the face is whole in the crop, or has its centre there if it is too large.
    first, last = centre + half - length, centre - half
    if first > last:
        first = last = centre - length / 2
    elif not picture.subset.random_crop:
        shift = min(max(face.size) * _SHIFT, (last - first) / 2)
        first, last = centre - length / 2 - shift, centre - length / 2 + shift
    room = side - length
    start = min(max(random.uniform(first, last), 0.0), room)
    return start / room if room > 0 else 0.5


def warn_of_missing_faces(pictures: Iterable[Picture]) -> None:
    """Says, once for a run, how many pictures face_crop_aug_range finds no face in."""
    asked = {picture.path: picture for picture in pictures if picture.subset.face_crop_aug_range is not None}
    without = [str(path) for path, picture in asked.items() if face_of(picture) is None]
    if without:
        logger.warning(
            "face_crop_aug_range: %d of %d pictures do not end their names in a face within them "
            "(_<x>_<y>_<width>_<height>) and are cropped as without it:\n%s", len(without), len(asked), listed(without),
        )  # fmt: skip
