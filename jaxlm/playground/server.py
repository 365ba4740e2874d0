"""The playground's web page: a few routes on this machine's own address, and the answers as a stream of JSON lines.

Nothing leaves the machine and nothing comes from outside: the page's three files ship with the package, its policy lets
the browser load nothing else, and requests that name another host or come from another site's page are refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from jaxlm._frozen import Frozen, validated
from jaxlm.errors import InputError
from jaxlm.loading import Loaded
from jaxlm.playground.answers import Event, Note, can_chat, example_prompt, failed, side_by_side
from jaxlm.playground.explain import Token
from jaxlm.playground.settings import USED, Settings, controls

HOST = "127.0.0.1"
PAGE = Path(__file__).parent / "page"
FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def _one_or_two(names: tuple[str, ...]) -> tuple[str, ...]:
    if not 1 <= len(names) <= 2:
        raise ValueError("choose one model or two")
    return names


class Asked(Frozen):
    """What the page sends."""

    prompt: str = Field(max_length=100_000, description="the text, or the question")
    models: Annotated[tuple[str, ...], AfterValidator(_one_or_two)] = Field(description="names of one or two models")
    settings: Settings = Settings()


def app(models: Mapping[str, Loaded], stopping: threading.Event | None = None) -> Starlette:
    """The page and its two calls, as an ASGI application.

    GET /api/models tells the models' names, a prompt to begin with and the controls. POST /api/answer takes `Asked` as
    JSON and gives a JSON object a line: {"pane", "event": "token" | "note" | "end", ...}, the panes in turn. What is
    wrong with a request is {"error": sentence}, with status 400, or as a line where it shows later; what fails here is
    told so too, with 500.

    Args:
        models: what can be asked, by the names to show.
        stopping: set when the server is to end, which ends running answers.
    """
    stopping = threading.Event() if stopping is None else stopping
    prompt = example_prompt(models.values())

    async def send_file(request: Request) -> Response:
        return FileResponse(PAGE / FILES[request.url.path], headers=HEADERS)

    async def tell_models(request: Request) -> Response:
        shown = [{"name": name, "chat": can_chat(model)} for name, model in models.items()]
        told = {"models": shown, "prompt": prompt, "controls": controls(), "used": USED}
        return JSONResponse(told, headers=HEADERS)

    async def answer(request: Request) -> Response:
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return _wrong("this page of another site may not ask the playground.", 403)
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return _wrong("the request must be application/json.", 415)
        try:
            asked = validated(Asked, _object(await request.body()))
            unknown = [name for name in asked.models if name not in models]
            if unknown:
                raise InputError(f"models: {unknown[0]!r} is not open; there are {', '.join(models)}.")
            gone = threading.Event()
            lines = await run_in_threadpool(_start, models, asked, lambda: stopping.is_set() or gone.is_set())
        except InputError as error:
            return _wrong(str(error), 400)
        except Exception as error:
            return _wrong(failed(error), 500)
        return _Lines(lines, gone)

    return Starlette(
        routes=[
            *(Route(path, send_file) for path in FILES),
            Route("/api/models", tell_models),
            Route("/api/answer", answer, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
    )


class _Lines(StreamingResponse):
    """Lines as they come. `gone` is set when the reader goes, which a long wait for the next line looks at."""

    def __init__(self, lines: Iterator[str], gone: threading.Event) -> None:
        super().__init__(lines, media_type="application/x-ndjson", headers=HEADERS)
        self._gone = gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                self._gone.set()
            return message

        await super().__call__(scope, watched, send)


def _start(models: Mapping[str, Loaded], asked: Asked, stopped: Callable[[], bool]) -> Iterator[str]:
    # By place, not by name: one model may be asked twice.
    panes = {str(i): models[name] for i, name in enumerate(asked.models)}
    return _lines(side_by_side(panes, asked.prompt, asked.settings, stopped=stopped))


def _lines(events: Iterator[tuple[str, Event]]) -> Iterator[str]:
    try:
        for pane, event in events:
            yield _line({"pane": int(pane), **event_json(event)})
    except InputError as error:
        yield _line({"error": str(error)})
    except Exception as error:  # the head has been sent: a line is all that the page can still be told by
        yield _line({"error": failed(error)})


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def event_json(event: Event) -> dict[str, Any]:
    """An event as JSON values; NaN becomes None."""
    kind = "token" if isinstance(event, Token) else "note" if isinstance(event, Note) else "end"
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(event).items()
    }
    return {"event": kind, **values}


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise InputError("the request is not JSON.") from None
    if not isinstance(value, dict):
        raise InputError("the request must be a JSON object.")
    return value


def _wrong(sentence: str, status: int) -> Response:
    return JSONResponse({"error": sentence}, status_code=status, headers=HEADERS)


def listen(port: int | None) -> socket.socket:
    """A socket on this machine's own address.

    Args:
        port: the one asked for; None takes a free one.

    Raises:
        InputError: that port is in use, not allowed, or no port.
    """
    if port is not None and not 1 <= port <= 65535:
        raise InputError(f"--port {port}: must be between 1 and 65535; leave it out for a free one.")
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # The port of a playground that has just ended can be had again; one that is listened to cannot.
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port or 0))
        found.listen()  # from here on nobody else can; a page opened early waits for its answer
    except OSError as error:
        found.close()
        raise InputError(
            f"--port {port}: cannot be listened on ({error.strerror}); choose another, or leave it out for a free one."
        ) from None
    return found


def serve(models: Mapping[str, Loaded], listener: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM, or, off the main thread, for ever. Leaves no process, thread or file behind."""
    import uvicorn

    stopping = threading.Event()
    config = uvicorn.Config(
        app(models, stopping), log_level="warning", access_log=False, lifespan="off", ws="none",
        timeout_graceful_shutdown=30,
    )  # fmt: skip
    server = uvicorn.Server(config)

    def stop(number: int, frame: FrameType | None) -> None:
        # Answers end after the step under way; asked a second time, nobody waits for them.
        server.force_exit = stopping.is_set()
        stopping.set()
        server.should_exit = True

    # uvicorn would take the signals itself, and raise them again at the end, past which nothing could be said.
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    on_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)} if on_main else {}
    try:
        server.run(sockets=[listener])
    finally:
        stopping.set()
        listener.close()
        for number, handler in before.items():
            signal.signal(number, handler)
