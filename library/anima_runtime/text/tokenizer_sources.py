"""Where missing tokenizers come from: the options, and how a place on Hugging Face or ModelScope is written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from huggingface_hub import constants

from library.options import option

HUGGING_FACE, MODELSCOPE = "Hugging Face", "ModelScope"
_BRANCHES = {HUGGING_FACE: "main", MODELSCOPE: "master"}
_HOSTS = {
    HUGGING_FACE: ("huggingface.co", "www.huggingface.co", "hf.co"),
    MODELSCOPE: ("modelscope.cn", "www.modelscope.cn"),
}
_EXPECTED = (
    "give owner/name of a repository on Hugging Face, such as google/t5-v1_1-base, or a URL such as "
    "https://huggingface.co/owner/name/tree/main/tokenizer or "
    "https://modelscope.cn/models/owner/name/tree/master/tokenizer"
)
_QWEN_REPO_ID = "Qwen/Qwen3-0.6B-Base"


@dataclass(frozen=True)
class HubFolder:
    """A folder of a model repository; the subfolder "" is the repository's root."""

    hub: str
    repo_id: str
    revision: str
    subfolder: str

    def __str__(self) -> str:
        return f"{self.hub} {'/'.join(filter(None, (self.repo_id, self.subfolder)))} ({self.revision})"

    def places(self) -> Iterator[HubFolder]:
        """Where to look: the folder itself, then the repository's root."""
        yield self
        if self.subfolder:
            yield replace(self, subfolder="")


def hugging_face_endpoint() -> str:
    """The address of Hugging Face, or of the mirror that HF_ENDPOINT names."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def modelscope_endpoint() -> str:
    """The address of ModelScope, or what MODELSCOPE_ENDPOINT or the older MODELSCOPE_DOMAIN names."""
    address = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    return (address if "://" in address else f"https://{address}").rstrip("/")


def parse_source(
    text: str, subfolder: str, hub: str = HUGGING_FACE, branches: Mapping[str, str] = _BRANCHES
) -> HubFolder:
    """The place that `text`, a repository id or the address of a page of either hub, stands for.

    subfolder, hub, branches: what holds where the text does not say; branches has a revision for each hub.
    Raises ValueError with what a source looks like.
    """
    text = text.strip()
    hubs = _hub_of_host()
    if "://" not in text and text.partition("/")[0].lower() not in hubs:
        return HubFolder(hub, _repo_id(text.split("/"), text), branches[hub], _checked_folder(subfolder))
    url = urlsplit(text if "://" in text else f"https://{text}")
    host = url.netloc.lower()
    if url.scheme not in ("http", "https") or host not in hubs:
        mirror = "; for a mirror of Hugging Face, set the environment variable HF_ENDPOINT to it" if host else ""
        raise ValueError(f"{url.scheme}://{url.netloc} is neither Hugging Face nor ModelScope: {_EXPECTED}{mirror}")
    parts = [unquote(part) for part in url.path.split("/") if part]
    if hubs[host] == HUGGING_FACE:
        repo_id, revision, inside = _parse_hugging_face(parts, text)
    else:
        repo_id, revision, inside = _parse_modelscope(parts, url, text)
    folder = subfolder if inside is None else _folder_of(inside)
    return HubFolder(hubs[host], repo_id, revision or branches[hubs[host]], _checked_folder(folder))


def _hub_of_host() -> dict[str, str]:
    hubs = {host: hub for hub, hosts in _HOSTS.items() for host in hosts}
    hubs[urlsplit(modelscope_endpoint()).netloc.lower()] = MODELSCOPE
    hubs[urlsplit(hugging_face_endpoint()).netloc.lower()] = HUGGING_FACE
    return hubs


def _parse_hugging_face(parts: Sequence[str], text: str) -> tuple[str, str | None, str | None]:
    """/<owner>/<name>[/tree|blob|resolve/<revision>[/<path>]] -> repository, revision, path."""
    return _repo_id(parts[:2], text), *_revision_and_path(parts[2:], ("tree", "blob", "resolve"), text)


def _parse_modelscope(parts: Sequence[str], url: SplitResult, text: str) -> tuple[str, str | None, str | None]:
    """/models/<owner>/<name>[/tree|resolve|file/view/<revision>[/<path>]]; Revision= and FilePath= override."""
    if parts[:1] != ["models"]:
        raise ValueError(f"{text!r} is no model's page: {_EXPECTED}")
    rest = list(parts[3:])
    if rest[:2] == ["file", "view"]:
        del rest[0]
    elif rest in (["files"], ["summary"]):
        rest = []
    revision, inside = _revision_and_path(rest, ("tree", "resolve", "view"), text)
    query = parse_qs(url.query)
    revision = query.get("Revision", [revision])[-1]
    inside = query.get("FilePath", [inside])[-1]
    return _repo_id(parts[1:3], text), revision, inside


def _revision_and_path(rest: Sequence[str], words: Sequence[str], text: str) -> tuple[str | None, str | None]:
    if not rest:
        return None, None
    if rest[0] not in words or len(rest) < 2:
        raise ValueError(f"{text!r} is no page of a repository's files: {_EXPECTED}")
    return rest[1], "/".join(rest[2:]) or None


def _repo_id(parts: Sequence[str], text: str) -> str:
    if len(parts) != 2 or not all(re.fullmatch(r"[A-Za-z0-9_.-]+", part) and part.strip(".") for part in parts):
        raise ValueError(f"{text!r} names no repository: {_EXPECTED}" if text else f"nothing is given: {_EXPECTED}")
    return "/".join(parts)


def _folder_of(inside: str) -> str:
    """The path of a tokenizer's file stands for the folder that holds it."""
    path = PurePosixPath(inside.strip("/"))
    folder = path.parent if path.suffix in (".json", ".model", ".txt") else path
    return "" if folder == PurePosixPath() else str(folder)


