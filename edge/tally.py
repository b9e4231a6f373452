"""What became of the requests that nginx carries: its own log lines, and what the nodes' gateways report, put together.

Decides when such a request is over and how it ended. nginx's line is a hint: it frees the lease of a gateway's request at once and settles
it only if its report does not come; where the node has no gateway, it is all that will be known. A report settles alone.

Invariants: each request is settled once; an agent ends only what is on itself; anything that cannot be read is counted and dropped; a
line or a report that is lost changes nothing but when the end is known; what nobody reports ends with its lease.
"""

import re
import socket
from collections.abc import Callable, Sequence
from typing import Final

import trio

from core.events import Ending, Failure, Freed, Settled, Usage
from core.leases import Expiry
from core.messages import EndingReport
from core.units import AgentId, Instant, RequestId
from edge.handover import Carried, Decides, Handover

REPORT_WITHIN_S: Final = 2.0
"""After nginx's line a gateway's report comes within this time, or is not waited for any more."""

DIRECT_MAX_S: Final = 3600.0
"""So long at most the lease of a request on a node without a gateway is renewed."""

RECEIVE_BUFFER_BYTES: Final = 8 << 20
DATAGRAM_MAX_BYTES: Final = 4096
READS_IN_A_ROW: Final = 64
"""Datagrams that are read in one step: about a millisecond."""

TOGETHER_S: Final = 0.002
"""How long a line may lie unread when nobody waits for a node: its times say when it was."""
FEW: Final = 4
"""Requests that nginx carries. With no more, there is time to read a line before the next question, which need not wait for that then."""

CLIENT_LEFT: Final = 499
LINE_FIELDS: Final = 6
STAMP_BYTES: Final = len(b"<190>Jan  1 00:00:00 router: ")
"""What stands before the commonest line."""
REQUEST_ID_LETTERS: Final = 36
"""Of a lease's id, before the slash and the number of the attempt."""
STATUS_DIGITS: Final = 3
DIGITS_MAX: Final = 18
SECONDS_DIGITS_MAX: Final = 11
_SPACE: Final = 0x20
_POINT: Final = 0x2E
_SLASH: Final = 0x2F
_ENDS: Final = (b" OK", b" OK\n", b" ")

_CUT: Final = re.compile(
    rb"<\d+>.{15} cut: (?:\d\S* \S+ )?\[\w+\] (\d+)#\d+: \*(\d+) "
    rb"(?:([^,]{1,200}) while reading upstream|(upstream [^,]{1,200}) while sending to client), "
)
"""An error of nginx's that says that a node broke an answer off. What a client has a word in comes behind it."""

_SUCCESS: Final = Ending.SUCCESS
_ENDINGS: Final = {ending._value_: ending for ending in Ending}
_FAULTS: Final = {failure._value_: failure for failure in Failure}


class Seen:
    """What nginx saw of one request that it forwarded. Times in ms, since it sent the request to the node. Never changed."""

    __slots__ = ("body_bytes", "completed", "duration_ms", "lease_id", "status", "ttft_ms")

    def __init__(
        self, lease_id: str, status: int, body_bytes: int, ttft_ms: float | None, duration_ms: float | None, completed: bool
    ) -> None:
        self.lease_id: Final = lease_id
        self.status: Final = status
        self.body_bytes: Final = body_bytes
        self.ttft_ms: Final = ttft_ms
        self.duration_ms: Final = duration_ms
        self.completed: Final = completed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seen) and self._told() == other._told()

    def __hash__(self) -> int:
        return hash(self._told())

    def __repr__(self) -> str:
        return f"Seen{self._told()}"

    def _told(self) -> tuple[str, int, int, float | None, float | None, bool]:
        return self.lease_id, self.status, self.body_bytes, self.ttft_ms, self.duration_ms, self.completed


def read_line(data: bytes) -> Seen | None:
    """A line of nginx's log as it comes by syslog; None: it is none.

    Behind the first `: ` there are a lease id, status, body bytes, seconds until the node's head and the end of its answer, and `OK` when
    it was complete; `-` or nothing where there is none, "a : b" and "a, b" where several were asked: the last one counts.
    """
    seen = _read_common(data)
    return _read_any(data) if seen is None else seen


