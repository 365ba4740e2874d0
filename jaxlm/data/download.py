"""Fetches a file whose size and sha256 are known: from the cache, from a mirror directory, or over the network.

A file under its final name is whole and has been checked: bytes arrive in a `.part` beside it, which becomes the file
by rename. An interrupted download goes on from its `.part`; a lock, which the system releases when its owner dies, lets
one process at a time write there. Loads no jax.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from jaxlm.errors import DiskError, InputError, UnavailableError

if TYPE_CHECKING:
    import httpx

ATTEMPTS = 6  # with the delays below: a peer may be away for about half a minute
FIRST_DELAY = 1.0  # seconds before the second attempt; doubles from one to the next
LONGEST_DELAY = 60.0
_CHUNK = 1 << 20
_RETRY_STATUS = {408, 425, 429}  # and every 5xx

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Resource:
    """A file that can be told from any other."""

    name: str  # of the file, for people and for its suffix
    url: str
    size: int  # bytes
    sha256: str  # 64 lower-case hexadecimal digits


class _RetryError(Exception):
    """The attempt failed in a way that may pass; `after` is the delay in seconds that the server asked for."""

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


def default_cache_dir() -> Path:
    """Where downloads are kept: `$JAXLM_CACHE`, or `~/.cache/jaxlm`."""
    return Path(os.environ.get("JAXLM_CACHE") or Path.home() / ".cache" / "jaxlm").expanduser()


def fetch(
    resource: Resource,
    *,
    cache_dir: str | Path | None = None,
    mirrors: Sequence[str | Path] | None = None,
    client: httpx.Client | None = None,
    progress: Progress | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """The resource as a local file, taken from the first of: the cache, the mirrors, its address.

    Args:
        resource: what to fetch.
        cache_dir: where files are kept; default `$JAXLM_CACHE`, or `~/.cache/jaxlm`.
        mirrors: directories to look in, at any depth and under any file name, by size and then sha256; default
            `$JAXLM_MIRROR`, with the system's path separator between several.
        client: for the network; default one of httpx with a timeout of 30 s.
        progress: called with (bytes so far, bytes in all) while the network delivers.
        sleep: waits between attempts; for tests.

    Returns:
        Path in the cache, whole and checked.

    Raises:
        InputError: the address is wrong, or what it gives has another length or digest; or no such mirror.
        UnavailableError: the network or the server is still away after all attempts.
        DiskError: the cache cannot be written.
    """
    folder = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    path = folder / resource.sha256[:16] / (Path(resource.name).name or "file")
    with _disk_errors(path):
        if _matches(path, resource):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f"{path.name}.lock")):
            if _matches(path, resource):  # another process was faster
                return path
            part = path.with_name(f"{path.name}.part")
            mirrored = _find(_mirrors(mirrors), resource)
            if mirrored is None or not _copy(mirrored, part, resource):
                _download(resource, part, client, progress, sleep)
            os.replace(part, path)
    return path


def _mirrors(given: Sequence[str | Path] | None) -> list[Path]:
    named = os.environ.get("JAXLM_MIRROR", "").split(os.pathsep) if given is None else given
    mirrors = [Path(name).expanduser() for name in named if str(name)]
    for mirror in mirrors:
        if not mirror.is_dir():
            raise InputError(f"the mirror {mirror} is not a directory; correct or unset JAXLM_MIRROR.")
    return mirrors


def _find(mirrors: Sequence[Path], resource: Resource) -> Path | None:
    for mirror in mirrors:
        for folder, inner, names in os.walk(mirror):
            inner.sort()
            for name in sorted(names):
                with contextlib.suppress(OSError):  # a file of the mirror that cannot be read is not the one
                    if _matches(Path(folder, name), resource):
                        return Path(folder, name)
    return None


def _copy(source: Path, part: Path, resource: Resource) -> bool:
    with open(source, "rb") as reader, open(part, "wb") as writer:
        while chunk := reader.read(_CHUNK):
            writer.write(chunk)
        _sync(writer)
    return _matches(part, resource)


def _download(
    resource: Resource,
    part: Path,
    client: httpx.Client | None,
    progress: Progress | None,
    sleep: Callable[[float], None],
) -> None:
    """Fills `part` with the checked resource, in as many attempts as it may take."""
    import httpx

    with contextlib.ExitStack() as stack:
        if client is None:
            client = stack.enter_context(httpx.Client(timeout=30.0, follow_redirects=True))
        for attempt in range(1, ATTEMPTS + 1):
            resumed = part.exists()
            try:
                _receive(resource, part, client, progress)
                if _matches(part, resource):
                    return
                found = _sha256(part)
                part.unlink()
                if not resumed:
                    raise InputError(
                        f"{resource.url}: expected sha256 {resource.sha256}, found {found}; "
                        "the file at this address has changed, check url and sha256."
                    )
                raise _RetryError(f"a resumed download had sha256 {found}", after=0.0)  # the old part was damaged
            except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
                raise InputError(f"{resource.url}: this address cannot be fetched ({error}); check the url.") from None
            except (_RetryError, httpx.TransportError) as error:
                why = str(error) or type(error).__name__
                if attempt == ATTEMPTS:
                    raise UnavailableError(
                        f"{resource.url}: not fetched in {ATTEMPTS} attempts, the last failed with: {why}; run the "
                        "command again to continue, or point JAXLM_MIRROR at a directory that has the file."
                    ) from None
                asked = error.after if isinstance(error, _RetryError) else None
                # Jitter keeps the hosts of a cluster, started together, from coming back together.
                delay = FIRST_DELAY * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                sleep(min(delay if asked is None else asked, LONGEST_DELAY))


def _receive(resource: Resource, part: Path, client: httpx.Client, progress: Progress | None) -> None:
    """One request: appends to `part` what is missing of it.

    Raises:
        InputError: the address is wrong, or has a file of another length.
        _RetryError, httpx.TransportError: worth another attempt.
    """
    have = part.stat().st_size if part.exists() else 0
    if have == resource.size:
        return
    if have > resource.size:
        part.unlink()
        have = 0
    # Compressed content would have other lengths and ranges than the file.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", resource.url, headers=headers) as response:
        status = response.status_code
        if status == 416 and have:
            part.unlink()
            raise _RetryError("the server refused to continue the download (416)", after=0.0)
        if status >= 500 or status in _RETRY_STATUS:
            raise _RetryError(f"the server answered {status}", after=_retry_after(response))
        if status not in (200, 206):
            raise InputError(f"{resource.url}: the server answered {status}; check the url.")
        if status == 206:
            start, total = _content_range(response)
            if start != have:
                part.unlink(missing_ok=True)
                raise _RetryError(f"the server continued at byte {start}, not {have}", after=0.0)
        else:  # the whole file, also from a server that knows no ranges
            have, total = 0, _content_length(response)
        if total is not None and total != resource.size:
            part.unlink(missing_ok=True)
            raise _wrong_length(resource, total)
        with open(part, "ab" if have else "wb") as file:
            for chunk in response.iter_raw():
                have += len(chunk)
                if have > resource.size:
                    break
                file.write(chunk)
                if progress is not None:
                    progress(have, resource.size)
            _sync(file)
    if have > resource.size:
        part.unlink()
        raise _wrong_length(resource, have, "at least ")
    if have < resource.size:
        if response.headers.get("Transfer-Encoding", "").lower() == "chunked":  # ended in order: there is no more
            part.unlink()
            raise _wrong_length(resource, have)
        raise _RetryError(f"the server sent {have} of {resource.size} bytes")


def _wrong_length(resource: Resource, found: int, more: str = "") -> InputError:
    return InputError(
        f"{resource.url}: expected {resource.size} bytes, found {more}{found}; "
        "the file at this address has changed, check url, size and sha256."
    )


def _content_range(response: httpx.Response) -> tuple[int, int | None]:
    """Start and full length of `Content-Range: bytes 5-9/10` (RFC 9110, section 14.4); the length may be `*`."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if match is None:
        return -1, None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _content_length(response: httpx.Response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds of `Retry-After` (RFC 9110, section 10.2.3); its form as a date is left to the usual delay."""
    seconds = response.headers.get("Retry-After", "")
    return float(seconds) if seconds.isdecimal() else None


def _matches(path: Path, resource: Resource) -> bool:
    """Whether the file is there, whole and undamaged. The size comes first: it costs nothing."""
    try:
        return path.stat().st_size == resource.size and _sha256(path) == resource.sha256
    except FileNotFoundError:
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, and with the process
        yield


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{error.filename or path}: {error.strerror or error}; free space or set JAXLM_CACHE."
        ) from None
