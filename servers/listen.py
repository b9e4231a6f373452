"""The sockets of the coordinator: the public ports, and the internal one behind which Hypercorn runs the web app.

Decides where to listen, and says plainly when it cannot. Invariant: nobody but this process's user reaches the web app past the
listener: a unix socket in a directory of mode 0700, or, where there are none, a loopback port whose callers must know a secret.
"""

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hypercorn.config import Config, Sockets
from hypercorn.trio.run import worker_serve
from hypercorn.utils import wrap_app
from quart_trio import QuartTrio

from core.events import Upstream
from edge.listener import bind

WEB_BACKLOG: Final = 1024
WEB_IDLE_S: Final = 3600.0
"""Longer than the pool keeps a connection, so that only the pool closes idle ones."""

HEAD_MAX_BYTES: Final = 128 << 10
"""Of a request as the listener passes it on: its own limit, and what it adds."""


class CannotListen(Exception):
    """A port cannot be opened; one line that says which, why and what to do."""


def open_ports(host: str, ports: list[tuple[str, int]]) -> list[socket.socket]:
    """Listening sockets for all `ports`, each with the name of the setting it comes from.

    Raises:
        CannotListen: for the first that cannot be opened; none stays open.
    """
    opened: list[socket.socket] = []
    for setting, port in ports:
        try:
            opened += bind(host, port)
        except OSError as error:
            for sock in opened:
                sock.close()
            why = error.strerror or str(error)
            raise CannotListen(f"cannot listen on {host} port {port}: {why}; choose another with {setting} (and ROUTER_HOST)") from None
    return opened


def ports_of(sockets: list[socket.socket]) -> tuple[int, ...]:
    """The ports that are listened on, each once."""
    return tuple(dict.fromkeys(sock.getsockname()[1] for sock in sockets))


@contextmanager
def internal_socket() -> Iterator[tuple[socket.socket, Upstream]]:
    """A listening socket for the web app, and where the listener reaches it; removed at the end."""
    if not hasattr(socket, "AF_UNIX"):
        with socket.create_server(("127.0.0.1", 0), backlog=WEB_BACKLOG) as loopback:
            loopback.setblocking(False)
            yield loopback, Upstream(host="127.0.0.1", port=loopback.getsockname()[1])
        return
    directory = Path(tempfile.mkdtemp(prefix="ollama-router-"))
    try:
        path = str(directory / "web")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.bind(path)
            os.chmod(path, 0o600)
            sock.listen(WEB_BACKLOG)
            sock.setblocking(False)
            yield sock, Upstream(host=f"unix:{path}", port=0)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def serve_web(app: QuartTrio, sock: socket.socket, until: Callable[[], Awaitable[None]]) -> None:
    """Run the web app on `sock` until `until` returns."""
    config = Config()
    config.errorlog = logging.getLogger("hypercorn.error")
    config.accesslog = None
    config.include_server_header = False
    config.keep_alive_timeout = WEB_IDLE_S
    config.keep_alive_max_requests = 1 << 62
    config.graceful_timeout = 1.0
    config.h11_max_incomplete_size = HEAD_MAX_BYTES
    listening = Sockets([], [sock], [])
    await worker_serve(wrap_app(app, HEAD_MAX_BYTES, "asgi"), config, sockets=listening, shutdown_trigger=until)
