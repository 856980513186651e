"""The stethoscope's page to what is no browser of its own visitors: real requests to a running
server, which has a password, keeps one megabyte and forgets after 12 seconds."""

import asyncio
import re
import stat
import time
from types import SimpleNamespace

import httpx
import pytest

from benchmarks.page_client import Client
from tests.test_demo import serving
from vlmdiag.stethoscope import server

LOGIN = ("me", "a-long-password")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("app")
    (root / "password").write_text(":".join(LOGIN) + "\n")
    (root / "password").chmod(0o600)
    flags = ["--password_file", root / "password", "--allowed_host", "gpu7.example"]
    flags += ["--session_memory", 1, "--session_minutes", 0.2]
    with serving(root, *flags) as (address, runs, log):
        yield address, runs, log


def status(address, method="GET", path="config", **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.request(method, address + path, headers=names).status_code


def test_only_the_pages_own_names_are_served(page):
    address = page[0]
    port = address.rstrip("/").rpartition(":")[2]
    here = [
        "localhost",
        "127.0.0.1",
        f"localhost:{port}",
        "[::1]:9",
        "gpu7.example",
        "GPU7.example",
    ]
    for host in here:
        assert status(address, path="", host=host) == 200
    for host in ("evil.test", f"evil.test:{port}", "127.0.0.1.evil.test", "", "[", "10.0.0.1"):
        for path in ("", "config", "export/x", "gradio_api/queue/join"):
            assert status(address, path=path, host=host) in (400, 421), (host, path)
        assert status(address, "POST", "login", host=host) in (400, 421)
        assert status(address, "OPTIONS", host=host) in (400, 421)


def test_only_the_page_itself_changes_something(page):
    address = page[0]
    own = address.rstrip("/")
    for origin in ("http://evil.test", "null", "http://127.0.0.1:1", "https://evil.test"):
        for path in ("login", "gradio_api/queue/join", "gradio_api/upload", "gradio_api/cancel"):
            assert status(address, "POST", path, origin=origin) == 403
            assert status(address, "OPTIONS", path, origin=origin) == 403
    for site in ("cross-site", "same-site"):
        assert status(address, path="gradio_api/queue/data", sec_fetch_site=site) == 403
        # a link to the page may stand anywhere
        assert status(address, path="", sec_fetch_site=site, sec_fetch_mode="navigate") == 200
        assert status(address, path="", sec_fetch_site=site, sec_fetch_mode="no-cors") == 403
    assert status(address, "POST", "gradio_api/cancel", origin=own) == 401  # not 403
    upgrade = {"connection": "Upgrade", "upgrade": "websocket", "sec_websocket_version": "13"}
    socket = status(address, path="gradio_api/queue/join", sec_websocket_key="eA==", **upgrade)
    assert socket in (400, 403, 404)


def test_answers_tell_the_browser_what_the_page_is_for(page):
    address = page[0]
    for path in ("", "config", "theme.css", "nothing", "export/x"):
        sent = httpx.get(address + path).headers
        policy = sent["content-security-policy"]
        assert "frame-ancestors 'none'" in policy and "default-src 'self'" in policy
        assert "'unsafe-inline'" not in policy.partition("script-src")[2].partition(";")[0]
        assert "http" not in policy  # no other server
        assert sent["x-frame-options"] == "DENY" and sent["x-content-type-options"] == "nosniff"
        assert sent["referrer-policy"] == "no-referrer"
        assert not [name for name in sent if name.startswith("access-control")]
        assert "server" not in sent
    cookie = httpx.get(address).headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie


def test_nothing_but_the_page_is_there_and_most_of_it_behind_the_password(page):
    address = page[0]
    inside = Client(address, LOGIN)
    for path in ("user", "token", "app_id", "openapi.json", "info", "monitoring", "proxy=http://x"):
        assert inside.http.get(f"gradio_api/{path}").status_code == 404
    assert inside.http.get("gradio_api/file=/etc/passwd").status_code == 404
    for path in ("config", "gradio_api/queue/data?session_hash=1", "gradio_api/heartbeat/1"):
        assert status(address, path=path) == 401
    for path in ("queue/join", "upload", "cancel", "reset"):
        assert status(address, "POST", f"gradio_api/{path}") == 401


def test_each_wrong_password_waits_longer_and_the_right_one_ends_it(page):
    client = Client(page[0], LOGIN)
    waited = []
    for _ in range(3):
        start = time.monotonic()
        assert client.log_in("me", "wrong").status_code == 400
        waited.append(time.monotonic() - start)
    assert waited[0] < 0.9 and [round(seconds) for seconds in waited[1:]] == [1, 2]
    assert client.log_in(*LOGIN).status_code == 200  # after 4 s
    start = time.monotonic()
    assert client.log_in(*LOGIN).status_code == 200 and time.monotonic() - start < 0.9


def test_an_export_is_for_its_browser_and_goes_with_the_session(page):
    address, runs, log = page
    one, other = Client(address, LOGIN), Client(address, LOGIN)
    assert "ask a question first" in one.send("export_files")
    one.pick()
    assert "green square" in one.ask()
    drawn = one.send("export_files")["exported"]
    link = re.search(r'href="\./(export/[^"]+)"', drawn)[1]
    got = one.http.get(link)
    assert got.content.startswith(b"PK") and "attachment" in got.headers["content-disposition"]
    assert other.http.get(link).status_code == 404
    assert httpx.get(address + link).status_code == 401
    assert not runs.exists()  # visitors leave nothing on the machine
    (folder,) = log.parent.glob("stethoscope-*")
    (mine,) = folder.glob("export-*")
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in (folder, mine))

    other.pick(1)
    assert "circle" in other.ask()  # more than a megabyte by now: the first one's goes
    assert one.http.get(link).status_code == 404 and not mine.exists()
    text = one.send("show")["probability"]
    assert "no longer kept: other visitors needed the memory. Press Ask" in text
    assert "no longer kept" in one.send("export_files")
    assert "green square" in one.ask()  # with the picture that was chosen
    assert "token 0" in one.send("show")["probability"]

    end = time.monotonic() + 60
    while "no longer kept" not in (text := other.send("show")["probability"]):
        assert time.monotonic() < end
        time.sleep(15)  # each look keeps a session
    assert "other visitors" in text or "nothing was done here for 0.2 minutes" in text
    time.sleep(20)
    assert "nothing was done here for 0.2 minutes" in one.send("show")["probability"]
    assert "circle" in other.ask() and "Traceback" not in log.read_text()


