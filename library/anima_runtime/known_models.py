"""What models' files are known to hold, remembered so that a run which needs no more than that leaves them unread."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from library.files import write_atomically

logger = logging.getLogger(__name__)

# To be raised when an identity is made of something else, or told from other stamps.
_VERSION = 2
# A file system may stamp two changes of one moment alike, so times as young as this prove nothing yet.
_TOO_YOUNG_NS = 2 * 10**9


@dataclass(frozen=True)
class FileStamps:
    """Files as they are: each one's name, size and the times of its last changes, of its content and at all, in ns.

    Without their folders: what is remembered lies beside pictures, which may be handed on.
    """

    entries: list[list[str | int]]

    @staticmethod
    def of(files: Sequence[Path]) -> FileStamps:
        """Raises OSError where a file is not there."""
        entries = []
        for path in sorted({file.resolve() for file in files}):
            status = path.stat()
            entries.append([path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
        return FileStamps(entries)

    def are_settled(self) -> bool:
        """Whether a later change would show."""
        return all(time.time_ns() - max(entry[2:]) > _TOO_YOUNG_NS for entry in self.entries)


class KnownModels:
    """Identities (`library.tensor_cache.identity_of`) of models that were loaded from files, by these files' stamps.

    file: where they are remembered; None for nowhere. writes: False for all but one of the processes of a run.
    """

    def __init__(self, file: Path | None, writes: bool = True) -> None:
        self._file = file
        self._writes = writes

    def identity(self, model: str, stamps: FileStamps) -> str | None:
        """That of a model that was loaded from just these files; None where none is known.

        model: which, and in what form, as text.
        """
        entry = self._read().get(model)
        known = isinstance(entry, dict) and entry.get("files") == stamps.entries
        identity = entry.get("identity") if known else None
        return identity if isinstance(identity, str) else None

    def remember(self, model: str, stamps: FileStamps, identity: str) -> None:
        """Adds one, in place of what was known of this model; stamps: taken before it was loaded."""
        if self._file is None or not self._writes or not stamps.are_settled():
            return
        models = {**self._read(), model: {"files": stamps.entries, "identity": identity}}
        text = json.dumps({"version": _VERSION, "models": models}, indent=1)
        try:
            write_atomically(self._file, lambda file: file.write_text(text, encoding="utf-8"))
        except OSError as error:
            logger.info("%s cannot be written, so each start reads all models: %s", self._file, error.strerror)

    def _read(self) -> dict[str, object]:
        """Empty where there is no such file, or none of this form."""
        try:
            content = json.loads(self._file.read_text(encoding="utf-8")) if self._file is not None else None
        except (OSError, ValueError):
            return {}
        models = content.get("models") if isinstance(content, dict) and content.get("version") == _VERSION else None
        return models if isinstance(models, dict) else {}
