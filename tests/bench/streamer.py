"""A node that streams: as fast as it is read, or each token at its time. `python -m tests.bench.streamer MODEL PORT...`.

One process, one epoll, any number of ports, so that hundreds of thousands of tokens in a second cost little. What it does with a request
stands in the prompt: `tokens=200 rate=50` is a token each 20 ms; without a rate the lines go out ten to a write. Each token is its number
and the monotonic time at which it was sent, of fixed width, so a client on the same machine can see what was lost, reordered or late.
Invariant: a stream's lines are sent in order, and the last one says `done`.
"""

import gc
import heapq
import json
import re
import select
import socket
import sys
import time

TOKENS = 200
BURST = 10
OUT_MAX_BYTES = 1 << 20
"""Of one stream that its reader does not take; it waits then."""
MARK = b'"content":" '
"""Comes before a token."""
NUMBER_WIDTH, TIME_WIDTH = 6, 16
_WISHES = re.compile(rb"tokens=(\d+)(?: rate=([\d.]+))?")
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def lists(model: str) -> dict[bytes, bytes]:
    """What a node with this one model, loaded, answers to the questions of a router."""
    row = {
        "name": model, "model": model, "size": 1_000_000_000, "digest": model.encode().hex().ljust(64, "0")[:64],
        "details": {"format": "gguf", "family": "llama", "families": ["llama"], "parameter_size": "1B", "quantization_level": "Q4_K_M"},
    }  # fmt: skip
    tags = {"models": [{**row, "modified_at": "2026-01-01T00:00:00Z"}]}
    loaded = {"models": [{**row, "size_vram": 1_000_000_000, "expires_at": "2318-01-01T00:00:00Z", "context_length": 4096}]}
    values = {b"/api/tags": tags, b"/api/ps": loaded, b"/api/version": {"version": "0.33.0"}}
    return {path: json.dumps(value).encode() for path, value in values.items()}


class Stream:
    """One connection, and the answer it is in the middle of."""

    __slots__ = ("blocked", "data", "next", "out", "pause_s", "sock", "tokens")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.data = b""
        self.out = bytearray()
        self.blocked = False
        self.tokens = 0
        self.next = 0
        self.pause_s = 0.0


class Streamer:
    """All connections of one process."""

    def __init__(self, model: str) -> None:
        self._lists = lists(model)
        self._epoll = select.epoll()
        self._listening: dict[int, socket.socket] = {}
        self._streams: dict[int, Stream] = {}
        self._fast: dict[int, Stream] = {}
        self._due: list[tuple[float, int, Stream]] = []
        self._begun = 0
        """Paced streams so far; their numbers break ties."""
        name = json.dumps(model).encode()
        self._line = (
            b'{"model":%b,"created_at":"2026-01-01T00:00:00.123456789Z","message":{"role":"assistant",' % name
            + MARK + b'%06d %016d"},"done":false}\n'
        )  # fmt: skip
        self._size = b"%x\r\n" % len(self._line % (0, 0))
        last = (
            b'{"model":%b,"created_at":"2026-01-01T00:00:00.123456789Z","message":{"role":"assistant","content":""},"done":true,'
            % name
            + b'"done_reason":"stop","total_duration":1234567890,"load_duration":45678901,"prompt_eval_count":26,'
            b'"prompt_eval_duration":130079000,"eval_count":199,"eval_duration":932710000}\n'
        )
        self._end = _chunk(last) + b"0\r\n\r\n"

    def listen(self, port: int) -> None:
        sock = socket.create_server(("127.0.0.1", port), backlog=4096)
        sock.setblocking(False)
        self._listening[sock.fileno()] = sock
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def run(self) -> None:
        while True:
            wait_s = 0.0 if self._fast else (max(0.0, self._due[0][0] - time.monotonic()) if self._due else -1)
            for number, event in self._epoll.poll(wait_s):
                if number in self._listening:
                    self._accept(self._listening[number])
                elif (stream := self._streams.get(number)) is not None:
                    if event & select.EPOLLOUT:
                        self._flush(stream)
                    if event & ~select.EPOLLOUT:
                        self._read(stream)
            for stream in list(self._fast.values()):
                self._burst(stream)
            self._send_due()

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(256):
            try:
                sock, _ = listening.accept()
            except OSError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._streams[sock.fileno()] = Stream(sock)
            self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _read(self, stream: Stream) -> None:
        try:
            got = stream.sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            got = b""
        if not got:
            self._close(stream)
            return
        stream.data += got
        head, found, rest = stream.data.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        size = int(length[1]) if length is not None else 0
        if not found or len(rest) < size:
            return
        stream.data = rest[size:]
        path = head.split(b" ", 2)[1]
        if path in self._lists:
            body = self._lists[path]
            self._send(stream, b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            return
        wishes = _WISHES.search(rest[:size])
        stream.tokens = int(wishes[1]) if wishes is not None else TOKENS
        stream.next = 0
        if wishes is not None and wishes[2] is not None:
            stream.pause_s = 1 / float(wishes[2])
            self._begun += 1
            heapq.heappush(self._due, (time.monotonic(), self._begun, stream))
            self._send(stream, _HEAD)
        else:
            self._fast[stream.sock.fileno()] = stream

    def _made(self, number: int) -> bytes:
        return self._size + self._line % (number, time.monotonic_ns()) + b"\r\n"

    def _burst(self, stream: Stream) -> None:
        """Ten lines of a stream that has no pace."""
        if stream.blocked:
            return
        until = min(stream.next + BURST, stream.tokens - 1)
        data = (_HEAD if stream.next == 0 else b"") + b"".join([self._made(number) for number in range(stream.next, until)])
        stream.next = until
        if until == stream.tokens - 1:
            del self._fast[stream.sock.fileno()]
            data += self._end
        self._send(stream, data)

    def _send_due(self) -> None:
        due = self._due
        now = time.monotonic()
        while due and due[0][0] <= now:
            at, number, stream = due[0]
            if stream.sock.fileno() < 0:
                heapq.heappop(due)
                continue
            if len(stream.out) > OUT_MAX_BYTES:
                heapq.heapreplace(due, (now + stream.pause_s, number, stream))
                continue
            last = stream.next == stream.tokens - 1
            if last:
                heapq.heappop(due)
            else:
                heapq.heapreplace(due, (at + stream.pause_s, number, stream))
            self._send(stream, self._end if last else self._made(stream.next))
            stream.next += 1

    def _send(self, stream: Stream, data: bytes) -> None:
        if stream.blocked:
            stream.out += data
            return
        try:
            sent = stream.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._close(stream)
            return
        if sent < len(data):
            stream.out += data[sent:]
            stream.blocked = True
            self._epoll.modify(stream.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _flush(self, stream: Stream) -> None:
        try:
            del stream.out[: stream.sock.send(stream.out)]
        except BlockingIOError:
            return
        except OSError:
            self._close(stream)
            return
        if not stream.out:
            stream.blocked = False
            self._epoll.modify(stream.sock.fileno(), select.EPOLLIN)

    def _close(self, stream: Stream) -> None:
        number = stream.sock.fileno()
        if number >= 0:
            self._streams.pop(number, None)
            self._fast.pop(number, None)
            stream.sock.close()


def main() -> None:
    streamer = Streamer(sys.argv[1])
    for port in sys.argv[2:]:
        streamer.listen(int(port))
    gc.disable()  # nothing here makes cycles, and a collection would be a gap
    streamer.run()


if __name__ == "__main__":
    main()
