"""Keeps the process that writes: starts it, hands it what waits, hears what became of it, and starts another when it is gone.

Decides who writes now: that process, or a thread of this one as long as there is none. Must never know what is kept. Invariants: nothing
here waits for the disk in the loop; what was not confirmed by a process that is gone is written by who comes next, and never by two at
once; a process gets no more ahead of its confirmations than `AHEAD_MAX` items; when `close` returns, it has ended.

Why a process: a thread that writes takes the interpreter from the loop at every statement, and gives it back late.
"""

import contextlib
import queue
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Final

import structlog
import trio
from sqlalchemy import Engine

from core.errors import RemoteError
from servers.aside import command
from servers.store import messages
from servers.store.messages import Config, Delete, Deleted, Done, Failed, Imported, Ready, Said, Sync, Word, Works
from servers.store.outbox import Outbox, Parcel
from servers.store.packed import Packed
from servers.store.writer import Writer

FLUSH_S: Final = 0.1
"""Longest time that something waits before it is handed over; contract 6 allows a crash to lose 250 ms."""
AHEAD_MAX: Final = 32
"""Items that are not confirmed; the others wait here, where bodies can be dropped."""
AGAIN_S: Final = 1.0
"""Until a process that is gone is followed by another; each time in a row that none comes to be ready, twice as long."""
AGAIN_MAX_S: Final = 60.0
END_LIMIT_S: Final = 5.0
"""What a process gets to end when nobody speaks to it any more."""
RECEIVE_BYTES: Final = 1 << 16
SEND_BYTES: Final = 1 << 18
"""Of the socket's buffer, where the system grants it."""
FAILS: Final = "history cannot be written: requests go on, what they leave is kept in memory as long as there is room"


