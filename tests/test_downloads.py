"""Pictures by URL: what is refused before a connection is made, what a server may not do, what is
kept. Servers are threads of this process."""

import hashlib
import io
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from tests.conftest import ROOT
from vlmdiag.pictures.samples import load_image
from vlmdiag.volcano import downloads
from vlmdiag.volcano.downloads import DownloadError, picture_of, private_reason

get = partial(downloads.fetch, timeout=10, allow_private=True)


def picture(format="JPEG", size=(20, 16)):
    buffer = io.BytesIO()
    Image.effect_noise(size, 80).save(buffer, format)
    return buffer.getvalue()


JPEG = picture()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        answer = self.server.answers.get(self.path.split("?")[0], (404, {}, b"not here"))
        if callable(answer):
            return answer(self)
        status, headers, body = answer
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments):  # a client that hangs up is what these tests are about
        pass


@pytest.fixture
def serve():
    """serve({path: (status, headers, body) or function of the handler}, tls context) -> server with
    .url and .seen"""
    servers = []

    def start(answers, context=None):
        server = QuietServer(("127.0.0.1", 0), Handler)
        server.answers, server.seen = answers, []
        if context:
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        server.url = f"http{'s' if context else ''}://127.0.0.1:{server.server_port}"
        threading.Thread(
            target=partial(server.serve_forever, poll_interval=0.02), daemon=True
        ).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def only_files(folder):
    return (
        sorted(path.name for path in folder.rglob("*") if path.is_file()) if folder.exists() else []
    )


# --- what is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format", downloads.FORMATS)
def test_a_picture_is_kept_byte_for_byte_under_hash_and_name_and_then_read_without_network(
    serve, tmp_path, format
):
    body = picture(format)
    server = serve({"/a/sheep%20one.jpg": (200, {}, body)})
    url = f"{server.url}/a/sheep%20one.jpg?size=o"
    path = get(url, tmp_path / "new" / "folder")
    assert (
        path.read_bytes() == body
        and path.parent == tmp_path / "new" / "folder"
        and load_image(path).size == (20, 16)
    )
    assert path.name == hashlib.sha256(url.encode()).hexdigest()[:16] + "-sheep_one.jpg"
    assert server.seen[0][0] == "/a/sheep%20one.jpg?size=o"
    assert (
        downloads.fetch(url, tmp_path / "new" / "folder") == path and len(server.seen) == 1
    )  # not even private addresses are looked at
    assert get(url.replace("size=o", "size=b"), path.parent) != path and len(server.seen) == 2
    assert len(only_files(tmp_path)) == 2


def test_names_from_urls_stay_in_the_folder(serve, tmp_path):
    paths = [
        "/",
        "/..%2f..%2fetc%2fpasswd",
        "/%2e%2e",
        "/.hidden",
        "/" + "x" * 200,
        "/%00%0a.png",
        "/b\u00e4r.jpg",
    ]
    server = serve({path: (200, {}, JPEG) for path in [*paths, "/b%C3%A4r.jpg"]})
    for path in paths:
        kept = get(server.url + path, tmp_path)
        assert kept.parent == tmp_path and re.fullmatch(
            r"[0-9a-f]{16}-[A-Za-z0-9_-][A-Za-z0-9._-]{0,59}", kept.name
        ), kept.name
    assert len(only_files(tmp_path)) == len(paths)


def test_several_threads_may_fetch_one_picture(serve, tmp_path):
    server = serve({"/a.jpg": (200, {}, JPEG)})
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(get(server.url + "/a.jpg", tmp_path)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        len(set(found)) == 1
        and len(found) == 6
        and only_files(tmp_path) == [found[0].name]
        and found[0].read_bytes() == JPEG
    )


