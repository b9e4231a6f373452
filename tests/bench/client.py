"""A client that holds many streams and sees each token's arrival. `python -m tests.bench.client JSON` (the fields of `Order`).

A process of its own with one epoll, so that it is not what is measured; its answer says how much of a core it took. Opens the streams
evenly over `ramp_s`, prints the line `open` when all have had their first token, watches for `hold_s`, and prints one line of JSON
(`Seen`). Invariant: a stream counts as whole only when every number came once and in order, and for one that is to end, its last line
and its last chunk. Gaps are those between arrivals; tokens that came together are one arrival and gaps of zero.
"""

import gc
import select
import socket
import sys
import time
from array import array
from typing import Any

import httptools
import msgspec

from tests.bench.streamer import MARK, NUMBER_WIDTH, TIME_WIDTH

CONNECTING_AT_ONCE = 64
PATIENCE_S = 60.0
"""After the end of the hold, for streams that are to end; and for all first tokens."""
_AT = len(MARK)


class Order(msgspec.Struct, kw_only=True):
    """What to do."""

    port: int
    models: list[str]
    """Streams take them in turn."""
    streams: int
    rate: float
    """Tokens per second of one stream."""
    tokens: int
    """Of one stream. More than fit into the hold: the client leaves in the middle."""
    ramp_s: float
    hold_s: float
    to_the_end: bool = False
    """Wait for the end of each stream."""


class Seen(msgspec.Struct, kw_only=True):
    """What came. Times in milliseconds."""

    streams: int
    whole: int
    """Streams without any fault: as far as they were watched, or to their end."""
    lost: int
    """Streams that ended early, with an error or not at all."""
    reordered: int
    """Streams in which a number was missing, twice, or out of order."""
    tokens: int
    """In the hold."""
    seconds: float
    """How long the hold was."""
    gap_p50_ms: float
    gap_p99_ms: float
    """Of all gaps of all streams."""
    worst_p99_ms: float
    """The p99 of the stream whose p99 is the largest."""
    gap_max_ms: float
    late_p50_ms: float
    late_p99_ms: float
    """From the node's send to the client's read."""
    cpu_share: float
    """Of one core, that this client took in the hold."""
    errors: list[str]
    """Some of what went wrong."""


class _Stream:
    """One request. `on_...` are the parser's callbacks."""

    __slots__ = (
        "ended", "error", "fileno", "gaps", "last_ns", "lates", "line", "next", "now_ns", "parser", "reordered", "sock", "status",
        "watched",
    )  # fmt: skip

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fileno = sock.fileno()
        self.parser: Any = httptools.HttpResponseParser(self)
        self.line = b""
        self.next = 0
        self.last_ns = self.now_ns = 0
        self.gaps = array("d")
        self.lates = array("d")
        self.watched = False
        self.reordered = False
        self.status = 0
        self.ended = False
        self.error = ""

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        *lines, self.line = (self.line + body if self.line else body).split(b"\n")
        for line in lines:
            self._token(line)

    def on_message_complete(self) -> None:
        self.ended = True

    def _token(self, line: bytes) -> None:
        at = line.find(MARK) + _AT
        if at < _AT:
            if b'"done":true' not in line:
                self.error = line[:200].decode(errors="replace")
            return
        if int(line[at : at + NUMBER_WIDTH]) != self.next:
            self.reordered = True
        self.next += 1
        now = self.now_ns
        if self.watched:
            self.gaps.append((now - self.last_ns) / 1e6)
            sent = at + NUMBER_WIDTH + 1
            self.lates.append((now - int(line[sent : sent + TIME_WIDTH])) / 1e6)
        self.last_ns = now


