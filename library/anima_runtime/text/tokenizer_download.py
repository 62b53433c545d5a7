"""Fetching a tokenizer's files from Hugging Face or ModelScope: complete, checked, and once for all processes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlencode

import requests
import sentencepiece
from filelock import FileLock
from huggingface_hub import constants, get_token

from library.anima_runtime.text.tokenizer_plans import TokenizerFiles, TokenizerPlan
from library.anima_runtime.text.tokenizer_sources import (
    HUGGING_FACE,
    HubFolder,
    hugging_face_endpoint,
    modelscope_endpoint,
)
from library.errors import ModelFileError
from library.files import write_atomically

logger = logging.getLogger(__name__)

# The largest file is 11 MB: whoever needs longer for one has no usable connection.
_SECONDS_PER_FILE = 300
_CHUNK_BYTES = 4096


@dataclass(frozen=True)
class Proof:
    """What downloaded files must stand.

    check: raises ModelFileError where a folder's files are not the tokenizer asked for.
    complete: makes needed files that a hub lacks from those it has, as far as that is possible.
    """

    check: Callable[[Path], object]
    complete: Callable[[Path], None]


class _DownloadError(Exception):
    """Why a place could not be read."""


def download_missing(plan: TokenizerPlan, proof: Proof) -> None:
    """Fills the plan's folder with the files it lacks, of the first source that has them all; what lies there is kept.

    One process downloads while others that ask for the same folder wait for it. Each file appears complete or not at
    all. Raises ModelFileError with the reason of every source, or when the folder cannot be written.
    """
    files, folder = plan.files, plan.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock"):
            if files.missing_in(folder):
                _fill(plan, proof)
    except OSError as error:
        raise ModelFileError(f"{folder}: cannot be filled with the {files.what}: {error}") from error


def _fill(plan: TokenizerPlan, proof: Proof) -> None:
    files, folder = plan.files, plan.folder
    with tempfile.TemporaryDirectory() as scratch:
        fetched = _fetch_first(plan, proof, Path(scratch))
        kept = [name for name in (*files.needed, *files.optional) if (folder / name).is_file()]
        if kept:
            _check_together(plan, proof, fetched, kept)
        # What is needed comes last: who sees it all in place may read the folder without the lock.
        for file in sorted(fetched.iterdir(), key=lambda file: (file.name in files.needed, file.name)):
            if file.name not in kept:
                write_atomically(folder / file.name, partial(shutil.copyfile, file))
    logger.info("the %s is now in %s", files.what, folder)


def _check_together(plan: TokenizerPlan, proof: Proof, fetched: Path, kept: Sequence[str]) -> None:
    """Puts the kept files over the fetched ones; ModelFileError where they make no tokenizer together."""
    for name in kept:
        shutil.copyfile(plan.folder / name, fetched / name)
    try:
        proof.check(fetched)
    except ModelFileError as error:
        raise ModelFileError(
            f"{plan.folder}: its {', '.join(kept)} do not go with the {plan.files.what}, so that nothing was added; "
            f"give another folder or remove them. {str(error).removeprefix(f'{fetched}: ')}"
        ) from error


def _fetch_first(plan: TokenizerPlan, proof: Proof, scratch: Path) -> Path:
    """The scratch folder with the files of the first place that has them, or else with what could be completed."""
    files, reasons = plan.files, list[str]()
    incomplete: list[tuple[HubFolder, Path]] = []
    for source in plan.sources:
        for place in source.places():
            logger.info("downloading the %s from %s", files.what, place)
            attempt = scratch / str(len(reasons))
            try:
                missing = _fetch(place, files, attempt)
                if not missing:
                    proof.check(attempt)
                    return attempt
            except (_DownloadError, ModelFileError) as error:
                reasons.append(f"{place}: {str(error).removeprefix(f'{attempt}: ')}")
                logger.warning("%s", reasons[-1])
                break  # the root of the same repository would fail alike
            reasons.append(f"{place} has no {', '.join(missing)}")
            logger.info("%s", reasons[-1])
            incomplete.append((place, attempt))
    for place, attempt in incomplete:
        if _complete(files, proof, attempt, place):
            return attempt
    missing = ", ".join(files.missing_in(plan.folder))
    raise ModelFileError(
        f"{plan.folder}: the {files.what} lacks {missing}, and could not be downloaded:\n  "
        + "\n  ".join(reasons)
        + "\nPut the files there by hand, or try again; HF_ENDPOINT names a mirror of Hugging Face."
    )


def _complete(files: TokenizerFiles, proof: Proof, folder: Path, place: HubFolder) -> bool:
    """Makes what a place lacks from what it has; False where that is not enough."""
    missing = files.missing_in(folder)
    try:
        proof.complete(folder)
        proof.check(folder)
    except ModelFileError:
        return False
    logger.warning("made %s of the %s from what %s has", " and ".join(missing), files.what, place)
    return True


def _fetch(place: HubFolder, files: TokenizerFiles, folder: Path) -> list[str]:
    """Downloads the files into a new folder; returns those needed that the place has not. _DownloadError: it failed."""
    folder.mkdir()
    for name in (*files.needed, *files.optional):
        path = folder / name
        if _fetch_file(place, name, path):
            _check_content(path)
    return files.missing_in(folder)


def _fetch_file(place: HubFolder, name: str, path: Path) -> bool:
    """Downloads one file; False when the place does not have it."""
    url, token = _address(place, name)
    headers = {"Accept-Encoding": "identity"}  # so that Content-Length counts what arrives
    if token:
        headers["Authorization"] = f"Bearer {token}"
    end = time.monotonic() + _SECONDS_PER_FILE
    try:
        with requests.get(url, headers=headers, stream=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            if response.status_code == 404:
                return False
            if response.status_code in (401, 403):
                raise _DownloadError(_denied(place, name, response.status_code))
            response.raise_for_status()
            with path.open("wb") as file:
                for chunk in response.iter_content(_CHUNK_BYTES):
                    file.write(chunk)
                    if time.monotonic() > end:
                        raise _DownloadError(f"{name} did not arrive within {_SECONDS_PER_FILE} s")
            expected = response.headers.get("Content-Length")
            if expected is not None and int(expected) != path.stat().st_size:
                raise _DownloadError(f"{name}: {path.stat().st_size} of {expected} bytes arrived")
    except (requests.RequestException, ValueError) as error:  # ValueError: a Content-Length that is no number
        raise _DownloadError(f"{name}: {error}") from error
    return True


def _address(place: HubFolder, name: str) -> tuple[str, str | None]:
    """The URL of a file, and the token for its hub."""
    path = f"{place.subfolder}/{name}" if place.subfolder else name
    if place.hub == HUGGING_FACE:
        revision = quote(place.revision, safe="")
        return f"{hugging_face_endpoint()}/{place.repo_id}/resolve/{revision}/{quote(path)}", get_token()
    query = urlencode({"Revision": place.revision, "FilePath": path})
    url = f"{modelscope_endpoint()}/api/v1/models/{place.repo_id}/repo?{query}"
    return url, os.environ.get("MODELSCOPE_API_TOKEN")


def _denied(place: HubFolder, name: str, status: int) -> str:
    variable = "HF_TOKEN" if place.hub == HUGGING_FACE else "MODELSCOPE_API_TOKEN"
    return (
        f"{name}: access denied ({status}). The repository is gated, private or not there; "
        f"with access to it, set {variable} to your token"
    )


def _check_content(path: Path) -> None:
    """_DownloadError for a page or a pointer in place of the file."""
    try:
        if path.suffix == ".json" and not isinstance(json.loads(path.read_bytes()), dict):
            raise ValueError("it holds no {…}")
        if path.suffix == ".model":
            sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (ValueError, RuntimeError, OSError) as error:
        kind = "JSON" if path.suffix == ".json" else "a sentencepiece model"
        start = path.read_bytes()[:40].decode("utf-8", "replace")
        raise _DownloadError(f"{path.name} is not {kind}, it begins with {start!r}") from error