def test_proxies_are_not_used(serve, tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert get(serve({"/a.jpg": (200, {}, JPEG)}).url + "/a.jpg", tmp_path).exists()


def test_chunks_and_bodies_without_length_are_read(serve, tmp_path):
    def chunked(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(JPEG), 100):
            part = JPEG[start : start + 100]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        handler.wfile.write(b"0\r\n\r\n")

    server = serve({"/chunked": chunked, "/plain": (200, {"Content-Length": None}, JPEG)})
    for path in ("/chunked", "/plain"):
        assert get(server.url + path, tmp_path).read_bytes() == JPEG


# --- what a server may not do ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, {}, b""), "status 404"),
        ((403, {}, JPEG), "status 403"),
        ((204, {}, b""), "status 204"),
        ((206, {}, JPEG), "status 206"),
        ((302, {}, JPEG), "status 302"),
        ((200, {}, b"<html>gone</html>"), "not a picture"),
        ((200, {}, b""), "not a picture"),
        ((200, {}, JPEG[:-200]), "not a picture"),
        ((200, {}, picture("PNG")[:-30]), "not a picture"),
        (
            (
                200,
                {"Content-Type": "image/jpeg"},
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            ),
            "not a picture",
        ),
        ((200, {}, picture("PPM")), "not a picture"),
        ((200, {}, b"x" * 5000), "too large, 5000 bytes where 3000 are allowed"),
        ((200, {"Content-Length": None}, b"x" * 5000), "too large, more than 3000"),
        ((200, {"Content-Length": "2900"}, JPEG), "cut short"),
    ],
)
def test_refused_answers_are_one_line_and_leave_no_file(serve, tmp_path, answer, words):
    server = serve({"/a.jpg": answer})
    with pytest.raises(DownloadError, match=words) as error:
        get(server.url + "/a.jpg", tmp_path, max_bytes=3000)
    assert (
        str(error.value).startswith(f"{server.url}/a.jpg: ")
        and "\n" not in str(error.value)
        and isinstance(error.value, OSError)
    )
    assert only_files(tmp_path) == []


def drip(before, piece, every):
    """An answer that sends `before`, and then a piece again and again."""

    def answer(handler):
        handler.wfile.write(before)
        try:
            for _ in range(300):
                handler.wfile.write(piece)
                time.sleep(every)
        except OSError:
            pass

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        drip(b"", b"", 0.02),
        drip(b"HTTP/1.0 200 OK\r\nX-Long: ", b"x", 0.02),
        drip(b"HTTP/1.0 200 OK\r\n\r\n", b"x", 0.02),
        drip(b"HTTP/1.0 200 OK\r\nContent-Length: 2000\r\n\r\n", b"x", 0.02),
    ],
    ids=["silent", "header", "body", "body with length"],
)
def test_the_time_limit_is_on_the_whole_even_if_bytes_keep_coming(serve, tmp_path, answer):
    server, start = serve({"/a.jpg": answer}), time.monotonic()
    with pytest.raises(DownloadError, match="timed out, 0.4 s in all"):
        get(server.url + "/a.jpg", tmp_path, timeout=0.4)
    assert time.monotonic() - start < 3


def test_a_slow_name_server_counts_in_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(3))
    start = time.monotonic()
    with pytest.raises(DownloadError, match="timed out"):
        get("http://slow.example/a.jpg", tmp_path, timeout=0.3)
    assert time.monotonic() - start < 2


def test_no_server_and_no_name_are_said(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(DownloadError, match="refused"):
            get(f"http://127.0.0.1:{free.getsockname()[1]}/a.jpg", tmp_path)

    def unknown(*a, **k):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(
        DownloadError, match=r"pictures\.example has no address \(Name or service not known\)"
    ):
        get("http://pictures.example/a.jpg", tmp_path)


def test_a_folder_that_cannot_be_written_is_said(serve, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="cannot be written"):
        get(serve({"/a.jpg": (200, {}, JPEG)}).url + "/a.jpg", tmp_path / "file")


# --- redirects ------------------------------------------------------------------------------------


def chain(length):
    hops = {f"/{n}": (301 + n % 2, {"Location": f"/{n + 1}"}, b"") for n in range(length)}
    return hops | {f"/{length}": (200, {}, JPEG)}


def test_up_to_five_redirects_are_followed_and_kept_under_the_first_url(serve, tmp_path):
    server = serve(chain(6))
    assert get(server.url + "/1", tmp_path).name.endswith("-1") and [
        path for path, _ in server.seen
    ] == ["/1", "/2", "/3", "/4", "/5", "/6"]
    with pytest.raises(DownloadError, match="more than 5 redirects"):
        get(server.url + "/0", tmp_path)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("file:///etc/passwd", "http:// or https:// was wanted"),
        ("ftp://127.0.0.1/a.jpg", "was wanted"),
        ("http://user:secret@127.0.0.1/a.jpg", "user name"),
        ("http://127.0.0.1:99999/", "not a URL"),
        ("//10.0.0.1/a.jpg", "10.0.0.1, address of kind private"),
        ("http://[::1]/a.jpg", "loopback"),
    ],
)
def test_redirects_are_checked_like_the_first_url(serve, tmp_path, monkeypatch, target, words):
    server = serve({"/a.jpg": (302, {"Location": target}, b"")})
    real = private_reason
    monkeypatch.setattr(
        downloads,
        "private_reason",
        lambda address: None if address == "127.0.0.1" else real(address),
    )
    with pytest.raises(DownloadError, match=words) as error:
        downloads.fetch(server.url + "/a.jpg", tmp_path)
    assert "secret" not in str(error.value) and len(server.seen) == 1


