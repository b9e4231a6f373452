"""`python -m servers.store`: the process that writes. The coordinator starts it, and speaks to it over its standard input, a socket.

Decides what runs in it: the writer, the chores, the mirror. Invariants: it ends when the coordinator is gone, in whatever way, once what
it had read is written; signals, which a terminal or a service manager sends to both, do not end it before; nothing that it holds or says
is the only copy of anything.
"""

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection
from sqlalchemy.engine import make_url

from core.units import UnixMs
from servers.records import restrict
from servers.store import messages
from servers.store.engine import known_engine
from servers.store.messages import Config, Deleted, Imported, Ready, Said, Word
from servers.store.retention import Retention
from servers.store.statements import Statements
from servers.store.writer import Writer
from servers.yielding import yield_to_serving

STOP_LIMIT_S: Final = 15.0
"""What writing gets once the coordinator is gone."""
RECEIVE_BYTES: Final = 1 << 18


class _Line:
    """The socket to the coordinator."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()

    def frames(self) -> Iterator[bytes]:
        """What the coordinator sends, until it is gone."""
        frames = messages.Frames()
        while True:
            try:
                data = self._socket.recv(RECEIVE_BYTES)
            except ConnectionError:
                return
            if not data:
                return
            yield from frames.take(data)

    def tell(self, word: Word) -> None:
        """Tell the coordinator, if it is still there; from any thread."""
        with self._lock:
            try:
                self._socket.sendall(messages.framed(word))
            except OSError:
                pass


def main() -> None:
    """Write until the coordinator is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    yield_to_serving()
    line = _Line(socket.socket(fileno=0))
    frames = line.frames()
    config = messages.config_of(next(frames, b""))
    engine = known_engine(make_url(config.url))
    writer = Writer(engine, coordinator_id=config.coordinator_id, tell=line.tell)
    writer.add_chore(_Cleaning(config, line))
    ended = _take_over(config, line, writer, engine)
    writer.start()
    gc.freeze()  # what comes from now on has no cycles, and is much
    gc.set_threshold(50_000, 50, 50)
    line.tell(Ready())
    for frame in frames:
        writer.put(messages.item_of(frame))
    ended.set()
    if writer.stop(limit_s=STOP_LIMIT_S):
        engine.dispose()
    os._exit(0)  # a mirror may be written yet: it is replaced whole or not at all


class _Cleaning:
    """Retention, and what it says of itself."""

    def __init__(self, config: Config, line: _Line) -> None:
        self._retention = Retention(days=config.retention_days, max_bytes=config.max_bytes, clock=_unix_ms)
        self._line = line
        self._told = 0

    def __call__(self, connection: Connection, statements: Statements, /) -> float:
        again_s = self._retention(connection, statements)
        gone = self._retention.deleted_bytes
        if gone != self._told:
            self._line.tell(Deleted(gone - self._told))
            self._told = gone
        return again_s


def _take_over(config: Config, line: _Line, writer: Writer, engine: Any) -> threading.Event:
    """Import an earlier router's history, then perhaps mirror the newest records to its file. Returns what ends the mirror."""
    ended = threading.Event()
    if config.mirror is None and not any(Path(name).exists() for name in config.imported):
        line.tell(Imported())
        return ended
    _speak(line)
    from servers.history_mirror import Import, Mirror  # with the wire and the web behind them, which nothing else needs here

    keep = partial(restrict, policy=config.bodies, limit_bytes=config.body_max_bytes, masks=config.masks)
    importing = Import(
        [Path(name) for name in config.imported],
        clock=_unix_ms,
        retention_days=config.retention_days,
        keep=keep,
        owned=[] if config.mirror is None else [Path(config.mirror)],
        done=lambda: line.tell(Imported()),
    )
    writer.add_chore(importing)
    if config.mirror is not None:
        mirror = Mirror(engine, Path(config.mirror), ready=lambda: importing.is_done)
        threading.Thread(target=mirror.run, args=(ended,), daemon=True).start()
    return ended


def _speak(line: _Line) -> None:
    """What is logged here is logged by the coordinator."""
    import structlog

    def tell(_: Any, level: str, said: Any) -> Any:
        event = said.pop("event")
        line.tell(Said(level, event, {name: value if isinstance(value, int) else str(value) for name, value in said.items()}))
        raise structlog.DropEvent

    structlog.configure(processors=[tell])


def _unix_ms() -> UnixMs:
    return UnixMs(time.time_ns() // 1_000_000)


if __name__ == "__main__":
    main()