def _read_common(data: bytes) -> Seen | None:
    """The commonest line: about one node, after the selection, which nginx counts as asked too. None: any other."""
    size, at = len(data), STAMP_BYTES + REQUEST_ID_LETTERS
    if not _is(data, at, _SLASH) or data[STAMP_BYTES - 2 : STAMP_BYTES] != b": ":
        return None
    while at < size and data[at] != _SPACE:
        at += 1
    try:
        lease_id = data[STAMP_BYTES:at].decode("ascii")
    except UnicodeDecodeError:
        return None
    first = at + 1
    status, at = _number(data, first)
    if at != first + STATUS_DIGITS or not _is(data, at, _SPACE):
        return None
    first = at + 1
    body_bytes, at = _number(data, first)
    if at == first or at > first + DIGITS_MAX or not _is(data, at, _SPACE):
        return None
    ttft_ms, at = _second_ms(data, at + 1)
    if at == 0 or not _is(data, at, _SPACE):
        return None
    duration_ms, at = _second_ms(data, at + 1)
    if at == 0 or data[at:] not in _ENDS:
        return None
    return Seen(lease_id, status, body_bytes, float(ttft_ms), float(duration_ms), size > at + 1)


def _second_ms(data: bytes, at: int) -> tuple[int, int]:
    """Of "a : b", seconds to three places both: b in ms, and where it ends; 0 when it is not that."""
    _, at = _as_ms(data, at)
    if at == 0 or data[at : at + 3] != b" : ":
        return 0, 0
    return _as_ms(data, at + 3)


def _as_ms(data: bytes, first: int) -> tuple[int, int]:
    whole, at = _number(data, first)
    if at == first or at > first + SECONDS_DIGITS_MAX or not _is(data, at, _POINT):
        return 0, 0
    part, end = _number(data, at + 1)
    return (whole * 1000 + part, end) if end == at + 4 else (0, 0)


def _number(data: bytes, at: int) -> tuple[int, int]:
    """Of the digits at `at`: what they say, and where they end."""
    number, size = 0, len(data)
    while at < size and 0x30 <= data[at] <= 0x39:
        number = number * 10 + data[at] - 0x30
        at += 1
    return number, at


def _is(data: bytes, at: int, octet: int) -> bool:
    return at < len(data) and data[at] == octet


def _read_any(data: bytes) -> Seen | None:
    _, colon, line = data.partition(b": ")
    fields = (line if colon else data).strip().replace(b", ", b",").replace(b" : ", b",").split(b" ")
    if len(fields) == LINE_FIELDS - 1:
        fields.append(b"")  # not completed
    if len(fields) != LINE_FIELDS:
        return None
    lease_id, status, size, header_s, response_s, completed = fields
    if not (lease_id and status.isdigit() and len(status) == STATUS_DIGITS and size.isdigit() and len(size) <= DIGITS_MAX):
        return None
    if not lease_id.isascii():
        return None
    return Seen(lease_id.decode("ascii"), int(status), int(size), _ms(header_s), _ms(response_s), completed == b"OK")


def _ms(value: bytes) -> float | None:
    last = value.rpartition(b",")[2]
    whole, _, part = last.partition(b".")
    return round(float(last) * 1000, 6) if whole.isdigit() and part.isdigit() and len(last) < 16 else None


