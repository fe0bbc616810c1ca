"""Plain requests for ranges, against a real HTTP server whose answers are not what a store's should be."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dico_ray.signed import SignedReader

BODY = bytes(range(10))


class _Store(BaseHTTPRequestHandler):
    """Answers as the path says: /STATUS/FIRST/LENGTH, FIRST told in Content-Range, LENGTH in Content-Length."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        status, first, length = map(int, self.path.split("?")[0].strip("/").split("/"))
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Content-Range", f"bytes {first}-{first + length - 1}/100")
        self.end_headers()
        self.wfile.write(BODY[:length])
        self.close_connection = length > len(BODY)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


class _Signer:
    """Signs as s3fs does, for a server that does not ask for it."""

    def __init__(self, port: int) -> None:
        self._port = port

    def sign(self, path: str, expiration: int) -> str:
        return f"http://127.0.0.1:{self._port}/{path}?signed"


@pytest.fixture(scope="module")
def reader() -> Iterator[SignedReader]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SignedReader(_Signer(server.server_port), 5.0)
    server.shutdown()
    server.server_close()


def test_a_range_fills_the_buffer(reader: SignedReader) -> None:
    buffer = bytearray(10)
    assert reader.read_into("206/30/10", 30, memoryview(buffer)) == 10
    assert buffer == BODY


@pytest.mark.parametrize(
    "answer",
    ["200/30/10", "206/0/10", "206/30/11", "403/30/10"],
    ids=["the whole file", "another range", "more than was asked for", "refused"],
)
def test_what_is_no_plain_answer_is_left_to_s3fs(reader: SignedReader, answer: str) -> None:
    assert reader.read_into(answer, 30, memoryview(bytearray(10))) is None


@pytest.mark.parametrize("answer", ["500/30/10", "503/30/10", "429/30/10"])
def test_a_server_that_fails_is_told_by_its_status(reader: SignedReader, answer: str) -> None:
    with pytest.raises(OSError, match=answer[:3]):
        reader.read_into(answer, 30, memoryview(bytearray(10)))


def test_an_answer_that_ends_early_is_a_broken_line(reader: SignedReader) -> None:
    with pytest.raises(ConnectionError, match="ended after 10 of 20 bytes"):
        reader.read_into("206/30/20", 30, memoryview(bytearray(20)))
