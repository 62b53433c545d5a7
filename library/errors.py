"""Errors for users, and the wording their messages share.

Each message names what is wrong and what to do; the entry points show it without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Something the user can put right. Its text is one clear message; programs end with exit code 1."""


class SettingError(UserError):
    """A setting, a config file or a combination of settings that cannot be used."""


class DataError(UserError):
    """A picture folder, picture or caption that cannot be used."""


class ModelFileError(UserError):
    """A model, VAE, text encoder, tokenizer or adapter file that cannot be used."""


class Problems:
    """Gathers user errors, so that one report tells them all instead of one a run."""

    def __init__(self, found: Iterable[str] = ()) -> None:
        self.found = list(found)

    def attempt(self, function: Callable[..., T], *arguments: object) -> T | None:
        """What the function returns, or None where it raises a UserError, which is kept."""
        try:
            return function(*arguments)
        except UserError as error:
            self.found.append(str(error))
            return None

    def raise_found(self) -> None:
        """Raises one UserError of everything found, if there is anything."""
        if self.found:
            raise UserError("\n".join(self.found))


def counted(number: int, one: str, several: str) -> str:
    """ "1 picture has", "2 pictures have"."""
    return f"{number} {one if number == 1 else several}"


def first_ten(names: Iterable[str], separator: str = ", ") -> str:
    """The first ten names for a message, and how many more there are."""
    listed = list(names)
    more = [f"and {len(listed) - 10} more"] if len(listed) > 10 else []
    return separator.join([*listed[:10], *more])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean a or b?" for the nearest known words, else for those that contain the word; "" for none."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.6)
    if not near and len(word) > 3:
        near = [name for name in by_lower if word.lower() in name][:3]
    return f"; did you mean {' or '.join(by_lower[name] for name in near)}?" if near else ""
