"""Saves sent to a Hugging Face repository, and states fetched from one. What fails there never ends a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Lock, Thread
from typing import Any

import huggingface_hub

from library.errors import SettingError
from library.options import Secret, option

logger = logging.getLogger(__name__)

_TRIES = 5
_FIRST_PAUSE = 2.0  # seconds; each later pause is twice as long, 30 s in all


@dataclass(frozen=True)
class HubSettings:
    """Copies of what a run saves, in a repository on Hugging Face."""

    huggingface_repo_id: str | None = option(
        None, "Repository that every saved adapter is uploaded to: owner/name. It is made where there is none."
    )
    huggingface_repo_type: str = option("model", "Kind of the repository.", choices=("model", "dataset"))
    huggingface_path_in_repo: str | None = option(None, "Folder in the repository. Unset: its root.")
    huggingface_token: Secret | None = option(
        None, "Access token with write permission. Unset: that of `hf auth login`, or the variable HF_TOKEN."
    )
    huggingface_repo_visibility: str = option(
        "private", "Who sees a repository that is made: nobody else, or everybody.", choices=("private", "public")
    )
    save_state_to_huggingface: bool = option(False, "Upload states too.")
    resume_from_huggingface: bool = option(
        False,
        "resume names a state on Hugging Face: owner/name/path/of/the-state, with :revision behind it if need be.",
    )
    async_upload: bool = option(
        False,
        "Let the next save begin before the upload of the last one is done. Off, training waits only where three saves "
        "have piled up behind an upload.",
    )


class Uploader:
    """Uploads saves, one after the other; tries again where that fails, then gives that save up with a warning."""

    def __init__(
        self, settings: HubSettings, api: Any | None = None, pause: Callable[[float], None] = time.sleep
    ) -> None:
        """api: with the methods of HfApi. pause: waits so many seconds."""
        self._settings = settings
        self._token = None if settings.huggingface_token is None else settings.huggingface_token.reveal()
        self._api = huggingface_hub.HfApi(token=self._token) if api is None else api
        self._pause = pause
        self._one_at_a_time = Lock()
        self._threads: list[Thread] = []
        self._repository_made = False

    def add(self, paths: Sequence[Path]) -> None:
        """Uploads the files and state folders of a save: at once, or with async_upload in a thread."""
        wanted = [path for path in paths if self._settings.save_state_to_huggingface or not path.is_dir()]
        if not self._settings.async_upload:
            self._upload_all(wanted)
            return
        thread = Thread(target=self._upload_all, args=(wanted,), name="upload", daemon=True)
        self._threads.append(thread)
        thread.start()

    def finish(self) -> None:
        """Waits for what is still being uploaded."""
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _upload_all(self, paths: Sequence[Path]) -> None:
        with self._one_at_a_time:
            for path in paths:
                self._upload_with_retries(path)

    def _upload_with_retries(self, path: Path) -> None:
        repository = self._settings.huggingface_repo_id
        for attempt in range(1, _TRIES + 1):
            if not path.exists():
                logger.warning("%s was removed before it could be uploaded", path.name)
                return
            try:
                self._upload(path)
            except Exception as error:  # the network, the service, the token: none is worth a run
                problem = str(error).strip().splitlines()
                logger.warning(
                    "uploading %s to %s failed (%d of %d tries): %s: %s",
                    path.name, repository, attempt, _TRIES, type(error).__name__, problem[0] if problem else "",
                )  # fmt: skip
                if attempt < _TRIES:
                    self._pause(_FIRST_PAUSE * 2 ** (attempt - 1))
            else:
                logger.info("uploaded %s to %s", path.name, repository)
                return
        logger.warning("%s was not uploaded; it lies in %s", path.name, path.parent)

    def _upload(self, path: Path) -> None:
        settings = self._settings
        place = {"repo_id": settings.huggingface_repo_id, "repo_type": settings.huggingface_repo_type}
        if not self._repository_made:
            private = settings.huggingface_repo_visibility == "private"
            self._api.create_repo(**place, private=private, exist_ok=True)
            self._repository_made = True
        target = str(PurePosixPath(settings.huggingface_path_in_repo or "") / path.name)
        if path.is_dir():
            self._api.upload_folder(**place, folder_path=path, path_in_repo=target)
        else:
            self._api.upload_file(**place, path_or_fileobj=path, path_in_repo=target)


def download_state(resume: Path, settings: HubSettings, api: Any | None = None) -> Path:
    """Fetches the state that `resume` names, owner/name/path[:revision], into Hugging Face's cache.

    Raises SettingError where it is not of that form, or cannot be fetched.
    """
    address, _, revision = resume.as_posix().partition(":")
    parts = address.split("/")
    if len(parts) < 3:
        raise SettingError(
            f"resume: {resume} is not of the form owner/name/path/of/the-state, as resume_from_huggingface expects"
        )
    token = None if settings.huggingface_token is None else settings.huggingface_token.reveal()
    hub = huggingface_hub.HfApi(token=token) if api is None else api
    repository, folder = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        local = hub.snapshot_download(
            repository, repo_type=settings.huggingface_repo_type, revision=revision or None,
            allow_patterns=[f"{folder}/*"],
        )  # fmt: skip
    except Exception as error:  # of the network, the service or the token
        raise SettingError(f"resume: {resume} cannot be fetched from Hugging Face: {error}") from error
    found = Path(local) / folder
    if not (found / "run_state.json").is_file():
        raise SettingError(f"resume: {repository} has no state {folder}: there is no run_state.json in it")
    return found