def test_many_openings_of_the_page_put_nobody_out(page):
    address = page[0]
    one = Client(address, LOGIN)
    one.pick()
    one.ask()
    flood = Client(address, LOGIN)
    for number in range(70):  # Gradio itself keeps 64
        flood.session = f"flood{number}"
        flood.send("show", tokens=None)
        if number % 10 == 0:
            one.send("show")  # it is looked at, so it is not old
    assert "token 0" in one.send("show")["probability"]


@pytest.mark.parametrize(
    "wrong",
    [{"vc_layer": 1.5}, {"vc_layer": 99}, {"vc_layer": "x"}, {"vc_mode": "min"}, {"tokens": -1}],
)
def test_values_that_no_control_has_are_refused_in_a_line(page, wrong):
    client = Client(page[0], LOGIN)
    client.pick()
    client.ask()
    message = client.send("show", **wrong)
    assert isinstance(message, str) and "wanted" in message or "none of the choices" in message
    assert "Traceback" not in page[2].read_text()


@pytest.mark.parametrize("stays", [True, False])
def test_an_event_that_begins_as_the_stream_ends_is_answered(monkeypatch, stays):
    """Gradio ends a stream of answers with the last event under way; the browser asks for no other
    while it has not read that end. One that has gone leaves its events to the next stream."""
    monkeypatch.setattr(server, "STAY", 0.2)
    events = {"s": set()}
    gradio = SimpleNamespace(
        get_blocks=lambda: SimpleNamespace(_queue=SimpleNamespace(pending_event_ids_session=events))
    )
    calls, sent = [], []

    async def app(scope, receive, send):
        """One event a call, the second begun just after the first stream's end."""
        calls.append(dict(scope["headers"]))
        events["s"].clear()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        body = b'data: {"msg":"process_completed","event_id":"%d"}\n\n' % len(calls)
        await send({"type": "http.response.body", "body": body, "more_body": True})
        if len(calls) == 1:
            asyncio.get_running_loop().call_later(0.05, events["s"].add, "late")
        body = b'data: {"msg":"close_stream","event_id":null}\n\n'
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send(message):
        sent.append(message)

    async def receive():
        await asyncio.sleep(60 if stays else 0.02)
        return {"type": "http.disconnect"}

    scope = {
        "query_string": b"session_hash=s",
        "headers": [(b"host", b"here"), (b"accept-encoding", b"br")],
    }
    guard = server.Guard(app, gradio, (), (), None)
    asyncio.run(guard.answers(scope, receive, send))
    bodies = [message.get("body", b"") for message in sent]
    if not stays:
        assert len(calls) == 1 and events == {"s": set()}
        return
    assert [message["type"] for message in sent].count("http.response.start") == 1
    assert [b"completed" in body for body in bodies] == [False, True, True, False, False]
    assert b"close_stream" in bodies[3]
    assert [message.get("more_body", False) for message in sent[1:]] == [True, True, True, False]
    assert calls == [{b"host": b"here"}] * 2
