"""Ranges of S3 objects by plain HTTP requests that s3fs has signed: the bytes go from the socket straight to their
place, for a third of the time that s3fs or pyarrow takes for them. Whatever is not a plain answer is left to s3fs."""

from __future__ import annotations

import http.client
import os
import ssl
import time
import urllib.request
from functools import lru_cache
from typing import Any
from urllib.parse import SplitResult, urlsplit

import fsspec

_SIGNED_S = 3600  # how long an address is good for; a new one is asked for after half of it
_PLAIN = frozenset({"key", "secret", "token"})  # of storage.options: what s3fs needs for no more than signing
_STALE = (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError)


@lru_cache(maxsize=16)
def reader(fs: fsspec.AbstractFileSystem, options: frozenset[str], timeout_s: float) -> SignedReader | None:
    """The process's reader of this s3fs file system; None if it was given options that a plain request would miss."""
    return SignedReader(fs, timeout_s) if options <= _PLAIN else None


class SignedReader:
    """Threads may share it. Connections are kept: as many as there were requests at a time."""

    def __init__(self, fs: Any, timeout_s: float) -> None:
        self._fs, self._timeout_s = fs, timeout_s
        self._idle: list[http.client.HTTPConnection] = []
        self._addresses: dict[str, tuple[SplitResult, float]] = {}
        self._usable = True

    def read_into(self, path: str, start: int, buffer: memoryview) -> int | None:
        """Fills the buffer from byte `start` on: how many bytes there were, or None if s3fs has to be asked.

        Raises OSError for a line or a server that fails.
        """
        if not self._usable or not len(buffer):
            return None
        address = self._address(path)
        if _behind_proxy(address.scheme, address.hostname or ""):
            return None
        try:
            connection, answer = self._ask(address, f"bytes={start}-{start + len(buffer) - 1}")
        except ssl.SSLCertVerificationError:  # s3fs has its own certificates
            self._usable = False
            return None
        try:
            count = self._take(answer, start, buffer)
        except http.client.HTTPException as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        finally:
            if answer.isclosed() and not answer.will_close:  # read to its end
                self._idle.append(connection)
            else:
                connection.close()
        if count is None:
            self._addresses.pop(path, None)  # its credentials may have expired
        return count

    def _address(self, path: str) -> SplitResult:
        known = self._addresses.get(path)
        if known and time.monotonic() < known[1]:
            return known[0]
        found = urlsplit(self._fs.sign(path, expiration=_SIGNED_S))
        self._addresses[path] = found, time.monotonic() + _SIGNED_S / 2
        return found

    def _ask(self, address: SplitResult, span: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """The beginning of an answer. A kept connection that the server has closed meanwhile is no failure."""
        while True:
            try:
                connection, kept = self._idle.pop(), True
            except IndexError:
                connection, kept = self._connect(address), False
            try:
                connection.request("GET", f"{address.path}?{address.query}", headers={"Range": span})
                return connection, connection.getresponse()
            except BaseException as error:
                connection.close()
                if kept and isinstance(error, _STALE):
                    continue
                if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError):
                    raise ConnectionError(f"{type(error).__name__}: {error}") from error
                raise

    def _connect(self, address: SplitResult) -> http.client.HTTPConnection:
        if address.scheme != "https":
            return http.client.HTTPConnection(address.netloc, timeout=self._timeout_s)
        context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE") or None)
        return http.client.HTTPSConnection(address.netloc, timeout=self._timeout_s, context=context)

    @staticmethod
    def _take(answer: http.client.HTTPResponse, start: int, buffer: memoryview) -> int | None:
        if answer.status >= 500 or answer.status == 429:
            raise OSError(f"the store answers {answer.status} {answer.reason}")
        due = int(answer.headers.get("Content-Length", -1))
        begins = answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if answer.status != 206 or not begins or not 0 <= due <= len(buffer):
            return None
        done = 0
        while done < due:
            count = answer.readinto(buffer[done:due])
            if not count:
                raise ConnectionError(f"the answer ended after {done} of {due} bytes")
            done += count
        answer.read()  # nothing: says that it is over
        return done


def _behind_proxy(scheme: str, host: str) -> bool:
    return scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)
