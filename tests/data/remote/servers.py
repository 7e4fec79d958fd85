"""Servers on loopback that hold prepared data, and spoil what a test tells them to spoil."""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from dualtok.config.data import StreamConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

BUCKET = "bucket"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
FAULTS = ("500", "truncated", "short", "flipped", "slow", "hang", "gone", "dropped")
"""A server error; a body that ends early; one that is shorter than it should be; one with a wrong bit; one that comes
in small pieces; one that stops coming; no such object; a connection that is closed."""
DONT_COPY = ("connection", "transfer-encoding", "date", "server", "keep-alive")


@dataclass
class Rule:
    """What to do to the next ``times`` downloads whose path contains ``part``."""

    part: str
    fault: str
    times: float


@dataclass
class FaultServer:
    """An HTTP server of a folder, or a proxy before another server, that counts downloads and injects faults."""

    upstream: Path | str
    delay: float = 0.0
    """Seconds before each download is answered."""
    rules: list[Rule] = field(default_factory=list)
    downloads: list[str] = field(default_factory=list)
    """Path of each download that was asked for."""
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def spoil(self, part: str, fault: str, times: float = float("inf")) -> None:
        """Spoil the next downloads whose path contains ``part``."""
        assert fault in FAULTS
        self.rules.append(Rule(part, fault, times))

    def heal(self) -> None:
        """Spoil nothing any more."""
        self.rules.clear()

    def counts(self, suffix: str = ".arrow") -> Counter[str]:
        """Return how often each object was asked for."""
        with self.lock:
            return Counter(path for path in self.downloads if path.endswith(suffix))

    def fault(self, path: str) -> str | None:
        """Note a download, and return what to do to it."""
        with self.lock:
            self.downloads.append(path)
            for rule in self.rules:
                if rule.part in path and rule.times > 0:
                    rule.times -= 1
                    return rule.fault
        return None


class _Handler(BaseHTTPRequestHandler):
    """Answers one request per connection."""

    owner: FaultServer
    protocol_version = "HTTP/1.1"  # clients that send "Expect: 100-continue" wait for it

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.close_connection = True
        path = unquote(urlsplit(self.path).path)
        is_download = self.command == "GET" and "list-type" not in self.path
        fault = self.owner.fault(path) if is_download else None
        if is_download and self.owner.delay:
            time.sleep(self.owner.delay)
        if fault == "dropped":
            return
        status, headers, body = self._from_folder(path) if isinstance(self.owner.upstream, Path) else self._forwarded()
        if fault == "500":
            status, headers, body = 500, {}, b"<Error><Code>InternalError</Code></Error>"
        elif fault == "gone":
            status, headers, body = 404, {}, b"<Error><Code>NoSuchKey</Code><Message>gone</Message></Error>"
        elif fault == "short":
            body = body[: len(body) // 2]
        elif fault == "flipped":
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        self.send_response(status)
        for name, value in headers.items():
            of_whole = fault in ("short", "flipped") and name.lower().startswith("x-amz-checksum")
            if name.lower() not in (*DONT_COPY, "content-length") and not of_whole:
                self.send_header(name, value)
        # The answer to HEAD has the length of the body that it does not have.
        self.send_header("Content-Length", headers["Content-Length"] if self.command == "HEAD" else str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self._send(body, fault)

    def _send(self, body: bytes, fault: str | None) -> None:
        if fault in ("truncated", "hang"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "hang":
                self.owner.closing.wait(30)
        elif fault == "slow":
            for first in range(0, len(body), max(1, len(body) // 15)):
                self.wfile.write(body[first : first + max(1, len(body) // 15)])
                self.wfile.flush()
                time.sleep(0.1)
        else:
            self.wfile.write(body)

    def _from_folder(self, path: str) -> tuple[int, dict[str, str], bytes]:
        assert isinstance(self.owner.upstream, Path)
        file = self.owner.upstream / path.lstrip("/")
        if not file.is_file():
            return 404, {"Content-Length": "0"}, b""
        body = b"" if self.command == "HEAD" else file.read_bytes()
        return 200, {"Content-Length": str(file.stat().st_size)}, body

    def _forwarded(self) -> tuple[int, dict[str, str], bytes]:
        target = urlsplit(str(self.owner.upstream))
        assert target.hostname is not None
        connection = http.client.HTTPConnection(target.hostname, target.port, timeout=30)
        try:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            connection.request(self.command, self.path, content, headers)
            answer = connection.getresponse()
            return answer.status, {"Content-Length": "0", **dict(answer.getheaders())}, answer.read()
        finally:
            connection.close()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that went away."""


@contextmanager
def fault_server(upstream: Path | str) -> Iterator[FaultServer]:
    """Serve a folder, or another server's content, on a free port of loopback."""
    owner = FaultServer(upstream)
    server = _QuietServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": owner}))
    owner.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield owner
    finally:
        owner.closing.set()
        server.shutdown()
        server.server_close()


@contextmanager
def s3_server(address: str = "127.0.0.1") -> Iterator[str]:
    """Run moto's S3 server on an address of this host; gives its URL."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(address, 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def upload(folder: Path, endpoint: str, prefix: str) -> str:
    """Copy a folder to moto's S3 and return its address."""
    import s3fs

    s3 = s3fs.S3FileSystem(key="test", secret="test", endpoint_url=endpoint, skip_instance_cache=True)
    if not s3.exists(BUCKET):
        s3.mkdir(BUCKET)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            s3.pipe_file(f"{BUCKET}/{prefix}/{file.relative_to(folder)}", file.read_bytes())
    return f"s3://{BUCKET}/{prefix}"


def stream_config(cache: Path, endpoint: str | None = None, **changes: object) -> StreamConfig:
    """Return settings with a cache of their own."""
    settings: dict[str, object] = {
        "cache_dir": str(cache),
        "endpoint_url": endpoint,
        "attempts": 4,
        "retry_seconds": 60,
        "timeout_seconds": 10.0,
        **changes,
    }
    return StreamConfig(**settings)  # type: ignore[arg-type]  # pydantic checks the values
