"""A bundle served to the browser of this machine, at a port of the loopback, until somebody ends it."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from runtime.errors import RequestError

if TYPE_CHECKING:
    from runtime.serve.desk import Desk

HOST = "127.0.0.1"


def serve(
    path: Path, *, port: int, say: Callable[[str], None], tell: Callable[[str], None], verbose: bool = False
) -> NoReturn:
    """Serves a bundle until Ctrl-C, which is a KeyboardInterrupt; port 0 takes a free one.

    `say` gets the address once the graphs are open, `tell` what happens before. What lies on the disk meanwhile is in a
    temporary folder, a photo only as long as it is read. Raises RequestError, BundleError, EngineError.
    """
    try:
        import starlette
        import uvicorn
    except ModuleNotFoundError as err:
        raise RequestError(
            f"the page needs {err.name}, which is not installed here; run: pip install 'pruneport[serve]'"
        ) from err
    del starlette, uvicorn
    from runtime.serve.desk import Desk

    with tempfile.TemporaryDirectory(prefix="pruneport-serve-") as folder:
        desk = Desk(path, Path(folder), verbose=verbose)
        with _bound(port) as bound:
            asyncio.run(_run(desk, bound, say=say, tell=tell, verbose=verbose))
    # Only a signal ends it. Where its parent ignores SIGINT, as a shell's background does, the server alone is told.
    raise KeyboardInterrupt


def _bound(port: int) -> socket.socket:
    """A socket at a port of the loopback; RequestError where it cannot be had."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((HOST, port))
        bound.listen()
    except OSError as err:
        bound.close()
        why = {errno.EADDRINUSE: "is in use", errno.EACCES: "is for the system's own programs"}.get(err.errno or 0)
        raise RequestError(
            f"port={port} {why or f'cannot be used: {err.strerror}'}; give another one with --port, or --port 0, which "
            "takes a free one"
        ) from err
    return bound


async def _run(
    desk: Desk,
    bound: socket.socket,
    *,
    say: Callable[[str], None],
    tell: Callable[[str], None],
    verbose: bool,
) -> None:
    import uvicorn

    from runtime.serve.app import make_app

    class Server(uvicorn.Server):
        """A server that ends what is being answered before it waits for it."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await desk.close()
            await super().shutdown(sockets)

    port = bound.getsockname()[1]
    config = uvicorn.Config(
        make_app(desk, port=port),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=verbose,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    logging.getLogger("uvicorn").setLevel(logging.INFO if verbose else logging.CRITICAL)
    try:
        tell(f"opening {desk.bundle.manifest.name}")
        await desk.check()
        say(f"http://{HOST}:{port}/")
        await Server(config).serve(sockets=[bound])
    finally:
        await desk.close()
