"""The page for people at ``/``: a chat with the served model, whose files are in ``page_files``.

Owns: the routes of these files, the headers with which browsers get them, and what address people are told. Does not
own: what the page does (``page_files``), the API that it calls (``server.py``). Invariants: the page names nothing
outside this server, and browsers are told to load and to call nothing else; no file outside ``page_files`` is served;
the files hold no secrets, so they need no key.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from steerlm_megatron.config.schema import ServerConfig

FILES = Path(__file__).parent / "page_files"
FOLDER = "/page/"  # the path of the files beside the page
_INDEX = "index.html"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Scripts and styles come from files of this server alone, and no script can make markup of text (trusted-types), so
# that what a model or a link says is never run: https://www.w3.org/TR/CSP3/, https://www.w3.org/TR/trusted-types/.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    # A browser keeps the files and asks each time whether they changed: a newer server never meets older scripts.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page: its bytes, its media type, and a tag that changes with its content."""

    content: bytes
    kind: str
    tag: str

    def response(self, known: str | None) -> Response:
        """Return the answer to a request whose ``If-None-Match`` is ``known``: the file, or 304 if it is known."""
        headers = {**_HEADERS, "ETag": self.tag}
        if known is not None and self.tag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers={**headers, "Content-Type": self.kind})


def page_files() -> Mapping[str, PageFile]:
    """Return the files of the page by name."""
    found = {}
    for path in sorted(FILES.iterdir()):
        if (kind := _KINDS.get(path.suffix)) is not None:
            content = path.read_bytes()
            found[path.name] = PageFile(content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


def add_page(app: FastAPI, root_path: str = "") -> None:
    """Add the page to ``app``: at ``/``, and its files below ``FOLDER``. All addresses in them are relative, so that
    the page works below any path of a proxy; ``root_path`` without a slash at its end is sent on to the one with it.
    """
    files = page_files()

    @app.api_route("/", methods=["GET", "HEAD"])
    async def index(http: HttpRequest) -> Response:
        return files[_INDEX].response(http.headers.get("if-none-match"))

    @app.api_route(FOLDER + "{name:path}", methods=["GET", "HEAD"])
    async def file(name: str, http: HttpRequest) -> Response:
        if name == _INDEX or name not in files:
            raise HTTPException(404, "there is no such file")
        return files[name].response(http.headers.get("if-none-match"))

    root = root_path.rstrip("/")
    if root:

        @app.api_route(root, methods=["GET", "HEAD"])
        async def without_slash() -> Response:
            return RedirectResponse(f"{root}/", 308)


def page_address(server: ServerConfig, url: str) -> str:
    """Return where people find the page of a server that listens at ``url``. One that listens on all addresses is
    reached by the host's name.
    """
    for anything in ("//0.0.0.0:", "//[::]:"):
        url = url.replace(anything, f"//{socket.gethostname()}:")
    return f"{url}{server.root_path.rstrip('/')}/"
