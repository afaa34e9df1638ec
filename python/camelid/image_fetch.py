"""Fetches images from http(s) URLs that strangers chose, and nothing that is not public.

Owns which addresses may be reached, and the limits on redirects, bytes, seconds and images. The
host's name is resolved once, every address is checked, and the connection goes to a checked one: a
name that changes its mind afterwards changes nothing. Proxies and credentials are never used. Must
never know images.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urljoin, urlsplit

from camelid.errors import Error, InvalidRequest, Unsupported
from camelid.image_files import MAX_BYTES
from camelid.json_file import shorten

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["MAX_FETCHES", "FetchSession", "ImageFetcher", "is_public"]

_SECONDS = 10.0  # for everything: names, connections, redirects and the last byte
MAX_FETCHES = 16  # images of one call: a conversation brings its own again with every turn
_CALL_SECONDS = 30.0  # for all of them together
_LOOK_SECONDS = 0.2  # how often who waits for a byte or a name looks whether to go on
_MAX_REDIRECTS = 3
_MAX_URL = 8192  # characters
# The schemes' own: an image may not be a way to talk to whatever listens elsewhere.
_PORTS = (80, 443)
_PIECE = 1 << 16  # bytes read at once
_REDIRECTS = (301, 302, 303, 307, 308)
_IN_URLS = "%/:=&?~#+!$,;'@()*[]"  # characters that stay as they are
# Lookups that may hang at once: they cannot be stopped, only left behind.
_LOOKUPS = threading.BoundedSemaphore(16)

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
# An IPv4 address stands in their last 32 bits: those of IPv6-only networks, and plain ones.
_EMBEDDING = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "::ffff:0:0/96")))
# Tunnels, which lead to whatever IPv4 address is written inside.
_TUNNELS = tuple(map(ipaddress.IPv6Network, ("2002::/16", "2001::/32")))
# Azure's metadata service: public by number, local by nature.
_LOCAL_BY_NATURE = ipaddress.IPv4Address("168.63.129.16")


def is_public(address: str) -> bool:
    """Say whether an address is one of the public internet, where no service of ours listens.

    Everything else is refused: private and shared networks, this machine, link-local metadata
    services, multicast, reserved ranges, and IPv6 forms that lead to such IPv4 addresses.
    """
    try:
        ip: _Address = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if any(ip in network for network in _EMBEDDING):
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip not in _GLOBAL_UNICAST or any(ip in network for network in _TUNNELS):
            return False
    return ip.is_global and not ip.is_multicast and ip != _LOCAL_BY_NATURE


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host; raises OSError. It may hang for as long as it likes."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def connect(address: str, port: int, seconds: float) -> socket.socket:
    """Open a connection to an address, which is no name; raises OSError."""
    return socket.create_connection((address, port), timeout=seconds)


@dataclass(frozen=True)
class _Target:
    """Where one request goes."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> _Target:
        """Read a URL, and refuse one that names more than a place."""
        try:
            parts = urlsplit(url)
            host = parts.hostname or ""
            port = parts.port or (443 if parts.scheme == "https" else 80)
            host = host if ":" in host else host.encode("idna").decode("ascii")
        except (ValueError, UnicodeError):
            raise _refusal(url, "is malformed") from None
        if parts.scheme not in ("http", "https"):
            raise _refusal(url, "leads to something other than http(s)")
        if parts.username is not None or parts.password is not None:
            raise _refusal(url, "holds credentials, which are not sent")
        if not host:
            raise _refusal(url, "names no host")
        if port not in _PORTS:
            raise _refusal(url, f"names port {port}, only {_PORTS[0]} and {_PORTS[1]} are used")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(parts.scheme, host, port, quote(path, safe=_IN_URLS))

    def headers(self) -> dict[str, str]:
        """Return the headers of the request."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        is_usual = self.port == (443 if self.scheme == "https" else 80)
        return {
            "Host": name if is_usual else f"{name}:{self.port}",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "User-Agent": "camelid",
        }


class ImageFetcher:
    """Fetches images; any thread may use it.

    The arguments stand in for the network in tests; none of them loosens what is checked.

    Args:
        seconds: For one image, whatever it takes the time.
        resolver: Returns the addresses of a host and port.
        connector: Opens a connection to an address and port within some seconds.
        tls: Whom to trust; None: whom the system trusts.
    """

    def __init__(
        self,
        *,
        seconds: float = _SECONDS,
        resolver: Callable[[str, int], Sequence[str]] = resolve,
        connector: Callable[[str, int, float], socket.socket] = connect,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._seconds = seconds
        self._resolver = resolver
        self._connector = connector
        self._tls = ssl.create_default_context() if tls is None else tls

    def deadline(self, check: Callable[[], object] | None = None) -> _Deadline:
        """Return the end of a fetch that begins now."""
        return _Deadline(self._seconds, f"took more than {self._seconds:g} seconds", check)

    def fetch(self, url: str, deadline: _Deadline | None = None) -> bytes:
        """Return what lies behind a URL.

        Raises:
            InvalidRequest: If it may not be fetched, cannot be, or is beyond a limit.
            Unsupported: If it comes compressed.
        """
        deadline = deadline or self.deadline()
        if len(url) > _MAX_URL:
            raise _refusal(url, f"has {len(url)} characters, expected at most {_MAX_URL}")
        try:
            for _ in range(_MAX_REDIRECTS + 1):
                target = _Target.parse(url)
                answer = self._get(target, deadline)
                if isinstance(answer, bytes):
                    return answer
                url = urljoin(url, answer)
                if target.scheme == "https" and not url.lower().startswith("https:"):
                    raise _refusal(url, "is where an https URL leads, and no longer https")
        except Error:
            raise
        except TimeoutError:
            raise _refusal(url, deadline.says) from None
        except (OSError, http.client.HTTPException, ValueError) as cause:
            if deadline.is_over():
                raise _refusal(url, deadline.says) from None
            raise _refusal(url, f"cannot be fetched: {shorten(cause)}") from cause
        raise _refusal(url, f"is behind more than {_MAX_REDIRECTS} redirects")

    def _get(self, target: _Target, deadline: _Deadline) -> bytes | str:
        """Return what a server answers: the image, or where else to look for it."""
        sock = self._open(target, deadline)
        try:
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.auto_open = 0  # never by itself, which would resolve the name again
            connection.sock = _TimedSocket(sock, deadline)
            connection.request("GET", target.path, headers=target.headers())
            response = connection.getresponse()
            location = response.getheader("Location")
            if response.status in _REDIRECTS and location:
                return location
            if response.status != 200:
                raise _refusal(target.host, f"answered with status {response.status}")
            return _read(response, target.host)
        finally:
            sock.close()

    def _open(self, target: _Target, deadline: _Deadline) -> socket.socket:
        """Connect to an address of the target's host, once all of them are known to be public."""
        addresses = self._resolve(target, deadline)
        if not addresses or not all(map(is_public, addresses)):
            # Which ones is nothing a stranger should learn.
            raise _refusal(target.host, "has an address that is not public")
        sock = self._connect(addresses, target.port, deadline)
        if target.scheme == "https":
            try:
                sock.settimeout(deadline.left())
                sock = self._tls.wrap_socket(sock, server_hostname=target.host)
            except BaseException:
                sock.close()
                raise
        return sock

    def _connect(self, addresses: Sequence[str], port: int, deadline: _Deadline) -> socket.socket:
        for n_left in range(len(addresses), 0, -1):
            try:
                # An address that swallows everything leaves the others their share of the time.
                return self._connector(addresses[-n_left], port, deadline.left() / n_left)
            except OSError as error:
                failure = error
        raise failure

    def _resolve(self, target: _Target, deadline: _Deadline) -> Sequence[str]:
        """Look a host up in a thread of its own, which alone can be left waiting."""
        answers: queue.SimpleQueue[Sequence[str] | Exception] = queue.SimpleQueue()

        def look_up() -> None:
            try:
                answers.put(self._resolver(target.host, target.port))
            except Exception as error:
                answers.put(error)
            finally:
                _LOOKUPS.release()

        if not _LOOKUPS.acquire(timeout=deadline.left()):
            raise TimeoutError
        threading.Thread(target=look_up, name="camelid-lookup", daemon=True).start()
        answer = None
        while answer is None:
            with contextlib.suppress(queue.Empty):
                answer = answers.get(timeout=deadline.next_look())
        if isinstance(answer, Exception):
            raise answer
        return answer


