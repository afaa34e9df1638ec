"""What is fetched, from where, and which addresses are public."""

from __future__ import annotations

import socket

import pytest

from camelid import image_fetch
from camelid.errors import InvalidRequest
from camelid.image_fetch import ImageFetcher, is_public, resolve
from fake_web import PUBLIC, FakeWeb, moved, ok


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", PUBLIC, "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::8.8.8.8",
     "::ffff:8.8.8.8"],
)  # fmt: skip
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1",
        "172.31.255.255", "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.127.255.255",
        "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1",
        "239.1.1.1", "240.0.0.1", "255.255.255.255", "168.63.129.16",
        "::", "::1", "::127.0.0.1", "::8.8.8.8", "fc00::1", "fd00:ec2::254", "fe80::1",
        "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1", "2001:db8::1", "100::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:100.64.0.1",
        "64:ff9b::127.0.0.1", "64:ff9b::192.168.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1",
        "2002:7f00:1::1", "2002:808:808::1", "2001:0:808:808::1",
        "", "localhost", "8.8.8", "1e3", "8.8.8.8:80",
    ],
)  # fmt: skip
def test_everything_else_is_not_public(address: str) -> None:
    assert not is_public(address)


def test_an_image_is_fetched_from_the_address_that_was_checked() -> None:
    with FakeWeb({"/a/b%20c.png?w=1&h=%C3%A9": ok(b"bytes")}) as web:
        url = "HTTP://Images.Example/a/b c.png?w=1&h=é#part"
        assert web.fetcher().fetch(url) == b"bytes"
        assert web.connections == [(PUBLIC, 80)]
        lines = web.requests[0].split(b"\r\n")
        assert b"Host: images.example" in lines
        assert b"Accept-Encoding: identity" in lines
        assert not [line for line in lines if line.lower().startswith((b"cookie", b"auth"))]


def test_https_names_and_answers_of_unknown_length_are_fetched() -> None:
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    )
    endless = b"HTTP/1.0 200 OK\r\n\r\nuntil the end"
    with FakeWeb({"/chunked": chunked, "/endless": endless}, tls=True) as web:
        fetcher = web.fetcher(tls=web.trusting())
        assert fetcher.fetch("https://images.example/chunked") == b"abcde"
        assert fetcher.fetch("http://images.example/endless") == b"until the end"
        assert fetcher.fetch("https://images.example:443/endless") == b"until the end"
        assert web.connections == [(PUBLIC, 443), (PUBLIC, 80), (PUBLIC, 443)]


def test_redirects_are_followed_three_times() -> None:
    answers = {"/0": ok(b"there"), "/1": moved("0"), "/2": moved("http://other.example/1", 307)}
    answers |= {"/3": moved("//third.example/2", 308), "/4": moved("/3")}
    with FakeWeb(answers) as web:
        fetcher = web.fetcher()
        assert fetcher.fetch("http://images.example/3") == b"there"
        hosts = [request.split(b"Host: ")[1].split(b"\r\n")[0] for request in web.requests]
        assert hosts == [b"images.example", b"third.example", b"other.example", b"other.example"]
        with pytest.raises(InvalidRequest, match="more than 3 redirects"):
            fetcher.fetch("http://images.example/4")


def test_international_names_are_looked_up_as_the_network_knows_them() -> None:
    with FakeWeb({"/": ok(b"x")}) as web:
        assert web.fetcher().fetch("http://bücher.example") == b"x"
        assert b"Host: xn--bcher-kva.example\r\n" in web.requests[0]


def test_an_address_that_cannot_be_reached_gives_way_to_the_next() -> None:
    with FakeWeb({"/": ok(b"x")}) as web:
        web.names["images.example"] = ["2606:2800:21f::1", PUBLIC]
        tried = []

        def connector(address: str, port: int, seconds: float) -> object:
            tried.append((address, seconds))
            if ":" in address:
                raise OSError("no route to host")
            return web.connect(address, port, seconds)

        assert web.fetcher(connector=connector).fetch("http://images.example/") == b"x"
        assert [address for address, _ in tried] == ["2606:2800:21f::1", PUBLIC]
        assert tried[0][1] <= 10.0  # half of the time: the other address has a chance


def test_real_names_of_this_machine_are_refused_before_a_connection() -> None:
    assert resolve("127.0.0.1", 80) == ["127.0.0.1"]
    fetcher = ImageFetcher(connector=lambda *args: pytest.fail("connected"))
    for host in ("127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "0"):
        with pytest.raises(InvalidRequest, match=r"not public|cannot be fetched"):
            fetcher.fetch(f"http://{host}/")


def test_the_real_connector_goes_to_an_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address, port = server.getsockname()
        with image_fetch.connect(address, port, 5.0) as client:
            assert client.getpeername() == (address, port)
