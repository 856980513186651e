"""A picture from a URL of somebody else's list, without letting that list reach into the network
that this runs in. Volcano (arXiv 2311.07362) reads pictures by URL; docs/studies/volcano.md,
section 5.10, says what its download lacks.

    path = fetch("https://c6.staticflickr.com/2/1333/965561501_0b7e9aed90_o.jpg",
    "data/mmhal/downloads")

http and https only, certificates verified, no user name in the URL. Each name is resolved once per
hop, every address it has must be public, and the connection goes to an address that was checked;
the same after each redirect. Limits on bytes and on the whole time. What does not decode as a
picture is not kept. Proxies are NOT used, whatever http_proxy says: a proxy would resolve the name
again. Behind one, download by other means and give local paths.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import os
import re
import socket
import ssl
import threading
import time
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from PIL import Image

from vlmdiag.cli import UsageError
from vlmdiag.pictures.samples import load_image
from vlmdiag.runs import disk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _typeshed import WriteableBuffer

    # (family, kind, protocol, canonical name, place) of getaddrinfo
    Address = tuple[Any, Any, int, str, Any]

MAX_REDIRECTS = 5
# no format whose reader starts another program, such as EPS
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
REDIRECTS = (301, 302, 303, 307, 308)
# what stays as it is in a path and in a query; all else is percent-encoded
SAFE_IN_PATH = "/%:@!$&'()*+,;=~-._"
SAFE_IN_QUERY = "/%:@!$&()*+,;=~-._?"
HEADERS = {"User-Agent": "vlm-diagnostics", "Accept": "image/*", "Connection": "close"}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_PROTOCOL = ipaddress.ip_network("192.0.0.0/24")  # private as a whole only from Python 3.11.9 on


class DownloadError(OSError):
    """Why there is no picture: one line that names the URL."""


def picture_of(
    source: str,
    root: str | Path,
    cache: str | Path,
    timeout: float = 20,
    max_bytes: int = 50_000_000,
    allow_private: bool = False,
) -> Path:
    """Path of a picture given as a path, relative to root, or as a URL: that of a file with its
    last component in root, else that of fetch().

    DownloadError for other schemes, file: among them, and for what fetch refuses; whether a local
    file exists is left to load_image.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", source)
    if not scheme:
        return Path(root) / source
    if not _is_web(source):
        raise DownloadError(
            f"{_shown(source)}: {scheme[1]}: is not read; a path, http:// or https:// was wanted"
        )
    name = os.path.basename(unquote(_parsed(source).path))
    if name and (Path(root) / name).is_file():
        return Path(root) / name
    return fetch(source, cache, timeout, max_bytes, allow_private)


