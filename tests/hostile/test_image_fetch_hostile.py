"""URLs and servers that mean harm: each gives an Error, in time, and no forbidden connection."""

from __future__ import annotations

import gzip
import socket
import ssl
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camelid import image_fetch
from camelid.errors import Cancelled, Error, InvalidRequest, Unsupported
from camelid.image_fetch import MAX_FETCHES, FetchSession, ImageFetcher
from fake_web import PUBLIC, Answer, FakeWeb, moved, ok

SHORT = 0.3  # seconds, for fetches that are to run out of them
LATEST = 5.0  # seconds, in which such a fetch must be over even on a busy machine


def refused(web: FakeWeb, url: str, says: str, **options: Any) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        web.fetcher(**options).fetch(url)
    message = str(caught.value)
    assert message.startswith("[image] ")
    assert len(message) < 500


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://user:secret@images.example/", "credentials"),
        ("http://user@images.example/", "credentials"),
        ("http://@images.example/", "credentials"),
        ("http://images.example:8080/", "port 8080"),
        ("http://images.example:22/", "port 22"),
        ("https://images.example:6379/", "port 6379"),
        ("http://images.example:99999/", "malformed"),
        ("http://images.example:x/", "malformed"),
        ("http://[::1/", "malformed"),
        ("http:///path", "names no host"),
        ("http://", "names no host"),
        ("http:path", "names no host"),
        ("ftp://images.example/", "other than http"),
        ("file:///etc/passwd", "other than http"),
        ("gopher://images.example/", "other than http"),
        ("http://" + "a" * 64 + ".example/", "malformed"),
        ("http://a..b/", "malformed"),
        ("http://images.example/" + "a" * 9000, "9022 characters"),
        ("http://images.example /", "cannot be fetched|malformed"),
        ("http://images\x00.example/", "cannot be fetched|malformed"),
    ],
)
def test_urls_that_are_not_fetched(url: str, says: str) -> None:
    with FakeWeb({}) as web:
        refused(web, url, says)
        assert web.requests == []


@pytest.mark.parametrize("path", ["/a\r\nX-Injected: 1", "/a\nHost: b", "/a b", "/\x00", "/\ud800"])
def test_a_path_cannot_add_to_the_request(path: str) -> None:
    with FakeWeb({}) as web:
        with pytest.raises(Error):
            web.fetcher(seconds=SHORT).fetch("http://images.example" + path)
        for request in web.requests:
            assert b"Injected: 1\r\n" not in request
            assert request.count(b"\nHost:") == 1


