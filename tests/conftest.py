"""Fixtures that tests of several parts share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.make_tiny_anima import make_tiny_anima


@pytest.fixture(scope="session")
def tiny_anima(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Anima and four training pictures; read it, do not write into it."""
    folder = tmp_path_factory.mktemp("tiny_anima")
    make_tiny_anima(folder)
    return folder
