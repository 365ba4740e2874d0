"""Downloads by processes of their own: together, killed, and on a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

_PROCESS = """
import json, resource, signal, sys
from jaxlm.data.download import Resource, fetch
from jaxlm.errors import JaxlmError
fields, cache, limit = json.loads(sys.argv[1])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    print(fetch(Resource(**fields), cache_dir=cache))
except JaxlmError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def _process(call: Any, limit: int = 0) -> subprocess.Popen[str]:
    arguments = json.dumps([vars(call.resource), str(call.cache), limit])
    return subprocess.Popen([sys.executable, "-c", _PROCESS, arguments], stdout=subprocess.PIPE, text=True)


def test_two_processes_share_one_download(call: Any, server: Any) -> None:
    started = threading.Event()

    def slow(request: Any) -> None:
        started.wait(10)
        time.sleep(0.3)  # both processes are there by now, or the second finds the file; one request in any case
        server.whole(request)

    server.answers = [slow]
    processes = [_process(call), _process(call)]
    started.set()
    results = [process.communicate(timeout=30)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert results[0] == results[1]
    assert Path(results[0]).read_bytes() == call.body
    assert server.ranges == [None]
    assert call.files() == ["data.bin"]


def test_a_killed_download_goes_on_and_leaves_no_lock(call: Any, server: Any) -> None:
    sent, over = threading.Event(), threading.Event()

    def stall(request: Any) -> None:
        server.half(request)
        sent.set()
        over.wait(30)

    server.answers = [stall, server.ranged]
    process = _process(call)
    assert sent.wait(30)
    deadline = time.monotonic() + 10
    while not (call.part().exists() and call.part().stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    over.set()
    assert call.files() == ["data.bin.part"]
    have = call.part().stat().st_size
    assert 0 < have <= len(call.body) // 2
    assert call().read_bytes() == call.body
    assert server.ranges == [None, f"bytes={have}-"]


def test_a_full_disk(call: Any, server: Any) -> None:
    process = _process(call, limit=100_000)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 74
    assert "File too large; free space or set JAXLM_CACHE" in output.replace("\n", " ")
    assert "data.bin" not in call.files()
    server.answers = [server.ranged]
    assert call().read_bytes() == call.body