# --- addresses ------------------------------------------------------------------------------------

PRIVATE = [
    "127.0.0.1",
    "127.9.9.9",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "192.0.0.8",
    "192.0.0.171",
    "::ffff:192.0.0.10",
    "0.0.0.0",
    "0.1.2.3",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "100.64.0.1",
    "198.18.0.1",
    "192.0.2.1",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fd12::1",
    "ff02::1",
    "ff0e::1",
    "fec0::1",
    "2001:db8::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "64:ff9b::a00:1",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "::127.0.0.1",
    "2001:0:7f00:1::1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public_are_told(address):
    assert private_reason(address)


@pytest.mark.parametrize(
    "address",
    [
        "93.184.216.34",
        "8.8.8.8",
        "2606:2800:220:1:248:1893:25c8:1946",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
        "172.32.0.1",
    ],
)
def test_public_addresses_pass(address):
    assert private_reason(address) is None


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "127.1",
        "017700000001",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "0",
        "[::]",
    ],
)
def test_this_machine_is_refused_in_every_spelling(serve, tmp_path, host):
    server = serve({"/a.jpg": (200, {}, JPEG)})
    with pytest.raises(DownloadError, match="is not on the public network|has no address"):
        downloads.fetch(f"http://{host}:{server.server_port}/a.jpg", tmp_path)
    assert server.seen == []


@pytest.fixture
def names(monkeypatch):
    """names(address list, address list, ...): what getaddrinfo answers, call by call, the last from
    then on; .asked and .connected say what happened."""

    def start(*answers):
        start.asked, start.connected = [], []

        def resolve(host, port, **options):
            start.asked.append(host)
            found = answers[min(len(start.asked), len(answers)) - 1]
            return [
                (
                    socket.AF_INET6 if ":" in a else socket.AF_INET,
                    socket.SOCK_STREAM,
                    6,
                    "",
                    (a, port, 0, 0) if ":" in a else (a, port),
                )
                for a in found
            ]

        def connect(self, place):
            start.connected.append(place[0])
            raise ConnectionRefusedError(111, "Connection refused")

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(socket.socket, "connect", connect)
        return start

    return start


def test_the_connection_goes_to_the_addresses_that_were_checked(names, tmp_path):
    """DNS rebinding: the name would lead to this machine when asked a second time."""
    seen = names(["93.184.216.34", "8.8.8.8"], ["127.0.0.1"])
    with pytest.raises(DownloadError, match="Connection refused"):
        downloads.fetch("http://pictures.example/a.jpg", tmp_path)
    assert seen.asked == ["pictures.example"] and seen.connected == ["93.184.216.34", "8.8.8.8"]


@pytest.mark.parametrize("bad", ["127.0.0.1", "10.0.0.1", "fe80::1", "::ffff:192.168.0.1"])
def test_one_private_address_among_public_ones_is_enough_to_refuse(names, tmp_path, bad):
    seen = names(["93.184.216.34", bad])
    with pytest.raises(DownloadError, match="pictures.example is not on the public network"):
        downloads.fetch("https://pictures.example/a.jpg", tmp_path)
    assert seen.connected == []