class FetchSession:
    """Fetches the images of one call, within limits for all of them together.

    Args:
        fetcher: Fetches each.
        check: Called while waiting, several times a second; what it raises ends the fetch.
    """

    def __init__(
        self,
        fetcher: ImageFetcher,
        check: Callable[[], object],
        *,
        seconds: float = _CALL_SECONDS,
    ) -> None:
        self._fetcher = fetcher
        self._check = check
        self._seconds = self._left = seconds
        self._n_fetches = 0

    def fetch(self, url: str) -> bytes:
        """Return what lies behind a URL, as `ImageFetcher.fetch` does.

        Raises:
            InvalidRequest: Also if this is one too many, or the others left it no time.
        """
        if self._n_fetches == MAX_FETCHES:
            raise _refusal(url, f"is one image more than the {MAX_FETCHES} fetched in one call")
        self._n_fetches += 1
        says = f"and the images before it took more than {self._seconds:g} seconds"
        started = time.monotonic()
        deadline = self._fetcher.deadline(self._check)
        deadline.shorten(self._left, says)
        try:
            return self._fetcher.fetch(url, deadline)
        finally:
            self._left -= time.monotonic() - started


class _Deadline:
    """A moment after which nothing may take any longer.

    Args:
        seconds: From now.
        says: What is said of a URL that is not there by then.
        check: Called whenever somebody asks for the time that is left.
    """

    def __init__(
        self, seconds: float, says: str, check: Callable[[], object] | None = None
    ) -> None:
        self._end = time.monotonic() + seconds
        self._check = check
        self.says = says

    def shorten(self, seconds: float, says: str) -> None:
        """Come earlier, if `seconds` from now is."""
        end = time.monotonic() + seconds
        if end < self._end:
            self._end, self.says = end, says

    def next_look(self) -> float:
        """Return the seconds to wait for before asking again; raises TimeoutError at the end."""
        return min(self.left(), _LOOK_SECONDS)

    def left(self) -> float:
        """Return the seconds left; raises TimeoutError when there are none."""
        if self._check is not None:
            self._check()
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def is_over(self) -> bool:
        """Say whether no time is left."""
        return time.monotonic() >= self._end