class Tally:
    """One per coordinator."""

    def __init__(self, decider: Decides, handover: Handover) -> None:
        self._decider = decider
        self._handover = handover
        self._waiting: Expiry[RequestId] = Expiry(REPORT_WITHIN_S)
        self._told: dict[RequestId, Settled] = {}
        """How the requests in `_waiting` end if nothing more is told."""
        self._connections: dict[bytes, Carried] = {}
        """Of nodes without a gateway."""
        self._named: dict[bytes, Carried] | None = None
        """All that nginx carries now, by connection, while cuts are read."""
        self._sock: socket.socket | None = None
        self.together_s = TOGETHER_S
        self.unreadable = 0
        """Datagrams that were no lines of nginx's."""
        self.unknown = 0
        """Lines and reports of requests that are not here (any more)."""

    # ------------------------------------------------------------ nginx's lines

    def listen(self, sock: socket.socket) -> None:
        """Lines will come to this non-blocking socket: `keep_reading`, or call `drain` now and then."""
        self._sock = sock

    def drain(self) -> bool:
        """Take the datagrams that are there, some at a time; whether there may be more."""
        sock = self._sock
        if sock is None:
            return False
        self._named = None
        for _ in range(READS_IN_A_ROW):
            try:
                data = sock.recv(DATAGRAM_MAX_BYTES)
            except OSError:
                return False
            self.take(data)
        return True

    async def keep_reading(self, someone_waits: Callable[[], bool]) -> None:
        """Take what comes, until cancelled; `together_s` later while nobody waits for a node and more than a `FEW` requests are carried.
        To be woken for a line takes as long as to take three of them, and the selection calls `drain` before it decides meanwhile."""
        sock = self._sock
        assert sock is not None, "nothing to read"
        while True:
            await trio.lowlevel.wait_readable(sock)
            if len(self._handover.table) > FEW and not someone_waits():
                await trio.sleep(self.together_s)
            while self.drain():
                await trio.lowlevel.checkpoint()

    def take(self, data: bytes) -> None:
        """One datagram."""
        seen = read_line(data)
        if seen is None:
            self._take_error(data)
            return
        carried = self._handover.table.get(seen.lease_id.partition("/")[0])
        if carried is None or carried.lease_id != seen.lease_id or carried.handed or carried.freed:
            self.unknown += 1
        elif carried.direct:
            self._forget_connection(carried)
            self._handover.settle(carried, as_nginx_saw(carried.request_id, seen, cut=carried.cut))
        elif carried.request_id in self._told:
            self._settle(carried, self._told[carried.request_id])  # the report of an answer that nginx passed on all the same
        else:
            self._free(carried, seen)

    def _take_error(self, data: bytes) -> None:
        """What nginx calls an error comes before the line of the request that it is about."""
        if b" cut: " not in data[:32]:
            self.unreadable += 1
            return
        if (match := _CUT.match(data)) is None:
            return  # whatever else goes wrong, the coordinator sees itself
        if self._named is None:
            table = self._handover.table
            self._named = {
                carried.connection: carried
                for carried in table.values()
                if carried.connection is not None and not (carried.freed or carried.handed or carried.holder)
            }
        carried = self._named.get(match[1] + b"-" + match[2])
        if carried is not None:
            carried.cut = (match[3] or match[4]).decode("ascii", "replace")

    def _free(self, carried: Carried, seen: Seen) -> None:
        request_id = carried.request_id
        carried.freed = True
        self._await(request_id, as_nginx_saw(request_id, seen, cut=carried.cut))
        delivered = 200 <= seen.status < 300 and seen.body_bytes > 0
        self._decider.apply(Freed(request_id=request_id, delivered=delivered, ttft_ms=seen.ttft_ms if delivered else None))

    # ------------------------------------------------------------ gateways' reports

    def endings(self, agent_id: AgentId, reports: Sequence[EndingReport]) -> None:
        """What an agent says of requests at its gateway."""
        table = self._handover.table
        for report in reports:
            carried = table.get(report.request_id)
            if carried is None or carried.agent_id != agent_id or carried.handed or carried.direct or carried.holder is not None:
                self.unknown += 1
                continue
            settled = as_reported(report)
            if report.status < 400 or carried.freed:
                self._settle(carried, settled)
            else:
                self._await(carried.request_id, settled)  # nginx hands it over, unless it has lost its client

    def _await(self, request_id: RequestId, settled: Settled) -> None:
        self._told[request_id] = settled
        self._waiting.set(request_id, now=Instant(self._handover.now()))

    def _settle(self, carried: Carried, settled: Settled) -> None:
        if self._told.pop(carried.request_id, None) is not None:
            self._waiting.discard(carried.request_id)
        self._handover.settle(carried, settled)

    # ------------------------------------------------------------ nodes without a gateway

    def forwarded(self, carried: Carried) -> None:
        """nginx was given a node without a gateway. On a connection that answers in order, the request before it is over."""
        connection = carried.connection
        if connection is None:
            return
        before = self._connections.get(connection)
        self._connections[connection] = carried
        if before is None or not self._is_out(before):
            return
        self.drain()  # its line may lie there unread
        if self._is_out(before):
            text = "nginx did not say how it ended"
            self._handover.settle(before, Settled(request_id=before.request_id, ending=Ending.UNKNOWN, message=text))

    def _is_out(self, carried: Carried) -> bool:
        return self._handover.table.get(carried.request_id) is carried and not carried.handed

    def _forget_connection(self, carried: Carried) -> None:
        if carried.connection is not None and self._connections.get(carried.connection) is carried:
            del self._connections[carried.connection]

    def alive(self, *, now: float) -> list[RequestId]:
        """Requests on nodes without a gateway, whose leases are to be renewed: nobody else says that they live."""
        return [
            carried.request_id
            for carried in self._handover.table.values()
            if carried.direct and not carried.handed and not carried.gone and now - carried.since < DIRECT_MAX_S
        ]

    # ------------------------------------------------------------ time

    def sweep(self, *, now: float) -> None:
        """Settle what nobody tells more about."""
        table = self._handover.table
        for request_id in self._waiting.due(now=Instant(now)):
            settled = self._told.pop(request_id)
            if (carried := table.get(request_id)) is not None:
                self._handover.settle(carried, settled)
        if self._connections:
            self._connections = {name: carried for name, carried in self._connections.items() if carried.request_id in table}