def test_the_next_address_is_tried_and_the_server_hears_the_name(serve, tmp_path, monkeypatch):
    server = serve({"/a.jpg": (200, {}, JPEG)})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        places = [("127.0.0.1", free.getsockname()[1]), ("127.0.0.1", server.server_port)]
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda *a, **k: [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places
            ],
        )
        assert get("http://b\u00fccher.example:8080/a.jpg", tmp_path).exists()
    assert server.seen[0][1]["Host"] == "xn--bcher-kva.example:8080"


# --- URLs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://a.example/x",
        "a.jpg",
        "",
        "http://",
        "http:///x",
        "http://user@a.example/",
        "https://user:secret@a.example/",
        "http://a.example:0/",
        "http://a.example:x/",
        "http://a.example:70000/",
        "http://[::1/",
        "http://a b.example/",
        "http://a.example/\r\nX: y",
        "http://a.example\\@127.0.0.1/",
        " http://a.example/",
        "http://" + "a" * 70 + ".example/",
    ],
)
def test_what_is_no_fetchable_url_is_refused_before_any_look_up(names, tmp_path, url):
    seen = names(["93.184.216.34"])
    with pytest.raises(DownloadError) as error:
        downloads.fetch(url, tmp_path)
    assert (
        "\n" not in str(error.value)
        and "\r" not in str(error.value)
        and "secret" not in str(error.value)
        and seen.asked == []
    )


def test_picture_of_tells_paths_from_urls(serve, tmp_path):
    server = serve({"/a/sheep%201.jpg": (200, {}, JPEG)})
    url, root, cache = server.url + "/a/sheep%201.jpg", tmp_path / "root", tmp_path / "cache"
    assert picture_of("val2017/1.jpg", root, cache) == root / "val2017" / "1.jpg"
    assert picture_of(str(tmp_path / "x.jpg"), root, cache) == tmp_path / "x.jpg"
    kept = picture_of(url, root, cache, allow_private=True)
    assert kept.parent == cache and kept.read_bytes() == JPEG
    root.mkdir()
    (root / "sheep 1.jpg").write_bytes(JPEG)
    assert picture_of(url, root, cache) == root / "sheep 1.jpg" and len(server.seen) == 1
    for source in (
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "data:image/png;base64,AAAA",
        "ftp://a.example/x.jpg",
    ):
        with pytest.raises(
            DownloadError, match="is not read; a path, http:// or https:// was wanted"
        ):
            picture_of(source, root, cache)
    with pytest.raises(DownloadError, match="loopback"):
        picture_of(server.url + "/b.jpg", root, cache)


# --- TLS ------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path):
    if not shutil.which("openssl"):
        pytest.fail(
            "openssl makes the certificates of these tests; on Debian or Ubuntu: apt-get install"
            " openssl"
        )
    files = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
        "-keyout",
        files[0],
        "-out",
        files[1],
    ]
    subprocess.run([*command, *subject], check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files[1], files[0])
    return context, files[1]


def test_a_certificate_that_nobody_signed_is_refused_and_a_trusted_one_is_not(
    serve, tmp_path, certificate, monkeypatch
):
    context, file = certificate
    plain = serve({"/a.jpg": (200, {}, JPEG)})
    server = serve(
        {"/a.jpg": (200, {}, JPEG), "/down": (302, {"Location": plain.url + "/a.jpg"}, b"")},
        context,
    )
    with pytest.raises(DownloadError, match=r"the certificate is not trusted \(self.signed"):
        get(server.url + "/a.jpg", tmp_path / "kept")
    assert server.seen == [] and only_files(tmp_path / "kept") == []
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    assert get(server.url + "/a.jpg", tmp_path / "kept").read_bytes() == JPEG
    with pytest.raises(DownloadError, match="a redirect from https to http"):
        get(server.url + "/down", tmp_path / "kept")
    assert plain.seen == []
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *a, **k: [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.server_port))
        ],
    )
    with pytest.raises(DownloadError, match="the certificate is not trusted .*pictures.example"):
        get("https://pictures.example/a.jpg", tmp_path / "kept")


def test_a_server_without_tls_is_no_https_server(serve, tmp_path):
    server = serve({"/a.jpg": (200, {}, JPEG)})
    with pytest.raises(DownloadError):
        get(server.url.replace("http:", "https:") + "/a.jpg", tmp_path, timeout=3)