class _TimedSocket:
    """What http.client needs of a socket, where everything ends at a deadline.

    A timeout of a socket's own counts from each byte: who sends one a second is never late.
    """

    def __init__(self, sock: socket.socket, deadline: _Deadline) -> None:
        self._sock = sock
        self._deadline = deadline

    def sendall(self, data: Any) -> None:
        self._sock.settimeout(self._deadline.left())
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb", "http.client reads"
        return io.BufferedReader(_TimedReader(self._sock, self._deadline))

    def close(self) -> None:
        """Do nothing: http.client closes before it has read all, whoever opened closes."""


class _TimedReader(io.RawIOBase):
    def __init__(self, sock: socket.socket, deadline: _Deadline) -> None:
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while True:
            self._sock.settimeout(self._deadline.next_look())
            with contextlib.suppress(TimeoutError):
                return self._sock.recv_into(buffer)


def _read(response: http.client.HTTPResponse, host: str) -> bytes:
    encoding = response.getheader("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise Unsupported(
            f"[image] {shorten(host)} sent the image with Content-Encoding {shorten(encoding)}, "
            "only identity was asked for. Download the image, and send it as a data: URL."
        )
    if response.length is not None and response.length > MAX_BYTES:
        raise _too_large(host)
    data = bytearray()
    while piece := response.read(_PIECE):
        data += piece
        if len(data) > MAX_BYTES:
            raise _too_large(host)
    if response.length:
        raise _refusal(host, f"closed the connection {response.length} bytes too early")
    return bytes(data)


def _too_large(host: str) -> InvalidRequest:
    return _refusal(host, f"sent more than {MAX_BYTES} bytes")


def _refusal(url: str, what: str) -> InvalidRequest:
    return InvalidRequest(
        f"[image] {shorten(url)} {what}. Download the image, and send it as a data: URL."
    )
