"""A real server on this machine whose every answer a test chooses, and a caller that fetches from it."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxlm.data.download import Resource, fetch

BODY = bytes(range(256)) * 2000  # 512,000 bytes


class Request(BaseHTTPRequestHandler):
    """One request, which the next of the server's `answers` answers; the last one answers all that follow."""

    server: Server

    def do_GET(self) -> None:
        with self.server.lock:
            number = len(self.server.ranges)
            self.server.ranges.append(self.headers.get("Range"))
        self.server.answers[min(number, len(self.server.answers) - 1)](self)

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Keeps the `Range` header of every request. The static methods are answers, or make one."""

    daemon_threads = True
    body = BODY

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.lock = threading.Lock()
        self.ranges: list[str | None] = []
        self.answers: list[Callable[[Request], None]] = [self.whole]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/files/data.bin"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients of these tests go away in mid-body on purpose

    @staticmethod
    def whole(request: Request) -> None:
        request.reply(200, BODY)

    @staticmethod
    def ranged(request: Request) -> None:
        """The part that is asked for."""
        if request.headers.get("Range") is None:
            return request.reply(200, BODY)
        start = int(request.headers["Range"].removeprefix("bytes=").rstrip("-"))
        request.reply(206, BODY[start:], Content_Range=f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")

    @staticmethod
    def half(request: Request) -> None:
        """Announces everything, sends half, and closes."""
        request.reply(200, BODY[: len(BODY) // 2], Content_Length=str(len(BODY)))

    @staticmethod
    def reset(request: Request) -> None:
        """Sends half, and resets the connection."""
        Server.half(request)
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.connection.close()

    @staticmethod
    def status(code: int, **headers: str) -> Callable[[Request], None]:
        return lambda request: request.reply(code, b"an error page", **headers)

    @staticmethod
    def sends(body: bytes, **headers: str) -> Callable[[Request], None]:
        return lambda request: request.reply(200, body, **headers)

    @staticmethod
    def chunked(body: bytes) -> Callable[[Request], None]:
        """A body whose length is not announced, but whose end is."""
        content = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n" if body else b"0\r\n\r\n"

        def answer(request: Request) -> None:
            request.protocol_version = "HTTP/1.1"
            request.reply(200, content, Content_Length="", Transfer_Encoding="chunked", Connection="close")

        return answer


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Caller:
    """Fetches `body` from the server into a cache of the test; keeps the delays instead of waiting."""

    body = BODY

    def __init__(self, server: Server, cache: Path, client: httpx.Client) -> None:
        self.server, self.cache, self.client, self.delays = server, cache, client, list[float]()
        self.resource = Resource("data.bin", server.url, len(BODY), hashlib.sha256(BODY).hexdigest())

    def __call__(self, resource: Resource | None = None, **options: Any) -> Path:
        defaults = {"cache_dir": self.cache, "client": self.client, "sleep": self.delays.append}
        return fetch(resource or self.resource, **{**defaults, **options})

    def files(self) -> list[str]:
        """What the cache holds, locks aside."""
        return sorted(path.name for path in self.cache.rglob("*") if path.is_file() and path.suffix != ".lock")

    def part(self) -> Path:
        path = self.cache / self.resource.sha256[:16] / "data.bin.part"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@pytest.fixture(scope="session")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False) as client:
        yield client


@pytest.fixture
def call(server: Server, tmp_path: Path, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> Caller:
    # No mirror or proxy of the machine that runs the tests takes part.
    for name in ("JAXLM_MIRROR", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return Caller(server, tmp_path / "cache", client)