# --- download_mmhal.sh ----------------------------------------------------------------------------


def run_shell(script, *arguments, path=None):
    env = {"PATH": str(path)} if path else None
    return subprocess.run(
        ["/bin/bash", str(script), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
        env=env,
    )


def test_download_mmhal_names_what_is_wrong(tmp_path):
    script = ROOT / "data/download_mmhal.sh"
    helped = run_shell(script, "-h")
    assert helped.returncode == 0 and "data/mmhal/response_template.json" in helped.stdout
    found = run_shell(script, "all")
    assert (
        found.returncode == 2
        and found.stderr.splitlines()[-1] == "error: 'all': no arguments are wanted"
    )
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    found = run_shell(script, path=tmp_path)
    assert (
        found.returncode == 2
        and found.stderr.startswith("error: unzip is not installed")
        and found.stderr.count("\n") == 1
    )
    (tmp_path / "unzip").symlink_to("/bin/true")
    assert "neither wget nor curl" in run_shell(script, path=tmp_path).stderr


@pytest.mark.skipif(not shutil.which("unzip"), reason="the script itself asks for unzip")
@pytest.mark.parametrize("tool", ["wget", "curl"])
def test_download_mmhal_goes_on_after_failures_and_leaves_nothing_half_done(tmp_path, tool):
    for folder in ("data", "bin", "net"):
        (tmp_path / folder).mkdir()
    script = shutil.copy(ROOT / "data/download_mmhal.sh", tmp_path / "data")
    for name in ("dirname", "mkdir", "mv", "rm", "rmdir", "unzip", "cp", "cat", "grep", "ls"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    there, net = tmp_path / "data/mmhal", tmp_path / "net"
    fake = (
        tmp_path / "bin" / tool
    )  # stands in for the network: notes the URL, puts the file in place
    fake.write_text(
        f'#!/bin/bash\nurl="${{@: -1}}"; name="${{url##*/}}"\necho "$url" >> {tmp_path}/urls\n[ -e'
        f" {net}/$name ] || exit 4\ncp {net}/$name {there}/.downloading/\n"
    )
    fake.chmod(0o755)
    run = partial(run_shell, script, path=tmp_path / "bin")

    failed = run()
    assert (
        failed.returncode == 1
        and "response_template.json could not be downloaded; run the same command again"
        in failed.stderr
    )
    (net / "response_template.json").write_text("version https://git-lfs.github.com/spec/v1")
    failed = run()
    assert (
        failed.returncode == 1
        and "is not MMHal-Bench's list of questions" in failed.stderr
        and not (there / "response_template.json").exists()
    )
    (net / "response_template.json").write_text(
        '[{"image_src": "https://a.example/1.jpg", "question": "?"}]'
    )
    failed = run()
    assert (
        failed.returncode == 1
        and "test_data.zip could not be downloaded" in failed.stderr
        and (there / "response_template.json").exists()
    )
    (net / "test_data.zip").write_bytes(b"half")
    assert "could not be unpacked" in run().stderr and not (there / "images").exists()
    with zipfile.ZipFile(net / "test_data.zip", "w") as archive:
        archive.writestr("other/1.jpg", b"picture")
    assert (
        "holds no pictures in a folder images" in run().stderr and not (there / "images").exists()
    )
    with zipfile.ZipFile(net / "test_data.zip", "w") as archive:
        archive.writestr(f"{'test_data/' if tool == 'curl' else ''}images/1.jpg", b"picture")
    done = run()
    assert (
        done.returncode == 0
        and "images is ready" in done.stdout
        and (there / "images/1.jpg").read_bytes() == b"picture"
    )
    assert sorted(path.name for path in there.iterdir()) == ["images", "response_template.json"]
    urls = (tmp_path / "urls").read_text().split()
    assert (
        run().stdout.count("nothing to do") == 2 and (tmp_path / "urls").read_text().split() == urls
    )
    base = "https://huggingface.co/datasets/Shengcao1006/MMHal-Bench/resolve/main/"
    assert set(urls) == {base + "response_template.json", base + "test_data.zip"}
