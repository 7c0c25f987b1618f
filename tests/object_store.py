"""A folder served by what reading needs of the S3 protocol: GET with ranges, HEAD, ListObjectsV2 with pages."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 3  # keys in an answer to a list request


@dataclass
class Store:
    """What is served, below `root`/BUCKET, and the requests so far: (method, path, range, bytes sent, signed)."""

    root: Path
    port: int = 0
    requests: list[tuple[str, str, str | None, int, bool]] = field(default_factory=list)

    def gets(self, name: str) -> list[tuple[str | None, int]]:
        """The ranges and sizes of the requests for the object whose path ends in `name`."""
        return [
            (span, size) for method, path, span, size, _ in self.requests if method == "GET" and path.endswith(name)
        ]


@contextmanager
def served(root: Path) -> Iterator[Store]:
    """A store on a free port."""
    store = Store(root)
    handler = type("Handler", (_Handler,), {"store": store})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        store.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield store
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        file = self.store.root / bucket / key
        if "list-type" in query:
            self._answer(200, self._listing(bucket, query).encode())
        elif not file.is_file():
            self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>none</Message></Error>")
        else:
            self._object(file)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self._answer(403, b"<Error><Code>AccessDenied</Code><Message>read only</Message></Error>")

    do_POST = do_DELETE = do_PUT

    def _object(self, file: Path) -> None:
        data = file.read_bytes()
        headers = {"Last-Modified": formatdate(file.stat().st_mtime, usegmt=True), "Accept-Ranges": "bytes"}
        span = self.headers.get("Range")
        if span is None:
            self._answer(200, data, headers)
            return
        first, _, last = span.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        self._answer(206, part, headers | {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        sent = 0 if self.command == "HEAD" else len(body)
        signed = (self.headers.get("Authorization") or "").startswith("AWS4-HMAC-SHA256 ")
        self.store.requests.append(
            (self.command, unquote(urlsplit(self.path).path), self.headers.get("Range"), sent, signed)
        )
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if sent:
            self.wfile.write(body)

    def _listing(self, bucket: str, query: dict[str, str]) -> str:
        folder, prefix, delimiter = self.store.root / bucket, query.get("prefix", ""), query.get("delimiter")
        keys = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        found = {}
        for key in keys:
            head, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            if key.startswith(prefix):
                found[f"{prefix}{head}{cut}" if cut else key] = bool(cut)
        names = [name for name in sorted(found) if name > query.get("continuation-token", "")]
        page = names[: min(PAGE, int(query.get("max-keys", PAGE)))]
        items = "".join(_folder(name) if found[name] else _file(name, folder / name) for name in page)
        more = len(page) < len(names)
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        return (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount><MaxKeys>{PAGE}</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{items}</ListBucketResult>"
        )


def _folder(name: str) -> str:
    return f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"


def _file(name: str, file: Path) -> str:
    return (
        f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<Size>{file.stat().st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
    )
