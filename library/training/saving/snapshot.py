"""resume_snapshot.json: what a run was made of, and how a run that resumes it differs.

Its sections hold settings and facts by name. What must be the same is in "topology"; what may change, because the run
then goes on with the new values, in "schedule"; and the optimizer says itself whether it can go on. Its choices are not
compared but repeated: see `library.training.choices`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from library.errors import SettingError
from library.model_hashes import legacy_hash

logger = logging.getLogger(__name__)

FILE_NAME = "resume_snapshot.json"
SCHEMA_VERSION = 2  # 1 had no choices
_PACKAGES = ("torch", "accelerate", "transformers", "diffusers", "safetensors")
# The optimizer's own: see `library.training.optimization.optimizer_states`.
_TOLD_ELSEWHERE = ("optimizer_type", "optimizer_args")

Sections = Mapping[str, Mapping[str, Any]]


def make_snapshot(sections: Sections, settings: Mapping[str, Any], choices: Mapping[str, Any]) -> dict[str, Any]:
    """For resume_snapshot.json. settings: all settings of the run, to be read by people. choices: as recorded."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": versions,
        "sections": {name: dict(section) for name, section in sections.items()},
        "choices": dict(choices),
        "settings": dict(settings),
    }


def file_identity(path: Path) -> dict[str, Any]:
    """What tells a model from another, whatever its name: size, and hashes of parts, of its safetensors files.

    path: its file, or the folder of its files. The legacy hash alone says nothing of a file that ends before 1 MiB.
    """
    files = [path] if path.is_file() else path.glob("*.safetensors")
    parts = sorted(_hashed(file) for file in files)
    return {
        "bytes": sum(size for size, _, _ in parts),
        "legacy_hash": "+".join(legacy for _, legacy, _ in parts),
        "first_mib": "+".join(first for _, _, first in parts),
    }


def _hashed(file: Path) -> tuple[int, str, str]:
    """(bytes, legacy hash, hash of the first MiB)"""
    with file.open("rb") as opened:
        first = hashlib.sha256(opened.read(2**20)).hexdigest()[:16]
        return file.stat().st_size, legacy_hash(opened), first


def digest_of(texts: Iterable[str]) -> str:
    """A short hash of texts in their order."""
    return hashlib.sha256("\n".join(texts).encode("utf-8", "replace")).hexdigest()[:16]


def check_snapshot(folder: Path, sections: Sections, strict: bool) -> None:
    """Compares a state's snapshot with what the resuming run is made of.

    Another topology raises SettingError. Other differences are warned of with both values; with strict they raise too,
    apart from those of the learning rate, its schedule and the planned length, which are logged.
    """
    path = folder / FILE_NAME
    try:
        snapshot = json.loads(path.read_text(encoding="utf-8"))
        then, schema = snapshot["sections"], snapshot["schema_version"]
    except FileNotFoundError:
        logger.warning("resume: %s has no %s: whether the settings are the state's is not known", folder, FILE_NAME)
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(f"resume: {path} cannot be read ({error}); give another state") from error
    if schema > SCHEMA_VERSION:
        raise SettingError(f"resume: {path} was written by a newer version of this trainer; update it")
    now = json.loads(json.dumps(sections))
    changed = {name: _changed(then.get(name, {}), now.get(name, {})) for name in {*then, *now}}
    if different := changed.pop("topology", []):
        raise SettingError(
            f"resume: the state in {folder} is of another network or model: {'; '.join(different)}. "
            "Use the state's values, or begin a new run with network_weights"
        )
    for text in changed.pop("schedule", []):
        logger.info("resume: %s; the run goes on with the new value", text)
    others = [text for name in sorted(changed) for text in changed[name]]
    if others and strict:
        raise SettingError(
            f"resume: the run differs from the state in {folder}: {'; '.join(others)}. Use the state's values, or turn "
            "anima_resume_snapshot_strict off"
        )
    for text in others:
        logger.warning("resume: %s; the run goes on with the new value, and not exactly as it would have", text)


def recorded_choices(folder: Path) -> dict[str, Any]:
    """What the run chose that saved the state, which `check_snapshot` has read; nothing where it does not say."""
    try:
        choices = json.loads((folder / FILE_NAME).read_text(encoding="utf-8")).get("choices")
    except FileNotFoundError:
        return {}
    return choices if isinstance(choices, dict) else {}


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What both versions of the program know, and is not the same."""
    common = [name for name in now if name in then and name not in _TOLD_ELSEWHERE]
    return [
        f"{name} was {_shown(then[name])}, and is {_shown(now[name])}"
        for name in common
        if _differs(then[name], now[name])
    ]


def _differs(then: Any, now: Any) -> bool:
    """Of a model's identity, in what both versions know: earlier ones knew a folder by its name."""
    if isinstance(then, dict) and isinstance(now, dict):
        return any(then[part] != now[part] for part in then.keys() & now.keys())
    return then != now


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)