class Client:
    """All streams of one order."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._epoll = select.epoll()
        self._streams: dict[int, _Stream] = {}
        self._all: list[_Stream] = []
        self._unstarted = 0

    def _open_one(self) -> None:
        number = len(self._all)
        order = self._order
        model = order.models[number % len(order.models)]
        prompt = f"tokens={order.tokens} rate={order.rate} stream {number}"
        body = msgspec.json.encode({"model": model, "messages": [{"role": "user", "content": prompt}]})
        sock = socket.create_connection(("127.0.0.1", order.port), timeout=PATIENCE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(
            b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        sock.setblocking(False)
        stream = _Stream(sock)
        self._all.append(stream)
        self._streams[stream.fileno] = stream
        self._epoll.register(stream.fileno, select.EPOLLIN)

    def _turn(self, wait_s: float) -> None:
        for number, _ in self._epoll.poll(max(0.0, wait_s)):
            stream = self._streams[number]
            try:
                data = stream.sock.recv(1 << 16)
            except BlockingIOError:
                continue
            except OSError as error:
                data, stream.error = b"", str(error)
            stream.now_ns = time.monotonic_ns()
            if data:
                try:
                    stream.parser.feed_data(data)
                except httptools.HttpParserError as error:
                    stream.error = str(error)
            if not data or stream.ended or stream.error:
                self._close(stream)

    def _close(self, stream: _Stream) -> None:
        del self._streams[stream.fileno]
        self._epoll.unregister(stream.fileno)
        stream.sock.close()

    def _ramp(self) -> None:
        order = self._order
        began = time.monotonic()
        for number in range(order.streams):
            at = began + order.ramp_s * number / order.streams
            while (left := at - time.monotonic()) > 0:
                self._turn(left)
            self._open_one()
            if number % CONNECTING_AT_ONCE == 0:
                self._turn(0)
        until = time.monotonic() + PATIENCE_S
        while any(stream.next == 0 for stream in self._streams.values()) and time.monotonic() < until:
            self._turn(0.05)

    def run(self) -> Seen:
        order = self._order
        self._ramp()
        print("open", flush=True)
        for stream in self._streams.values():
            stream.watched = stream.next > 0
            stream.gaps, stream.lates = array("d"), array("d")
        began, cpu = time.monotonic(), time.process_time()
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection would be a gap
        while (left := began + order.hold_s - time.monotonic()) > 0 and self._streams:
            self._turn(left)
        seconds = time.monotonic() - began
        share = (time.process_time() - cpu) / seconds
        for stream in self._all:
            stream.watched = False
        alive = set(self._streams)
        until = time.monotonic() + PATIENCE_S
        while order.to_the_end and self._streams and (left := until - time.monotonic()) > 0:
            self._turn(left)
        return self._seen(seconds, share, alive)

    def _seen(self, seconds: float, share: float, alive: set[int]) -> Seen:
        order = self._order
        if order.to_the_end:
            lost = [one for one in self._all if not (one.ended and one.next == order.tokens - 1 and not one.error)]
        else:
            lost = [one for one in self._all if one.fileno not in alive or one.error or one.next == 0]
        reordered = [one for one in self._all if one.reordered]
        gaps = sorted(gap for one in self._all for gap in one.gaps)
        lates = sorted(late for one in self._all for late in one.lates)
        errors = [f"{one.status} after {one.next} tokens: {one.error or 'the connection ended'}" for one in lost[:5]]
        return Seen(
            streams=len(self._all), whole=len(self._all) - len({id(one) for one in (*lost, *reordered)}), lost=len(lost),
            reordered=len(reordered), tokens=len(gaps), seconds=seconds, gap_p50_ms=_at(gaps, 0.5), gap_p99_ms=_at(gaps, 0.99),
            worst_p99_ms=max((_at(sorted(one.gaps), 0.99) for one in self._all if one.gaps), default=0.0),
            gap_max_ms=gaps[-1] if gaps else 0.0, late_p50_ms=_at(lates, 0.5), late_p99_ms=_at(lates, 0.99), cpu_share=share, errors=errors,
        )  # fmt: skip


def _at(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def main() -> None:
    order = msgspec.json.decode(sys.argv[1], type=Order)
    print(msgspec.json.encode(Client(order).run()).decode(), flush=True)


if __name__ == "__main__":
    main()
