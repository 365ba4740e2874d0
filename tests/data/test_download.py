"""Downloads against a real server that answers well, badly, or not to the end."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxlm.data import download
from jaxlm.data.download import Resource
from jaxlm.errors import DiskError, InputError, UnavailableError


def test_a_download_is_kept(call: Any, server: Any) -> None:
    seen: list[tuple[int, int]] = []
    path = call(progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == call.body
    assert path.name == "data.bin"
    assert call.files() == ["data.bin"]
    assert seen[-1] == (len(call.body), len(call.body))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert call() == path
    assert server.ranges == [None]
    assert call.delays == []


def test_a_client_that_is_given_stays_open(call: Any) -> None:
    call()
    assert not call.client.is_closed


def test_the_default_client_follows_redirects(call: Any, server: Any) -> None:
    server.answers = [server.status(302, Location="/elsewhere"), server.whole]
    assert call(client=None).read_bytes() == call.body


@pytest.mark.parametrize("cut", ["half", "reset"])
def test_a_cut_download_goes_on(call: Any, server: Any, cut: str) -> None:
    server.answers = [getattr(server, cut), server.ranged]
    assert call().read_bytes() == call.body
    if cut == "half":  # after a reset, what was under way may be lost
        assert server.ranges == [None, f"bytes={len(call.body) // 2}-"]
    assert len(call.delays) == 1


def test_a_part_left_by_an_earlier_command_goes_on(call: Any, server: Any) -> None:
    server.answers = [server.ranged]
    call.part().write_bytes(call.body[:1000])
    seen: list[int] = []
    assert call(progress=lambda done, total: seen.append(done)).read_bytes() == call.body
    assert server.ranges == ["bytes=1000-"]
    assert seen[0] > 1000
    assert call.files() == ["data.bin"]


def test_a_server_without_ranges_sends_it_all(call: Any, server: Any) -> None:
    call.part().write_bytes(call.body[:1000])
    assert call().read_bytes() == call.body
    assert server.ranges == ["bytes=1000-"]
    assert call.delays == []


@pytest.mark.parametrize("content_range", ["bytes 0-511999/512000", "bytes 2000-511999/512000", "", "nonsense"])
def test_a_range_that_was_not_asked_for_is_not_used(call: Any, server: Any, content_range: str) -> None:
    server.answers = [lambda request: request.reply(206, call.body, Content_Range=content_range), server.whole]
    call.part().write_bytes(call.body[:1000])
    assert call().read_bytes() == call.body
    assert server.ranges == ["bytes=1000-", None]


def test_a_refused_range_starts_again(call: Any, server: Any) -> None:
    server.answers = [server.status(416), server.whole]
    call.part().write_bytes(call.body[:1000])
    assert call().read_bytes() == call.body
    assert server.ranges == ["bytes=1000-", None]
    assert call.delays == [0.0]


def test_a_whole_part_needs_no_request(call: Any, server: Any) -> None:
    call.part().write_bytes(call.body)
    assert call().read_bytes() == call.body
    assert server.ranges == []


def test_a_part_that_is_too_long_starts_again(call: Any, server: Any) -> None:
    call.part().write_bytes(call.body + b"x")
    assert call().read_bytes() == call.body
    assert server.ranges == [None]


def test_a_damaged_part_is_noticed_and_fetched_anew(call: Any, server: Any) -> None:
    server.answers = [server.ranged]
    call.part().write_bytes(bytes(1000))
    assert call().read_bytes() == call.body
    assert server.ranges == ["bytes=1000-", None]


@pytest.mark.parametrize("damage", [lambda body: body[:-1], lambda body: b"\1" + body[1:], lambda body: b""])
def test_a_damaged_file_in_the_cache_is_fetched_anew(call: Any, server: Any, damage: Callable[[bytes], bytes]) -> None:
    path = call()
    path.write_bytes(damage(call.body))
    assert call() == path
    assert path.read_bytes() == call.body
    assert len(server.ranges) == 2


@pytest.mark.parametrize("code", [500, 502, 503, 429, 408])
def test_a_passing_trouble_is_waited_out(call: Any, server: Any, code: int) -> None:
    server.answers = [server.status(code), server.status(code), server.whole]
    assert call().read_bytes() == call.body
    assert len(call.delays) == 2


def test_the_server_may_say_when(call: Any, server: Any) -> None:
    server.answers = [server.status(503, Retry_After="7"), server.status(429, Retry_After="99999"), server.whole]
    call()
    assert call.delays == [7.0, download.LONGEST_DELAY]


def test_delays_double_with_jitter(call: Any, server: Any) -> None:
    server.answers = [server.status(500)]
    with pytest.raises(UnavailableError, match=r"not fetched in 6 attempts, .*the server answered 500") as caught:
        call()
    assert server.url in str(caught.value)
    assert caught.value.exit_code == 69
    assert len(server.ranges) == download.ATTEMPTS == len(call.delays) + 1
    for number, delay in enumerate(call.delays):
        assert 0.5 * 2**number <= delay <= 1.5 * 2**number
    assert len({delay / 2**number for number, delay in enumerate(call.delays)}) > 1
    assert call.files() == []


def test_what_arrived_is_kept_for_the_next_command(call: Any, server: Any) -> None:
    server.answers = [server.half, server.status(500)]
    with pytest.raises(UnavailableError, match="run the command again to continue"):
        call()
    assert call.files() == ["data.bin.part"]
    server.answers = [server.ranged]
    assert call().read_bytes() == call.body
    assert server.ranges[-1] == f"bytes={len(call.body) // 2}-"


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 304])
def test_a_wrong_address_is_not_tried_again(call: Any, server: Any, code: int) -> None:
    server.answers = [server.status(code)]
    with pytest.raises(InputError, match=rf"{server.url}: the server answered {code}; check the url") as caught:
        call()
    assert caught.value.exit_code == 65
    assert len(server.ranges) == 1
    assert call.files() == []


def test_a_wrong_digest(call: Any, server: Any) -> None:
    other = bytes([1]) + call.body[1:]
    server.answers = [server.sends(other)]
    with pytest.raises(InputError) as caught:
        call()
    for part in (server.url, call.resource.sha256, hashlib.sha256(other).hexdigest()):
        assert part in str(caught.value)
    assert call.files() == []
    assert len(server.ranges) == 1


@pytest.mark.parametrize("length", [0, 511_999, 512_001, 1_024_000])
@pytest.mark.parametrize("announced", [True, False])
def test_a_wrong_length(call: Any, server: Any, length: int, announced: bool) -> None:
    body = (call.body * 2)[:length]
    server.answers = [server.sends(body) if announced else server.chunked(body)]
    with pytest.raises(InputError, match=rf"expected {len(call.body)} bytes, found (at least )?\d+; the file at this"):
        call()
    assert call.files() == []
    assert len(server.ranges) == 1


def test_a_wrong_length_of_the_rest(call: Any, server: Any) -> None:
    server.answers = [lambda request: request.reply(206, call.body[1000:], Content_Range="bytes 1000-511999/600000")]
    call.part().write_bytes(call.body[:1000])
    with pytest.raises(InputError, match="found 600000"):
        call()
    assert call.files() == []


def test_a_body_of_unknown_length_that_ends_early_is_tried_again(call: Any, server: Any) -> None:
    server.answers = [server.sends(call.body[: len(call.body) // 2], Content_Length=""), server.ranged]
    assert call().read_bytes() == call.body
    assert server.ranges == [None, f"bytes={len(call.body) // 2}-"]


def test_nobody_listens(call: Any, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: a connection is refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/data.bin"
        with pytest.raises(UnavailableError, match="point JAXLM_MIRROR at a directory"):
            call(Resource("data.bin", url, 5, "0" * 64))
    assert len(call.delays) == download.ATTEMPTS - 1


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/a", "data.bin", "http://", "http://[::1", ""])
def test_an_address_that_is_none(call: Any, url: str) -> None:
    with pytest.raises(InputError, match="check the url"):
        call(Resource("data.bin", url, 5, "0" * 64))
    assert call.delays == []


def test_a_circle_of_redirects(call: Any, server: Any) -> None:
    server.answers = [server.status(302, Location="/again")]
    with pytest.raises(InputError, match="check the url"):
        call(client=None)


class TestMirrors:
    def test_any_depth_and_any_name(self, call: Any, server: Any, tmp_path: Path) -> None:
        mirror = tmp_path / "mirror"
        (mirror / "a" / "b").mkdir(parents=True)
        (mirror / "data.bin").write_bytes(bytes([1]) + call.body[1:])  # the right name and size, another digest
        (mirror / "a" / "b" / "blob").write_bytes(call.body)
        path = call(mirrors=[tmp_path, mirror])
        assert path.read_bytes() == call.body
        assert path.name == "data.bin"
        assert call.files() == ["data.bin"]
        assert server.ranges == []

    def test_named_by_the_environment(
        self, call: Any, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, content in (("one", b"other"), ("two", call.body)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "x").write_bytes(content)
        monkeypatch.setenv("JAXLM_MIRROR", f"{tmp_path / 'one'}{os.pathsep}{tmp_path / 'two'}")
        monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "ca che-数"))
        path = call(cache_dir=None)
        assert path.is_relative_to(tmp_path / "ca che-数")
        assert path.read_bytes() == call.body
        assert server.ranges == []

    def test_without_the_file_the_network_is_asked(self, call: Any, server: Any, tmp_path: Path) -> None:
        (tmp_path / "mirror").mkdir()
        assert call(mirrors=[tmp_path / "mirror"]).read_bytes() == call.body
        assert server.ranges == [None]

    def test_a_directory_that_is_not_there(self, call: Any, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"the mirror .*/missing is not a directory"):
            call(mirrors=[tmp_path / "missing"])

    def test_the_cache_comes_first(self, call: Any, tmp_path: Path) -> None:
        call()
        call(mirrors=[tmp_path / "missing"])


def test_a_cache_that_cannot_be_made(call: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError, match="set JAXLM_CACHE"):
        call(cache_dir=tmp_path / "file")


def test_a_name_cannot_leave_the_cache(call: Any) -> None:
    path = call(Resource("../../../evil", call.server.url, len(call.body), call.resource.sha256))
    assert path.parent.parent == call.cache
    assert path.name == "evil"
