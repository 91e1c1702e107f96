"""The page's server: its files, and a few paths that hand photos and questions to the desk.

Any program of this machine can reach a loopback port, and so can every page that a browser of it has open. So a request
must name this server as its host, which one that was led here by a changed name (DNS rebinding) does not, and a request
that does something must come from this page.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.errors import ImageError, PruneportError, RequestError
from runtime.serve.desk import MAX_UPLOAD_BYTES, Desk

_RUNTIME = Path(__file__).resolve().parent.parent
_PAGE = Path(__file__).with_name("page")
# All that is handed out, and as what: nothing that a request says becomes a path.
FILES = {
    "/": (_PAGE / "index.html", "text/html"),
    "/style.css": (_RUNTIME / "templates" / "style.css", "text/css"),
    "/page.css": (_PAGE / "page.css", "text/css"),
    "/page.js": (_PAGE / "page.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_MAX_WORDS_BYTES = 2**16


class _TooLargeError(Exception):
    """A body beyond its limit."""


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The question which tokens a photo is left with."""

    photo: str
    keep: int


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A question about a photo, with `twin` for the unpruned twin, too."""

    photo: str
    keep: int
    question: str
    twin: bool = False


def make_app(desk: Desk, *, port: int) -> ASGIApp:
    """The whole application at a port of the loopback."""

    async def file(request: Request) -> Response:
        path, kind = FILES[request.url.path]
        return Response(path.read_bytes(), media_type=f"{kind}; charset=utf-8")

    async def bundle(request: Request) -> Response:
        return JSONResponse(desk.facts())

    async def sample(request: Request) -> Response:
        png = desk.sample_png()
        return _refusal(404, "this bundle holds no photo") if png is None else Response(png, media_type="image/png")

    async def photo(request: Request) -> Response:
        with tempfile.NamedTemporaryFile(dir=desk.folder, prefix="photo-") as upload:
            async for chunk in _body(request, MAX_UPLOAD_BYTES):
                upload.write(chunk)
            upload.flush()
            try:
                return JSONResponse(await desk.show(Path(upload.name)))
            except ImageError as err:
                # The reader chose a file and knows no path.
                words = str(err).replace(upload.name, "the photo").replace("give the path of", "choose")
                return _refusal(400, words)

    async def kept(request: Request) -> Response:
        wanted = msgspec.json.decode(await _words(request), type=Kept)
        return JSONResponse(await desk.kept(wanted.photo, wanted.keep))

    async def answer(request: Request) -> Response:
        asked = msgspec.json.decode(await _words(request), type=Asked)
        told = await desk.answer(asked.photo, asked.keep, asked.question, twin=asked.twin)
        return StreamingResponse(_lines(told), media_type="application/x-ndjson")

    routes = [
        *(Route(path, file) for path in FILES),
        Route("/bundle", bundle),
        Route("/sample.png", sample),
        Route("/photo", photo, methods=["POST"]),
        Route("/kept", kept, methods=["POST"]),
        Route("/answer", answer, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            PruneportError: _refused,
            msgspec.MsgspecError: _not_understood,
            _TooLargeError: _too_large,
            ClientDisconnect: _gone,
        },
    )
    return Guard(app, port=port)


class Guard:
    """What stands in front of the application: refuses who must not ask, and says what the page may load."""

    def __init__(self, app: ASGIApp, *, port: int) -> None:
        self._app = app
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        if port == 80:
            self._hosts |= {"127.0.0.1", "localhost"}  # browsers leave the usual port out

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(scope["method"], Headers(scope=scope))
        await (refusal or self._app)(scope, receive, guarded)

    def _refusal(self, method: str, headers: Headers) -> Response | None:
        host = headers.getlist("host")
        if len(host) != 1 or host[0].lower() not in self._hosts:
            return _refusal(421, f"this server is http://{min(self._hosts)}; open that address")
        if method in ("GET", "HEAD"):
            return None
        origin = headers.getlist("origin")
        ours = len(origin) == 1 and origin[0].lower() == f"http://{host[0].lower()}"
        if not ours or headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return _refusal(403, "only this server's own page may ask")
        return None


async def _body(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body of a request, piece by piece; _TooLargeError beyond the limit."""
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and int(told) > limit:
        raise _TooLargeError(limit)
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _TooLargeError(limit)
        yield chunk


async def _words(request: Request) -> bytes:
    return b"".join([chunk async for chunk in _body(request, _MAX_WORDS_BYTES)])


async def _lines(told: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[bytes]:
    async with aclosing(told):
        async for something in told:
            yield msgspec.json.encode(something) + b"\n"


def _refusal(status: int, words: str) -> Response:
    return JSONResponse({"error": words}, status)


async def _refused(request: Request, err: Exception) -> Response:
    return _refusal(400 if isinstance(err, RequestError) else 500, str(err))


async def _not_understood(request: Request, err: Exception) -> Response:
    return _refusal(400, f"the request is not understood ({err}); reload the page")


async def _too_large(request: Request, err: Exception) -> Response:
    limit = err.args[0]
    what = f"{limit // 2**20} MiB" if limit >= 2**20 else f"{limit // 2**10} KiB"
    return _refusal(413, f"that is more than {what}, which is the most that is taken; choose something smaller")


async def _gone(request: Request, err: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it
