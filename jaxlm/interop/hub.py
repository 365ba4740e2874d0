"""Where a model is: a directory, or a repository on the Hugging Face hub, kept in that library's own cache."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from jaxlm._disk import disk_errors
from jaxlm.errors import InputError, UnavailableError

_REPO_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
# What a model needs, at the top of its repository: no weights in other formats, and nothing that holds code.
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.jaxlm.json", "special_tokens_map.json",
    "chat_template.jinja",
)  # fmt: skip


def locate(dir_or_repo_id: str | Path, revision: str | None = None, *, only: tuple[str, ...] = MODEL_FILES) -> Path:
    """The directory that holds a model's files.

    A repository is downloaded once into the cache of `huggingface_hub` (`HF_HOME`), and needs no network when its
    revision is there. Without a network a branch is what it was at the last download.

    Args:
        dir_or_repo_id: a directory, which comes first, or `owner/name`.
        revision: commit, tag or branch of a repository; by default `main`. A full commit hash pins every byte.
        only: the files of a repository that are needed.

    Raises:
        InputError: neither a directory nor a repository, a repository or revision that does not exist or is closed to
            you, or a revision of a directory.
        UnavailableError: the hub cannot be reached and the files are not in the cache.
        DiskError: the disk is full.
    """
    name = str(dir_or_repo_id)
    if not isinstance(dir_or_repo_id, str | Path) or not name:
        raise InputError(f"dir_or_repo_id: expected a directory or owner/name, found {dir_or_repo_id!r:.60}.")
    if revision is not None and not (isinstance(revision, str) and revision):
        raise InputError(f"revision: expected a commit, tag or branch, found {revision!r:.60}.")
    path = Path(name)
    if os.path.isdir(path):  # not the path's own method, which fails where the name is too long for one
        if revision is not None:
            raise InputError(f"revision: {path} is a directory and has none; leave revision out.")
        return path
    if os.path.isfile(path):
        raise InputError(f"{path}: {_about_file(path)}")
    if not _REPO_ID.fullmatch(name):
        raise InputError(
            f"{name:.200}: there is no such directory, and a repository's name is owner/name; check the path."
        )
    return _download(name, revision, only)


def _about_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return "this is a GGUF file; read it with jaxlm.load_gguf."
    if path.suffix in (".safetensors", ".json"):
        return f"give the directory that holds it and its config.json: {path.parent}."
    return (
        "this is a file, and one that may hold a pickle, which can run code and is never opened; give a directory with "
        "model.safetensors and config.json."
    )


def _download(repo_id: str, revision: str | None, only: tuple[str, ...]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    at = f"{repo_id} at {revision}" if revision else repo_id
    closed = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
    # The second is what its HTTP client raises: requests, httpx or another, by its version.
    away: tuple[Any, ...] = (OSError, *errors.HfHubHTTPError.__bases__)
    try:
        with disk_errors(f"download {repo_id}", Path(constants.HF_HUB_CACHE)):
            options: dict[str, Any] = dict(allow_patterns=list(only), ignore_patterns=["*/*"])
            return Path(snapshot_download(repo_id, revision=revision, **options))
    except errors.GatedRepoError:
        raise InputError(f"{at}: access must be asked for on its page, then log in with `hf auth login`.") from None
    except closed as error:
        what = (
            "no such revision" if isinstance(error, errors.RevisionNotFoundError) else "no such directory or repository"
        )
        raise InputError(f"{at}: {what}, or it is private; check the name, or log in with `hf auth login`.") from None
    except away as error:
        raise UnavailableError(
            f"{at}: cannot be downloaded and is not in the cache {constants.HF_HUB_CACHE} as a whole "
            f"({type(error).__name__}); try again with a network, or give a directory."
        ) from error