INSIDE = [
    "127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "0.0.0.0", "::1", "fe80::1",
    "::ffff:10.0.0.1", "64:ff9b::10.0.0.1", "2002:a00:1::1", "fd00::1", "224.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("address", INSIDE)
def test_one_private_address_refuses_a_host(address: str) -> None:
    with FakeWeb({"/": ok(b"secret"), "/to": moved("http://inside.example/")}) as web:
        for addresses in ([address], [PUBLIC, address], [address, PUBLIC]):
            web.names["inside.example"] = addresses
            with pytest.raises(InvalidRequest, match="not public") as caught:
                web.fetcher().fetch("http://inside.example/")
            assert address not in str(caught.value)
        assert web.connections == []
        refused(web, "http://images.example/to", "not public")
        assert web.connections == [(PUBLIC, 80)]
        web.names["inside.example"] = []
        refused(web, "http://inside.example/", "not public")


def test_a_name_that_changes_its_mind_changes_nothing() -> None:
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    with FakeWeb({"/": ok(b"x")}) as web:
        fetcher = web.fetcher(resolver=lambda host, port: next(answers))
        assert fetcher.fetch("http://rebound.example/") == b"x"
        assert web.connections == [(PUBLIC, 80)]
        refused(web, "http://rebound.example/", "not public", resolver=lambda *a: next(answers))


def test_redirects_lead_nowhere_else() -> None:
    answers: dict[str, Answer] = {
        "/loop": moved("/loop"),
        "/file": moved("file:///etc/passwd"),
        "/port": moved("http://images.example:8080/"),
        "/credentials": moved("http://a:b@images.example/"),
        "/plain": moved("http://images.example/"),
        "/bare": b"HTTP/1.1 302 Moved\r\n\r\n",
        "/bad": moved("http://[/"),
    }
    with FakeWeb(answers, tls=True) as web:
        base = "http://images.example"
        refused(web, f"{base}/loop", "redirects")
        refused(web, f"{base}/file", "other than http")
        refused(web, f"{base}/port", "port 8080")
        refused(web, f"{base}/credentials", "credentials")
        refused(web, f"{base}/bare", "status 302")
        refused(web, f"{base}/bad", "malformed|cannot be fetched")
        refused(web, "https://images.example/plain", "no longer https", tls=web.trusting())


def test_who_cannot_prove_the_name_is_not_heard() -> None:
    with FakeWeb({"/": ok(b"x")}, tls=True) as web:
        refused(web, "https://images.example/", "CERTIFICATE_VERIFY_FAILED")
        refused(web, "https://other.example/", "not valid for 'other", tls=web.trusting())
        assert web.requests == []
    with FakeWeb({"/": ok(b"x")}) as web:  # no TLS at all behind port 443
        refused(web, "https://images.example/", "cannot be fetched|seconds", seconds=SHORT)
    assert ImageFetcher()._tls.verify_mode == ssl.CERT_REQUIRED
    assert ImageFetcher()._tls.check_hostname


def flood(conn: socket.socket) -> None:
    conn.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        conn.sendall(bytes(1 << 16))


def chunked_flood(conn: socket.socket) -> None:
    conn.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        conn.sendall(b"10000\r\n" + bytes(1 << 16) + b"\r\n")


@pytest.mark.parametrize(
    "answer",
    [
        flood,
        chunked_flood,
        b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n",
        ok(bytes(1_000_001)),
    ],
)
def test_the_limit_of_bytes_holds_whatever_is_announced(
    answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_fetch, "MAX_BYTES", 1_000_000)
    with FakeWeb({"/": answer, "/fits": ok(bytes(1_000_000))}) as web:
        refused(web, "http://images.example/", "more than 1000000 bytes")
        assert len(web.fetcher().fetch("http://images.example/fits")) == 1_000_000


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "br", "gzip, identity", "x"])
def test_compressed_bodies_are_refused(encoding: str) -> None:
    body = gzip.compress(bytes(1 << 20))
    answers: dict[str, Answer] = {
        "/": ok(body, f"Content-Encoding: {encoding}"),
        "/identity": ok(b"x", "Content-Encoding: Identity"),
    }
    with FakeWeb(answers) as web:
        with pytest.raises(Unsupported, match="Content-Encoding"):
            web.fetcher().fetch("http://images.example/")
        assert web.fetcher().fetch("http://images.example/identity") == b"x"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "cannot be fetched"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "status 404"),
        (b"HTTP/1.1 206 Partial\r\nContent-Length: 1\r\n\r\nx", "status 206"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "cannot be fetched"),
        (b"\x00" * 70_000, "cannot be fetched"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n", "cannot be fetched"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70_000 + b"\r\n\r\n", "cannot be fetched"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", "4 bytes too early"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "cannot be fetched"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nshort", "cannot be fetched"),
    ],
    ids=range(10),
)
def test_answers_that_are_none(answer: bytes, says: str) -> None:
    with FakeWeb({"/": answer}) as web:
        refused(web, "http://images.example/", says)


def drip_after(web: FakeWeb, beginning: bytes, drop: bytes = b"x") -> Answer:
    def drip(conn: socket.socket) -> None:
        conn.sendall(beginning)
        while web.wait():  # never longer silent than a socket's timeout would notice
            conn.sendall(drop)

    return drip


@pytest.mark.parametrize(
    ("beginning", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        (b"HT", b"T"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n"),
    ],
    ids=range(6),
)
def test_slow_drips_end_at_the_deadline(beginning: bytes, drop: bytes) -> None:
    with FakeWeb({}) as web:
        web.answers["/"] = drip_after(web, beginning, drop)
        started = time.monotonic()
        refused(web, "http://images.example/", "took more than 0.3 seconds", seconds=SHORT)
        assert time.monotonic() - started < LATEST


def test_silence_ends_at_the_deadline_wherever_it_falls() -> None:
    def silent(conn: socket.socket) -> None:
        while web.wait():
            pass

    def hanging_connector(address: str, port: int, seconds: float) -> socket.socket:
        time.sleep(seconds)
        raise TimeoutError

    over = threading.Event()

    def hanging_resolver(host: str, port: int) -> list[str]:
        over.wait(LATEST)
        return [PUBLIC]

    url = "http://images.example/"
    with FakeWeb({"/": silent}) as web:
        for options in ({}, {"connector": hanging_connector}, {"resolver": hanging_resolver}):
            started = time.monotonic()
            refused(web, url, "took more than 0.3 seconds", seconds=SHORT, **options)
            assert time.monotonic() - started < LATEST
        over.set()


def test_redirects_share_the_seconds() -> None:
    def slow(host: str, port: int) -> list[str]:
        time.sleep(SHORT / 2)
        return [PUBLIC]

    with FakeWeb({"/": moved("/")}) as web:
        refused(web, "http://images.example/", "took more", seconds=SHORT, resolver=slow)
        assert len(web.requests) < 3


def test_a_handshake_that_never_ends_does() -> None:
    def connector(address: str, port: int, seconds: float) -> socket.socket:
        client, server = socket.socketpair()
        sockets.append(server)
        return client

    sockets: list[socket.socket] = []
    fetcher = ImageFetcher(resolver=lambda *a: [PUBLIC], connector=connector, seconds=SHORT)
    with pytest.raises(InvalidRequest, match="took more than"):
        fetcher.fetch("https://images.example/")
    for sock in sockets:
        sock.close()


def test_names_that_hang_are_limited_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_fetch, "_LOOKUPS", threading.BoundedSemaphore(1))
    over = threading.Event()
    started = []

    def hanging(host: str, port: int) -> list[str]:
        started.append(host)
        over.wait(LATEST)
        return [PUBLIC]

    with FakeWeb({"/": ok(b"x")}) as web:
        for _ in range(3):
            refused(web, "http://a.example/", "took more", seconds=SHORT, resolver=hanging)
        assert len(started) == 1
        over.set()
        assert web.fetcher().fetch("http://a.example/") == b"x"


