"""A web of one local server, for `camelid.image_fetch`: every name and address leads to it.

The production checks stay whole: a name resolves to the addresses a test gives it, they are checked
as ever, and only the last step, the connection to a checked address, ends up here.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from camelid.image_fetch import ImageFetcher

CERTIFICATE = Path(__file__).parent / "data" / "tls" / "images.example.pem"  # until 2100
PUBLIC = "93.184.215.14"

Answer = bytes | Callable[[socket.socket], None]


def ok(body: bytes, *headers: str) -> bytes:
    """Return a whole answer of status 200."""
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def moved(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Moved\r\nLocation: {location}\r\n\r\n".encode()


class FakeWeb:
    """Answers by path; with `tls`, it speaks TLS where it is connected to at port 443."""

    def __init__(self, answers: dict[str, Answer], *, tls: bool = False) -> None:
        self.answers = answers
        self.names: dict[str, list[str]] = {}  # host -> addresses; others are PUBLIC
        self.requests: list[bytes] = []
        self.connections: list[tuple[str, int]] = []  # addresses that were connected to
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) if tls else None
        if self._tls is not None:
            self._tls.load_cert_chain(CERTIFICATE)
        self._server = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()

    def fetcher(self, **options: Any) -> ImageFetcher:
        options = {"resolver": self.resolve, "connector": self.connect, "seconds": 20.0} | options
        return ImageFetcher(**options)

    def trusting(self) -> ssl.SSLContext:
        """Return a client's context that trusts this server's certificate alone."""
        return ssl.create_default_context(cafile=str(CERTIFICATE))

    def resolve(self, host: str, port: int) -> list[str]:
        return self.names.get(host, [PUBLIC])

    def connect(self, address: str, port: int, seconds: float) -> socket.socket:
        self.connections.append((address, port))
        client = socket.create_connection(self._server.getsockname(), timeout=seconds)
        conn, _ = self._server.accept()
        thread = threading.Thread(target=self._serve, args=(conn, port), daemon=True)
        self._threads.append(thread)
        thread.start()
        return client

    def wait(self) -> bool:
        """Wait a little; False once the test is over."""
        return not self._stopping.wait(0.01)

    def _serve(self, conn: socket.socket, port: int) -> None:
        conn.settimeout(20)
        try:
            if self._tls is not None and port == 443:
                conn = self._tls.wrap_socket(conn, server_side=True)
            with conn:
                request = b""
                while not request.endswith(b"\r\n\r\n"):
                    if not (piece := conn.recv(65536)):
                        return
                    request += piece
                self.requests.append(request)
                answer = self.answers.get(request.split()[1].decode(), b"")
                if callable(answer):
                    answer(conn)
                else:
                    conn.sendall(answer)
        except OSError:
            conn.close()  # the client has heard enough

    def __enter__(self) -> FakeWeb:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._server.close()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