def fetch(
    url: str,
    folder: str | Path,
    timeout: float = 20,
    max_bytes: int = 50_000_000,
    allow_private: bool = False,
) -> Path:
    """Path of the picture at url, kept in folder as <hash of the URL>-<end of its name>; what is
    there already is used without network.

    timeout: seconds for everything, redirects included. allow_private: addresses of this machine
    and of private networks too. DownloadError says why not.
    """
    parts = _parsed(url)
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", os.path.basename(unquote(parts.path)))
    tail = name[-60:].lstrip(".") or "picture"
    path = Path(folder) / f"{sha256(url.encode()).hexdigest()[:16]}-{tail}"
    if path.is_file():
        return path
    try:
        data = _download(url, time.monotonic() + timeout, max_bytes, allow_private)
    except DownloadError as error:
        raise DownloadError(f"{_shown(url)}: {error}") from error
    except TimeoutError as error:
        raise DownloadError(
            f"{_shown(url)}: timed out, {timeout:g} s in all are allowed"
        ) from error
    except ssl.SSLCertVerificationError as error:
        raise DownloadError(
            f"{_shown(url)}: the certificate is not trusted ({error.verify_message})"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DownloadError(f"{_shown(url)}: {reason}") from error
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.verify()
        # a file that was cut short passes verify()
        load_image(io.BytesIO(data))
    except Exception as error:
        # whatever a decoder makes of such bytes
        raise DownloadError(
            f"{_shown(url)}: not a picture ({', '.join(FORMATS)}), or a damaged one"
        ) from error
    _keep(path, data)
    return path


def _keep(path: Path, data: bytes) -> None:
    """Write a file in one step, with its folder."""
    try:
        disk.write_bytes(path, data)
    except UsageError as error:
        raise DownloadError(f"{path} cannot be written ({error})") from error


# ---- URLs and addresses ----


def _is_web(url: str) -> bool:
    return re.match(r"https?://", url, re.IGNORECASE) is not None


def _shown(url: str) -> str:
    """A URL in messages: one line, without password."""
    one_line = re.sub(r"[\x00-\x20\x7f]+", " ", url)
    return re.sub(r"//[^/?#]*@", "//...@", one_line)[:300]


def _parsed(url: str) -> SplitResult:
    """urlsplit of a URL that may be fetched; DownloadError says what is wrong with another."""
    try:
        if not _is_web(url):
            raise ValueError("http:// or https:// was wanted")
        if re.search(r"[\x00-\x20\x7f\\]", url):
            raise ValueError("a space, control character or backslash in it")
        parts = urlsplit(url)
        if "@" in parts.netloc:
            raise ValueError("a user name or password in it")
        if not parts.hostname or parts.port == 0:
            raise ValueError("no host, or port 0")
        parts.hostname.encode("idna")
    except ValueError as error:
        # UnicodeError, ports and brackets that urlsplit refuses among them
        raise DownloadError(f"{_shown(url)}: not a URL to download from ({error})") from error
    return parts


def private_reason(address: str) -> str | None:
    """Why an IP address is not reached without allow_private, None for a public one. IPv4 inside
    IPv6 (mapped, NAT64, 6to4) counts as what it holds."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        held = ip.ipv4_mapped or ip.sixtofour
        if held is None and ip in _NAT64:
            held = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if held is not None:
            return private_reason(str(held))
    elif ip in _PROTOCOL:
        return f"{ip}, address of kind private"
    kinds = (
        "unspecified",
        "loopback",
        "link_local",
        "site_local",
        "multicast",
        "private",
        "reserved",
    )
    for kind in kinds:
        if getattr(ip, f"is_{kind}", False):
            return f"{ip}, address of kind {kind.replace('_', '-')}"
    return None if ip.is_global else f"{ip}, address of kind non-public"


def _resolved(host: str, port: int, allow_private: bool, deadline: float) -> Sequence[Address]:
    """What getaddrinfo says, once, after all its addresses were checked. In a thread, because it
    knows no time limit."""
    answers: list[Sequence[Address] | OSError] = []

    def ask() -> None:
        try:
            answers.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_left(deadline))
    if not answers:
        raise TimeoutError
    addresses = answers[0]
    if isinstance(addresses, OSError):
        raise DownloadError(f"{host} has no address ({addresses.strerror or addresses})")
    for *_, place in addresses:
        reason = None if allow_private else private_reason(place[0])
        if reason:
            raise DownloadError(f"refused, {host} is not on the public network ({reason})")
    return addresses


# ---- the connection ----


def _left(deadline: float) -> float:
    """Seconds left; TimeoutError where there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Timed(io.RawIOBase):
    """A connected socket as http.client uses it, each of whose calls has only the time that is left
    of the whole."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        self.sock.settimeout(_left(self.deadline))
        return self.sock.recv_into(buffer)

    def sendall(self, data: bytes) -> None:
        self.sock.settimeout(_left(self.deadline))
        self.sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        # one of its own: http.client closes the connection before it reads the body
        return io.BufferedReader(_Timed(self.sock, self.deadline))


def _connect(parts: SplitResult, addresses: Sequence[Address], deadline: float) -> socket.socket:
    """A socket connected to the first of the addresses that answers, with TLS for https."""
    for n, (family, kind, protocol, _, place) in enumerate(addresses):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(_left(deadline) / (len(addresses) - n))
            sock.connect(place)
            if parts.scheme == "https":
                sock.settimeout(_left(deadline))
                sock = ssl.create_default_context().wrap_socket(
                    sock, server_hostname=parts.hostname
                )
            return sock
        except OSError as error:
            sock.close()
            if isinstance(error, ssl.SSLError) or n + 1 == len(addresses):
                raise
    raise DownloadError(f"{parts.hostname} has no address")


def _download(url: str, deadline: float, max_bytes: int, allow_private: bool) -> bytes:
    """The bytes at a URL, after at most MAX_REDIRECTS redirects."""
    for _ in range(MAX_REDIRECTS + 1):
        parts = _parsed(url)
        is_secure = parts.scheme == "https"
        host = (parts.hostname or "").encode("idna").decode()
        port = parts.port or (443 if is_secure else 80)
        sock = _connect(parts, _resolved(host, port, allow_private, deadline), deadline)
        try:
            response = _asked(parts, host, port, sock, deadline)
            location = response.headers.get("Location")
            if response.status in REDIRECTS and location:
                url = urljoin(url, location)
                if is_secure and urlsplit(url).scheme == "http":
                    raise DownloadError("refused, a redirect from https to http")
                continue
            if response.status != 200:
                raise DownloadError(f"status {response.status} {response.reason}".strip())
            return _body(response, max_bytes)
        finally:
            sock.close()
    raise DownloadError(f"more than {MAX_REDIRECTS} redirects")


def _asked(
    parts: SplitResult, host: str, port: int, sock: socket.socket, deadline: float
) -> http.client.HTTPResponse:
    """The response to a GET over a connected socket; nothing else is connected to."""
    is_secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
    connection: Any = kind(host, port)
    connection.sock = _Timed(sock, deadline)
    connection.auto_open = 0
    target = quote(parts.path or "/", safe=SAFE_IN_PATH)
    if parts.query:
        target += f"?{quote(parts.query, safe=SAFE_IN_QUERY)}"
    connection.request("GET", target, headers=HEADERS)
    response: http.client.HTTPResponse = connection.getresponse()
    return response


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """All bytes of a response, whose length is checked as announced and as it comes."""
    announced = response.length
    if announced is not None and announced > max_bytes:
        raise DownloadError(f"too large, {announced} bytes where {max_bytes} are allowed")
    data = bytearray()
    while chunk := response.read(65536):
        data += chunk
        if len(data) > max_bytes:
            raise DownloadError(f"too large, more than {max_bytes} bytes")
    if announced is not None and len(data) < announced:
        raise DownloadError(f"cut short, {len(data)} of {announced} bytes came")
    return bytes(data)
