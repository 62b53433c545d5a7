"""Errors for users: each message names what is wrong and what to do; the entry points show it without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right. Its text is one clear message; programs end with exit code 1."""


class SettingError(UserError):
    """A setting, a config file or a combination of settings that cannot be used."""


class DataError(UserError):
    """A picture folder, picture or caption that cannot be used."""


class ModelFileError(UserError):
    """A model, VAE, text encoder, tokenizer or adapter file that cannot be used."""