def as_nginx_saw(request_id: RequestId, seen: Seen, *, cut: str = "") -> Settled:
    """How a request ended of which nothing else is known. `cut`: what nginx said of the node, which its line does not tell from an end."""
    whole = 200 <= seen.status < 300
    ttft_ms = seen.ttft_ms if whole and seen.body_bytes else None
    if whole and seen.completed and not cut:
        return Settled(
            request_id=request_id,
            ending=_SUCCESS,
            status=seen.status,
            body_bytes=seen.body_bytes,
            ttft_ms=ttft_ms,
            duration_ms=seen.duration_ms,
        )
    ending, message = _SUCCESS, ""
    if whole and cut:
        ending, message = Ending.ERROR, f"the node broke its answer off: {cut}"
    elif seen.status == CLIENT_LEFT or (whole and not seen.completed):
        ending, message = Ending.CANCELLED, "the answer did not reach its client whole, as nginx says"
    elif not whole:
        ending, message = Ending.ERROR, f"nginx answered with status {seen.status}"
    return Settled(
        request_id=request_id,
        ending=ending,
        status=seen.status,
        message=message,
        node_fault=Failure.DIED if whole and cut else None,
        body_bytes=seen.body_bytes,
        ttft_ms=ttft_ms,
        duration_ms=seen.duration_ms,
    )


def as_reported(report: EndingReport) -> Settled:
    """How a request ended, as the gateway of its node says."""
    usage = None
    if report.prompt_tokens or report.output_tokens or report.total_ns:
        usage = Usage(
            prompt_tokens=report.prompt_tokens,
            output_tokens=report.output_tokens,
            total_ns=report.total_ns,
            load_ns=report.load_ns,
            prompt_ns=report.prompt_ns,
            eval_ns=report.eval_ns,
        )
    fault = report.node_fault
    return Settled(
        request_id=RequestId(report.request_id),
        ending=_ENDINGS[report.ending],
        status=report.status,
        message=report.message,
        node_fault=None if fault is None else _FAULTS.get(fault, Failure.DIED),
        usage=usage,
        body_bytes=report.body_bytes,
        chunks=report.chunks,
        ttft_ms=report.ttft_ms,
        duration_ms=report.duration_ms,
    )