def _checked_folder(folder: str) -> str:
    folder = folder.strip().strip("/")
    if ".." in folder.split("/") or "\\" in folder:
        raise ValueError(f"{folder!r} is no folder within a repository; give a path such as tokenizer, or nothing")
    return folder


def _text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError("expected a text in quotes")
    return raw


def _source(raw: Any) -> str:
    parse_source(_text(raw), subfolder="")
    return raw


def _modelscope_source(raw: Any) -> str:
    hub = parse_source(_text(raw), subfolder="", hub=MODELSCOPE).hub
    if hub != MODELSCOPE:
        raise ValueError(f"{raw!r} is on {hub}, not on ModelScope; t5_tokenizer_repo_id is for that")
    return raw


def _subfolder(raw: Any) -> str:
    return _checked_folder(_text(raw))


@dataclass(frozen=True)
class TokenizerSettings:
    """What happens when a tokenizer's files are missing: they are a few MB, and can be downloaded."""

    auto_download_t5_tokenizer: bool = option(
        True,
        "Download the T5 tokenizer when files of it are missing in t5_tokenizer_dir, after all settings have been "
        "checked. Off: a missing file is an error.",
    )
    auto_download_qwen_tokenizer: bool = option(
        True, f"The same for Qwen3's tokenizer, when the qwen file has none beside it; it comes from {_QWEN_REPO_ID}."
    )
    t5_tokenizer_repo_id: str = option(
        "google/t5-v1_1-base",
        "Where the T5 tokenizer is downloaded from: owner/name on Hugging Face, or the address of a repository or of "
        "a folder in it, on Hugging Face or ModelScope.",
        parse=_source,
    )
    t5_tokenizer_subfolder: str = option(
        "tokenizer", "Folder of that repository that is tried first; its root is tried next.", parse=_subfolder
    )
    t5_tokenizer_modelscope_fallback: bool = option(
        True, "When Hugging Face cannot give a tokenizer (T5's or Qwen3's), try ModelScope."
    )
    t5_tokenizer_modelscope_repo_id: str = option(
        "nv-community/Cosmos-Predict2-2B-Text2Image",
        "Repository on ModelScope that has the T5 tokenizer, as owner/name or as an address.",
        parse=_modelscope_source,
    )
    t5_tokenizer_modelscope_revision: str = option("master", "Branch, tag or commit of a repository on ModelScope.")
    t5_tokenizer_modelscope_subfolder: str = option(
        "tokenizer", "Folder of the ModelScope repository that is tried first; its root is next.", parse=_subfolder
    )
    t5_tokenizer_validate_strict: bool = option(
        False,
        "Check the T5 tokenizer thoroughly: special tokens, <extra_id_…> tokens and the ids of a sentence. "
        "For a tokenizer from an unusual place.",
    )


def t5_sources(settings: TokenizerSettings) -> tuple[HubFolder, ...]:
    """The places to download T5's tokenizer from, in their order."""
    branches = {**_BRANCHES, MODELSCOPE: settings.t5_tokenizer_modelscope_revision}
    first = parse_source(settings.t5_tokenizer_repo_id, settings.t5_tokenizer_subfolder, branches=branches)
    if not settings.t5_tokenizer_modelscope_fallback:
        return (first,)
    second = parse_source(
        settings.t5_tokenizer_modelscope_repo_id, settings.t5_tokenizer_modelscope_subfolder, MODELSCOPE, branches
    )
    return (first,) if first == second else (first, second)


def qwen_sources(settings: TokenizerSettings) -> tuple[HubFolder, ...]:
    """The places to download Qwen3's tokenizer from, in their order."""
    hubs = (HUGGING_FACE, MODELSCOPE) if settings.t5_tokenizer_modelscope_fallback else (HUGGING_FACE,)
    return tuple(HubFolder(hub, _QWEN_REPO_ID, _BRANCHES[hub], "") for hub in hubs)
