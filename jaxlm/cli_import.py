"""The command that brings published weights in: import-hf."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from jaxlm.errors import InputError


def import_hf(source: str, directory: Path, /, *, revision: str | None = None) -> None:
    """Read published weights into a directory that stands for a run: sample it, or train on from it.

    Parameters
    ----------
    source
        A Hugging Face directory, owner/name, or a .gguf file.
    directory
        A new or an empty directory.
    revision
        Commit, tag or branch of a repository.
    """
    from jaxlm._digests import digest_file
    from jaxlm._disk import disk_errors
    from jaxlm.checkpoint import Checkpointer
    from jaxlm.interop import load_hf
    from jaxlm.interop.gguf import load_gguf
    from jaxlm.stages import saved
    from jaxlm.stages.runner import say

    if revision is not None and source.endswith(".gguf"):
        raise InputError(f"--revision {revision}: {source} is a file and has none; leave it out.")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: is there already and not an empty directory; choose another.")
    check_writable(directory)
    _check_published(source)
    cfg, params, tokenizer = load_gguf(source) if source.endswith(".gguf") else load_hf(source, revision=revision)
    if tokenizer is None:
        raise InputError(f"{source}: has no tokenizer.json, and a run needs a tokenizer; put one beside the weights.")
    with disk_errors("import the model", directory):
        directory.mkdir(parents=True, exist_ok=True)
    saved.write_description(directory, cfg, tokenizer)
    # What `jaxlm verify` compares; the weights' own digests are the checkpoint's.
    files = {file.name: digest_file(file)[1] for file in sorted(directory.iterdir()) if file.is_file()}
    meta = {"tokenizer": tokenizer.fingerprint, "model": cfg.identity(), "files": files}
    with Checkpointer(directory / saved.CHECKPOINTS, asynchronous=False) as checkpoints:
        checkpoints.save(0, {"params": params}, meta=meta, metric=None)
    say(f"{directory}: imported; use it as a run, or as pretrain.init_from={directory}/checkpoints/0")


def check_writable(directory: Path) -> None:
    """Refuses a place where no directory can be made, before a model is read for it. Makes nothing.

    Raises:
        InputError: something above it is a file, or may not be written.
    """
    place = directory.absolute()
    nearest = next(folder for folder in (place, *place.parents) if os.path.exists(folder))
    if not nearest.is_dir():
        raise InputError(f"{directory}: {nearest} is a file, so nothing can be made below it; choose another place.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{directory}: {nearest} may not be written; choose another place.")


def _check_published(source: str) -> None:
    """Refuses names of ours that stand for no published weights, lest the hub is asked for them.

    Names without an owner are the oldest repositories': of our presets, only those of GPT-2 are among them.
    """
    from jaxlm.config import find_config
    from jaxlm.presets import PRESETS

    if source.endswith(".gguf") or "/" in source or Path(source).exists() or source.startswith("gpt2"):
        return
    what = None
    with suppress(InputError):
        find_config(source)
        what = f"a configuration to train with (jaxlm pipeline {source})"
    if source in PRESETS:
        what = f"a preset, a shape without weights (jaxlm inspect {source})"
    if Path("runs", source, "run.json").is_file():
        what = f"a run, which needs no import (jaxlm sample {source})"
    if what is not None:
        raise InputError(f"{source}: is {what}; give a Hugging Face directory, owner/name or a .gguf file.")
