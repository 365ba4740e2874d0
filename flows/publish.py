"""Publishing: the model of a run, its report and lineage, to a directory or a bucket, all of it or nothing.

What is published lies in `<to>/<run>-<id>/`, beside an index `published.json` with the size and digest of every file,
which is written last: a reader looks for it first. In a directory the whole appears by one rename.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from flows import lineage
from jaxlm._digests import digest_file
from jaxlm._disk import disk_errors, sync_directory, write_atomic
from jaxlm._lock import LOCK_FILE, dir_lock
from jaxlm.config import RunConfig
from jaxlm.errors import InputError, JaxlmError, UnavailableError
from jaxlm.stages import runs
from jaxlm.stages.process import PARENT, read_error
from jaxlm.stages.spec import Manifest
from jaxlm.stages.store import damage, output_names, read_spec

INDEX = "published.json"
_LOCAL = ("file", "local")
_EXPORT = "from jaxlm.stages.process import follow_parent; follow_parent(); from jaxlm.cli import main; main()"


def _network(task: Any, task_run: Any, state: Any) -> bool:
    return isinstance(state.data, UnavailableError)


@task(
    name="publish",
    cache_policy=NO_CACHE,
    persist_result=False,
    task_run_name="publish to {to}",
    retries=4,
    retry_delay_seconds=exponential_backoff(2),
    retry_jitter_factor=1.0,
    retry_condition_fn=_network,
)
def publish(cfg: RunConfig, to: str, done: list[Manifest]) -> str:
    """Exports a run. Returns where it is now. See `export`."""
    return export(cfg, to, done)


def export(cfg: RunConfig, to: str, done: list[Manifest]) -> str:
    """Exports the model of a finished run with its report and lineage; as it is there already, nothing is done.

    Args:
        cfg: the run; `cfg.publish.form` says in which form its model goes.
        to: a directory, or a URL that fsspec knows.
        done: the run's stages, evaluated.

    Returns:
        The directory or URL that was written.

    Raises:
        InputError: the model or its report is damaged; there is no such bucket, no right to write to it, or something
            else is there under that name.
        UnavailableError: the bucket's service is away.
        DiskError: the disk failed.
    """
    by_stage = {manifest.stage: manifest for manifest in done}
    model = by_stage.get("sft") or by_stage["pretrain"]
    evaluated = by_stage["evaluate"]
    for manifest in (model, evaluated):
        _check_whole(manifest)
    with _workplace(runs.directory(cfg) / ".publish") as work:
        files = _hf(model, work) if cfg.publish.form == "hf" else _stage_files(model)
        for name in evaluated.outputs:
            if name in runs.REPORT_FILES or name.startswith(f"{runs.FIGURES}/"):
                files[f"report/{name}"] = evaluated.directory / name
        if (runs.directory(cfg) / lineage.FILE).exists():
            files[lineage.FILE] = runs.directory(cfg) / lineage.FILE
        index = {"run": cfg.name, "stage": model.stage, "id": model.id, "form": cfg.publish.form}
        return put(files, to, f"{cfg.name}-{evaluated.id}", index)


def _check_whole(manifest: Manifest) -> None:
    """Who looks for a result trusts sizes and times; others will trust what is published, so its bytes are compared."""
    read_spec(manifest.directory)
    if problems := damage(manifest):
        problem = problems[0].rstrip(".")
        remove = "" if problem.endswith("missing") else "remove that file and "
        raise InputError(f"publish: {problem}; {remove}run the same command again, which makes it anew.")


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """An empty directory for one process at a time, gone at the end. What a killed one has left goes first."""
    with dir_lock(folder):
        try:
            for left in folder.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name != LOCK_FILE:
                    left.unlink()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def put(files: Mapping[str, Path], to: str, name: str, about: Mapping[str, Any]) -> str:
    """Writes `files` and their index to `to`/`name`; see `export`."""
    import fsspec

    try:
        fs, base = fsspec.core.url_to_fs(to)
    except (ImportError, ValueError) as error:
        raise InputError(f"publish.to={to}: no such kind of file system ({error}); install its package.") from None
    listed = {}
    for key, path in sorted(files.items()):
        size, sha256 = digest_file(path)
        listed[key] = {"bytes": size, "sha256": sha256}
    index = {**about, "files": listed}
    target = f"{base.rstrip('/')}/{name}"
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    shown = target if protocol in _LOCAL else f"{protocol}://{target}"
    try:
        if fs.exists(f"{target}/{INDEX}"):
            found = json.loads(fs.cat_file(f"{target}/{INDEX}"))
            if found.get("files") == listed:
                return shown
            raise InputError(f"{shown}: another publication is there; remove it, or give the run another name.")
        if protocol in _LOCAL:
            _to_directory(files, Path(target), index)
        else:
            for key, path in files.items():
                fs.put_file(str(path), f"{target}/{key}")
            fs.pipe_file(f"{target}/{INDEX}", json.dumps(index, indent=1).encode())
    except JaxlmError:
        raise
    except (FileNotFoundError, PermissionError, ValueError) as error:
        raise InputError(f"publish.to={to}: cannot be written ({' '.join(str(error).split())[:200]}).") from None
    except Exception as error:  # each service has errors of its own
        said = " ".join(str(error).split())[:200]
        raise UnavailableError(f"publish.to={to}: the service did not take it ({said}); run the same again.") from None
    return shown


def _to_directory(files: Mapping[str, Path], target: Path, index: Mapping[str, Any]) -> None:
    with disk_errors("publish", target.parent):
        if target.exists():
            raise InputError(f"{target}: something that is no publication is there; move it away.")
        with _workplace(target.with_name(f".{target.name}.part")) as part:
            for key, path in files.items():
                (part / key).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, part / key)
                with open(part / key, "rb") as copy:
                    os.fsync(copy.fileno())
            write_atomic(part / INDEX, json.dumps(index, indent=1).encode())
            (part / LOCK_FILE).unlink()
            for folder in [part, *(item for item in part.rglob("*") if item.is_dir())]:
                sync_directory(folder)
            os.rename(part, target)
            sync_directory(target.parent)


def _stage_files(model: Manifest) -> dict[str, Path]:
    """A stage as it is, so that every command of jaxlm that takes a model takes the publication."""
    names = ["spec.json", "manifest.json", *model.outputs]
    return {f"model/{name}": model.directory / name for name in names}


def _hf(model: Manifest, work: Path) -> dict[str, Path]:
    """Hugging Face's files, made in a process of its own: the flow's never loads jax."""
    out = work / "model"
    work.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", _EXPORT, "export-hf", str(model.directory), str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", PARENT: str(os.getpid())},
        check=False,
    )
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("jaxlm: ")
        kind = type(read_error(work, done.returncode))  # by its exit code
        raise kind(f"publish.form=hf: {said}")
    return {f"model/{name}": out / name for name in output_names(out)}
