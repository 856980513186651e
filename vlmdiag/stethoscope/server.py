"""What stands between the network and the page: which requests reach it, and what the answers say
to the browser.

Gradio leaves a page open to every website that the visitor has open as well: one whose name is
pointed at this machine (DNS rebinding), one that posts here, one that shows the page in a frame.
Here a request is for one of the page's own names, from the page itself, and for something that the
page needs; what is exported goes to the browser that asked for it; and wrong passwords cost time.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import re
import secrets
import socket
import time
from collections import OrderedDict
from collections.abc import Collection
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlmdiag.cli import UsageError
from vlmdiag.stethoscope.limits import LOGIN_DELAY, LOGIN_MINUTES
from vlmdiag.stethoscope.sessions import Sessions

if TYPE_CHECKING:
    from gradio.routes import App

COOKIE = "stethoscope"  # tells browsers apart
HERE = {"localhost", "127.0.0.1", "::1"}
# what the page asks for; Gradio has more (its API's description, a proxy, recordings)
NEEDED = {
    "GET": re.compile(
        r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|logout)/?"
        r"|/(assets|static|svelte)/.+|/export/[\w-]+"
        r"|/gradio_api/(startup-events|heartbeat/\w+|queue/data|upload_progress|file=.+)"
    ),
    "POST": re.compile(r"/login/?|/gradio_api/(queue/join|upload|cancel|reset)/?"),
}
NEEDED["HEAD"] = NEEDED["GET"]
# what of it tells or changes something; Gradio asks for the password only in some of these
BEHIND_PASSWORD = re.compile(r"/config/?|/export/.*|/gradio_api/(?!startup-events).*")
INLINE_SCRIPT = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL)
# Gradio's gr.HTML makes functions of text: 'unsafe-eval'. No text of the page becomes a script.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval'{scripts};"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:;"
    " connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self';"
    " frame-ancestors 'none'"
)
HEADERS = {
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
ATTEMPTS = 8  # of one address that may wait at once
ANSWERS = "/gradio_api/queue/data"  # the stream of what events gave
LAST = b'"msg":"close_stream"'  # in its last message
STAY = 1.0  # seconds that it is kept open behind the last answer


class Delay:
    """Wrong passwords of an address make the next one wait: 1 s, 2 s, 4 s and so on, up to
    LOGIN_DELAY. One at a time is looked at."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many, when
        self._waiting: dict[str, int] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    @staticmethod
    def address(client: str) -> str:
        """What counts as one address: of IPv6, the network, in which one host has many."""
        try:
            network = ipaddress.ip_network(f"{client}/64", strict=False)
        except ValueError:
            return client
        return str(network) if network.version == 6 else client

    def seconds(self, address: str) -> float:
        """How long the next attempt of an address waits."""
        count, when = self._failures.get(address, (0, 0.0))
        if not count or time.monotonic() - when > 60 * LOGIN_MINUTES:
            return 0.0
        return float(min(LOGIN_DELAY, 2 ** (count - 1)))

    def note(self, address: str, was_right: bool) -> None:
        """Remember how an attempt ended."""
        count, when = self._failures.pop(address, (0, 0.0))
        if was_right:
            return
        if time.monotonic() - when > 60 * LOGIN_MINUTES:
            count = 0
        self._failures[address] = (min(count + 1, 30), time.monotonic())
        while len(self._failures) > 10_000:
            self._failures.popitem(last=False)

    async def attempt(
        self, client: str, app: ASGIApp, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Let one attempt to log in through to the app, when it is its turn."""
        address = self.address(client)
        if self._waiting.get(address, 0) >= ATTEMPTS:
            too_many = PlainTextResponse("too many attempts to log in at once", 429)
            await too_many(scope, receive, send)
            return
        self._waiting[address] = self._waiting.get(address, 0) + 1
        lock = self._locks.setdefault(address, asyncio.Lock())

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.note(address, message["status"] == 200)
            await send(message)

        try:
            async with lock:
                await asyncio.sleep(self.seconds(address))
                await app(scope, receive, send_and_note)
        finally:
            self._waiting[address] -= 1
            if not self._waiting[address]:
                del self._waiting[address], self._locks[address]


class Guard:
    """ASGI: lets through to the page what its own visitors send.

    gradio: the page's app, which knows who is logged in. public: files of Gradio's that everybody
    may read. hosts: the names under which the page is served, beside those of this machine.
    """

    def __init__(
        self,
        app: ASGIApp,
        gradio: App,
        public: Collection[str],
        hosts: Collection[str],
        sessions: Sessions,
    ) -> None:
        self.app = app
        self.gradio = gradio
        self.hosts = HERE | {host.lower().strip("[]") for host in hosts}
        self.sessions = sessions
        self.public = set(public)
        self.delay = Delay()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing of the page is a websocket
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        cookies = HTTPConnection(scope).cookies
        cookie = cookies.get(COOKIE, "")
        is_new = not re.fullmatch(r"[\w-]{43}", cookie)
        if is_new:
            cookie = secrets.token_urlsafe(32)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    if name != "cache-control" or name not in sent:
                        sent[name] = value
                sent.setdefault("content-security-policy", POLICY.format(scripts=""))
                for name in [name for name in sent if name.startswith("access-control-")]:
                    del sent[name]  # no other origin reads anything
                if is_new:
                    rules = "Path=/; HttpOnly; SameSite=Strict"
                    sent.append("set-cookie", f"{COOKIE}={cookie}; {rules}")
            await send(message)

        refusal = self.refusal(scope, headers, cookies)
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        path = scope["path"]
        if path.startswith("/export/"):
            response = self.export(cookie, path.removeprefix("/export/"))
            await response(scope, receive, send_with_headers)
        elif path.rstrip("/") == "/login":
            client = (scope.get("client") or ("",))[0]
            await self.delay.attempt(client, self.app, scope, receive, send_with_headers)
        elif path == "/":
            await self.first_page(scope, receive, send_with_headers)
        elif path == ANSWERS:
            await self.answers(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    # ---- what is refused ----

    def refusal(self, scope: Scope, headers: Headers, cookies: dict[str, str]) -> Response | None:
        """Why a request does not reach the page; None: it does."""
        host = headers.get("host", "")
        if not self.is_ours(host, scope):
            name = host[:80]
            reason = f"{name!r} is no name of this page; --allowed_host NAME adds one"
            return PlainTextResponse(reason, 421)
        method, path = scope["method"], scope["path"]
        if not is_same_site(method, path, host, headers):
            return PlainTextResponse("only the page itself may ask for this", 403)
        if method not in NEEDED or not NEEDED[method].fullmatch(path):
            return PlainTextResponse("there is no such page", 404)
        if BEHIND_PASSWORD.fullmatch(path) and not self.is_logged_in(cookies):
            return PlainTextResponse("log in first", 401)
        if path.startswith("/gradio_api/file=") and path.partition("=")[2] not in self.public:
            return PlainTextResponse("there is no such file", 404)
        return None

    def is_ours(self, host: str, scope: Scope) -> bool:
        """Is a Host header one of the page's names, or the address that the request came in at?
        (A website can point its name at us, but not come under an address.)"""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        server = scope.get("server") or ("", None)
        return name in self.hosts or (name != "" and name == server[0])

    def is_logged_in(self, cookies: dict[str, str]) -> bool:
        """Does a request come from somebody who gave the password, where one is asked for?"""
        if self.gradio.auth is None:
            return True
        names = (f"access-token-{kind}{self.gradio.cookie_id}" for kind in ("", "unsecure-"))
        return any(cookies.get(name) in self.gradio.tokens for name in names)

    # ---- what is answered here ----

    def export(self, cookie: str, name: str) -> Response:
        """An exported file, for the browser that asked for it."""
        path = self.sessions.exported(cookie, name)
        if path is None:
            return PlainTextResponse("this export is no longer kept, or somebody else's", 404)
        return FileResponse(path, filename=path.name)

    async def first_page(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The page itself, whose scripts are allowed by their hashes."""
        plain = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        start: Message = {}
        body = b""

        async def keep(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
            elif message["type"] == "http.response.body":
                body += message.get("body", b"")

        await self.app({**scope, "headers": plain}, receive, keep)
        MutableHeaders(scope=start)["content-security-policy"] = POLICY.format(
            scripts="".join(map(hash_of, INLINE_SCRIPT.findall(body)))
        )
        await send(start)
        await send({"type": "http.response.body", "body": body})

    async def answers(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The stream of a visitor's answers, a moment longer than Gradio keeps it.

        Gradio ends it with the last event that is under way. One that begins before the browser has
        read that end would wait for its answer there for ever; here the stream goes on for it.
        """
        query = parse_qs(scope["query_string"].decode("latin-1"))
        session = query.get("session_hash", [""])[0]
        start: Message | None = None
        last: Message | None = None

        async def pass_on(message: Message) -> None:
            nonlocal start, last
            if message["type"] == "http.response.start":
                if start is None:
                    await send(message)
                start = message
            elif LAST in message.get("body", b""):
                last = message
            elif message.get("body"):
                await send({**message, "more_body": True})

        plain = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        while True:
            last = None
            await self.app({**scope, "headers": plain}, receive, pass_on)
            if last is None or not await self.begins(session, receive):
                break
        if last is not None:
            await send(last)
        await send({"type": "http.response.body", "body": b""})

    async def begins(self, session: str, receive: Receive) -> bool:
        """Whether an event of a session begins within STAY, and the browser is still there."""
        events = self.gradio.get_blocks()._queue.pending_event_ids_session
        left = asyncio.ensure_future(self.leaves(receive))
        try:
            for _ in range(20):
                if left.done() or events.get(session):
                    break
                await asyncio.wait([left], timeout=STAY / 20)
            return bool(events.get(session)) and not left.done()
        finally:
            left.cancel()

    async def leaves(self, receive: Receive) -> None:
        """Wait until the browser ends the connection."""
        while (await receive())["type"] != "http.disconnect":
            pass


def hash_of(script: bytes) -> str:
    """A script as a content policy names it, after a space."""
    return f" 'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"


def is_same_site(method: str, path: str, host: str, headers: Headers) -> bool:
    """Does a request come from the page itself, or from no page at all (a typed address, a
    script)? A link to the first page may be anywhere."""
    site = headers.get("sec-fetch-site", "none")
    is_link = method == "GET" and path == "/" and headers.get("sec-fetch-mode") == "navigate"
    if site not in ("same-origin", "none") and not is_link:
        return False
    origin = headers.get("origin")
    return origin is None or origin in (f"http://{host}", f"https://{host}")


# ---- the server ----


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. UsageError where that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family)
    except OSError as error:
        raise UsageError(
            f"--port {port} of {host} is taken or cannot be listened on; choose another one"
        ) from error


def run(app: ASGIApp, where: socket.socket) -> None:
    """Serve until the process is told to end. No header of a proxy is believed: it would give an
    attacker as many addresses as he likes."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=3,
    )
    uvicorn.Server(config).run(sockets=[where])