def test_one_call_fetches_so_many_images_and_no_more() -> None:
    with FakeWeb({f"/{n}": ok(b"x") for n in range(MAX_FETCHES)}) as web:
        session = FetchSession(web.fetcher(), lambda: None)
        for n in range(MAX_FETCHES):
            assert session.fetch(f"http://images.example/{n}") == b"x"
        with pytest.raises(InvalidRequest, match="one image more than the 16 fetched in one call"):
            session.fetch("http://images.example/0")
        assert len(web.requests) == MAX_FETCHES


def test_the_images_of_one_call_share_their_seconds() -> None:
    with FakeWeb({"/quick": ok(b"x")}) as web:
        web.answers["/"] = drip_after(web, b"HTTP/1.1 200 OK\r\n\r\n")
        session = FetchSession(web.fetcher(seconds=SHORT), lambda: None, seconds=1.5 * SHORT)
        started = time.monotonic()
        with pytest.raises(InvalidRequest, match=r" took more than 0\.3 seconds"):
            session.fetch("http://images.example/")
        for url in ("http://images.example/", "http://images.example/quick"):
            with pytest.raises(InvalidRequest, match=r"before it took more than 0\.45 seconds"):
                session.fetch(url)
        assert time.monotonic() - started < LATEST


def test_time_between_fetches_is_not_counted() -> None:
    with FakeWeb({"/": ok(b"x")}) as web:
        session = FetchSession(web.fetcher(), lambda: None, seconds=LATEST)
        session._left = SHORT
        assert session.fetch("http://images.example/") == b"x"
        assert 0 < session._left < SHORT


@pytest.mark.parametrize("hangs", ["server", "resolver"])
def test_a_fetch_ends_when_nobody_wants_it(hangs: str) -> None:
    over = threading.Event()
    looks = []

    def check() -> None:
        looks.append(1)
        if len(looks) > 6:
            raise Cancelled("[llm] not wanted")

    def hanging_resolver(host: str, port: int) -> list[str]:
        over.wait(LATEST)
        return [PUBLIC]

    def silent(conn: socket.socket) -> None:
        while web.wait():
            pass

    with FakeWeb({"/": silent}) as web:
        options = {"resolver": hanging_resolver} if hangs == "resolver" else {}
        session = FetchSession(web.fetcher(**options), check)
        started = time.monotonic()
        with pytest.raises(Cancelled, match="not wanted"):
            session.fetch("http://images.example/")
        assert time.monotonic() - started < LATEST
        over.set()


def test_failures_of_the_network_are_errors() -> None:
    def failing(*args: Any) -> Any:
        raise OSError("network is unreachable")

    with FakeWeb({}) as web:
        refused(web, "http://a.example/", "network is unreachable", resolver=failing)
        refused(web, "http://a.example/", "network is unreachable", connector=failing)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40), st.sampled_from(["http://", "https://", "http://images.example/", ""]))
def test_any_url_gives_bytes_or_an_error(text: str, start: str) -> None:
    def failing(address: str, port: int, seconds: float) -> socket.socket:
        raise OSError("nobody there")

    fetcher = ImageFetcher(resolver=lambda *args: [PUBLIC], connector=failing, tls=TLS)
    with pytest.raises(Error):
        fetcher.fetch(start + text)


TLS = ssl.create_default_context()