class Child:
    """One process and the socket to it; that is its standard input, so it sees when this process is gone."""

    def __init__(self, config: Config) -> None:
        """Starts it. Raises OSError."""
        ours, its = socket.socketpair()
        argv, environ = command("servers.store")
        try:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(argv, stdin=its.fileno(), stdout=subprocess.DEVNULL, env=environ)
        except OSError:
            ours.close()
            raise
        finally:
            its.close()
        ours.sendall(messages.framed(config))  # small enough for any socket's buffer
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        self.socket = ours
        self.ready = False
        self.ahead: set[int] = set()
        """Items that it has not confirmed."""
        self._unsent = memoryview(b"")
        self._frames = messages.Frames()

    def queue(self, item: Parcel) -> None:
        """The next item to be sent; call it when `flush` is through."""
        assert not self._unsent
        self.ahead.add(item.number)
        self._unsent = memoryview(item.frame if isinstance(item, Packed) else messages.framed(item))

    async def flush(self) -> None:
        """Send what is queued. Raises OSError or ClosedResourceError when the process is gone."""
        while self._unsent:
            try:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.socket)

    async def hear(self, heard: Callable[[Word], None]) -> None:
        """Hear it until it is gone."""
        while True:
            await trio.lowlevel.wait_readable(self.socket)
            if not self._hear_some(heard):
                return

    def _hear_some(self, heard: Callable[[Word], None]) -> bool:
        try:
            data = self.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        for frame in self._frames.take(data):
            heard(messages.word_of(frame))
        return bool(data)

    def finish(self, items: Callable[[], Parcel | None], heard: Callable[[Word], None], *, limit_s: float) -> None:
        """Send all there is and hear it to its end. Blocks. Raises OSError (TimeoutError at the limit)."""
        deadline = time.monotonic() + limit_s

        def hurry() -> None:
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))

        while True:
            while self._unsent:
                hurry()
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
            item = items()
            if item is None:
                break
            self.queue(item)
        self.socket.shutdown(socket.SHUT_WR)
        hurry()
        while self._hear_some(heard):
            hurry()

    def end(self) -> int:
        """Close the socket and see that the process ends; blocks. Returns its status."""
        self.socket.close()
        try:
            return self.process.wait(END_LIMIT_S if self.ready else 0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class Feed:
    """One per coordinator. `put*` at any time, `run` it while it should be written at once, `close` it."""

    def __init__(self, engine: Engine, config: Config) -> None:
        self._engine = engine
        self._config = config
        self.outbox = Outbox()
        self.deleted_bytes = 0
        """That went by age and size."""
        self.imported = False
        """Whether the files of earlier routers are done with."""
        self._child: Child | None = None
        self._local: Writer | None = None
        self._told: queue.SimpleQueue[Word] = queue.SimpleQueue()
        """By the local writer."""
        self._local_ahead: set[int] = set()
        self._asked: dict[int, _Answer] = {}
        self._wake = trio.Event()
        self._missing = False
        """No process does its work; that has been said."""
        self._started = False
        self._log = structlog.get_logger()

    def start(self) -> None:
        """Start the process, so that it is there soon; from now on what is put is written."""
        self._started = True
        try:
            self._child = Child(self._config)
        except OSError as error:
            self._miss(error.strerror)

    @property
    def pid(self) -> int | None:
        """Of the process that writes; None: none is ready."""
        return self._child.process.pid if self._child is not None and self._child.ready else None

    @property
    def thread_writes(self) -> bool:
        """Whether a thread of this process has work."""
        return bool(self._local_ahead)

    async def ask(self, make: "Callable[[int], Delete | Sync]") -> int:
        """Have something done after what was put; returns its answer. `run` must be running.

        Raises:
            RemoteError: it cannot be.
        """
        if self.outbox.written.failing is not None:
            raise RemoteError(f"the database does not answer: {self.outbox.written.failing}", status=503)
        number = self.outbox.ask(make)
        answer = self._asked[number] = _Answer()
        self._wake.set()
        try:
            await answer.there.wait()
        finally:
            del self._asked[number]
        if answer.error is not None:
            raise RemoteError(f"the database does not answer: {answer.error}", status=503)
        return answer.value

    # ------------------------------------------------------------ while the loop runs

    async def run(self) -> None:
        """Hand over what waits, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_child)
            while True:
                with trio.move_on_after(FLUSH_S):
                    await self._wake.wait()
                self._wake = trio.Event()
                await self._hand_over()

    async def _keep_child(self) -> None:
        pause_s = AGAIN_S
        while True:
            child = self._child
            if child is not None:
                await child.hear(self._heard)
                trio.lowlevel.notify_closing(child.socket)
                self._child = None
                self.outbox.again(child.ahead)
                status = await trio.to_thread.run_sync(child.end)
                self._miss(f"it ended with status {status}")
                pause_s = AGAIN_S if child.ready else min(pause_s * 2, AGAIN_MAX_S)
                await trio.sleep(pause_s)
            try:
                self._child = await trio.to_thread.run_sync(Child, self._config)
            except OSError as error:
                self._miss(error.strerror)
                pause_s = min(pause_s * 2, AGAIN_MAX_S)
                await trio.sleep(pause_s)

    async def _hand_over(self) -> None:
        self._hear_local()
        child = self._child
        if child is None or not child.ready:
            self._feed_local()
        elif not self._local_ahead:  # else they are written first
            try:
                await child.flush()
                while self._child is child and len(child.ahead) < AHEAD_MAX and (item := self.outbox.next()) is not None:
                    child.queue(item)
                    await child.flush()
                    await trio.lowlevel.checkpoint()
            except (OSError, trio.ClosedResourceError):
                pass  # `_keep_child` sees it as well

    def _feed_local(self) -> None:
        while len(self._local_ahead) < AHEAD_MAX and (item := self.outbox.next()) is not None:
            self._local_ahead.add(item.number)
            self._put_local(item)

    def _put_local(self, item: Parcel) -> None:
        self._local_writer().put(item.batch() if isinstance(item, Packed) else item)

    def _local_writer(self) -> Writer:
        if self._local is None:
            self._local = Writer(self._engine, coordinator_id=self._config.coordinator_id, tell=self._told.put)
            self._local.start()
        return self._local

    def _hear_local(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._heard(self._told.get_nowait())

    # ------------------------------------------------------------ at the end

    def close(self, *, limit_s: float) -> None:
        """Write what waits; blocks for `limit_s` and a little at most."""
        if self._child is not None:
            self._finish(self._child, limit_s)
        if self._started and (self._local is not None or not self.outbox.is_empty):
            self._finish_local(limit_s)
        self.outbox.give_up()
        for answer in self._asked.values():
            answer.fail("the coordinator stops")

    def _finish(self, child: Child, limit_s: float) -> None:
        late = False
        try:
            if child.ready and not self._local_ahead:
                child.finish(self.outbox.next, self._heard, limit_s=limit_s)
        except TimeoutError:
            late = True
        except OSError:
            pass
        child.end()
        self._child = None
        if late:  # it may have written it in the end; nobody knows
            self.outbox.give_up()
        self.outbox.again(child.ahead)

    def _finish_local(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while (item := self.outbox.next()) is not None:
            self._put_local(item)
        if self._local is not None:
            self._local.stop(limit_s=deadline - time.monotonic())
        self._hear_local()

    # ------------------------------------------------------------ what is heard

    def _heard(self, word: Word) -> None:
        written = self.outbox.written
        match word:
            case Done():
                self._done(word)
            case Failed():
                written.failures += 1
                if written.failing is None:
                    self._log.error(FAILS, why=word.why)
                    for answer in self._asked.values():
                        answer.fail(word.why)
                written.failing = word.why
            case Works():
                self._works()
            case Said():
                self._log.log(_LEVELS[word.level], word.event, **word.fields)
            case Deleted():
                self.deleted_bytes += word.size_bytes
            case Imported():
                self.imported = True
            case Ready():
                if self._child is not None:
                    self._child.ready = True
                if self._missing:
                    self._missing = False
                    self._log.info("the process that writes history is there again")

    def _works(self) -> None:
        written = self.outbox.written
        if written.failing is not None:
            self._log.info("history is written again", records_dropped=written.records_dropped)
            written.failing = None

    def _done(self, done: Done) -> None:
        item = self.outbox.confirmed(done)
        if isinstance(item, Packed) and not done.dropped:
            self._works()  # who failed may be gone since
        self._local_ahead.discard(done.number)
        if self._child is not None:
            self._child.ahead.discard(done.number)
        answer = self._asked.get(done.number)
        if answer is not None:
            answer.put(done.answer, done.error)

    def _miss(self, why: str | None) -> None:
        """There is no process; once."""
        if not self._missing:
            self._missing = True
            self._log.error("the process that writes history is gone: a thread does its work until there is another", why=why)


_LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class _Answer:
    def __init__(self) -> None:
        self.there = trio.Event()
        self.value = 0
        self.error: str | None = None

    def put(self, value: int, error: str | None) -> None:
        self.value, self.error = value, error
        self.there.set()

    def fail(self, why: str) -> None:
        self.put(0, why)
