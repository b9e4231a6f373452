"""Lines and reports, put together: in any order, twice, never, or as garbage. No socket but one pair, and time turned by hand."""

import socket

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from core.events import Ending, Failure, Route
from core.messages import EndingReport
from core.units import AgentId, LeaseId, RequestId
from edge.handover import Carried, Handover
from edge.tally import DIRECT_MAX_S, FEW, READS_IN_A_ROW, REPORT_WITHIN_S, TOGETHER_S, Seen, Tally, _read_any, _read_common, read_line
from tests.edge.nginx_parts import ScriptedRouter

GOOD = b"<190>Jan  1 00:00:00 nginx: r/1 200 321 0.100 0.200 OK"
HERE = AgentId("a1")


class Parts:
    """A tally and what is around it."""

    def __init__(self) -> None:
        self.router = ScriptedRouter()
        self.handover = Handover(self.router, secret=b"s", lives=self.router.lives, now=lambda: self.router.now)
        self.tally = Tally(self.router, self.handover)

    def out(self, name: str = "r", *, direct: bool = False, connection: bytes | None = None) -> Carried:
        """A request that nginx was given a node for."""
        carried = Carried(RequestId(name), route=Route.CHAT, stream=True)
        carried.lease_id, carried.agent_id, carried.direct, carried.connection = LeaseId(f"{name}/1"), HERE, direct, connection
        carried.since = self.router.now
        self.handover.add(carried)
        if direct:
            self.tally.forwarded(carried)
        return carried

    def report(self, name: str = "r", **more: object) -> None:
        told = {"request_id": name, "ending": "success", **more}
        self.tally.endings(HERE, [EndingReport(**told)])  # type: ignore[arg-type]

    def wait(self, seconds: float) -> None:
        self.router.now += seconds
        self.tally.sweep(now=self.router.now)

    def endings(self) -> list[tuple[str, str]]:
        return [(settled.request_id, settled.ending.value) for settled in self.router.settled()]


# ---------------------------------------------------------------- lines


def test_a_line_is_read() -> None:
    assert read_line(GOOD) == Seen("r/1", 200, 321, 100.0, 200.0, True)
    assert read_line(b"r/1 499 0 - - ") == Seen("r/1", 499, 0, None, None, False)
    assert read_line(b"r/1 499 0 - -") == Seen("r/1", 499, 0, None, None, False)
    assert read_line(b"<190>x nginx: r/1 200 9 0.1, 0.3 0.2, 0.5 OK") == Seen("r/1", 200, 9, 300.0, 500.0, True)
    assert read_line(b"<190>x nginx: r/1 200 9 - : 0.3 0.2 : 0.5 OK") == Seen("r/1", 200, 9, 300.0, 500.0, True)


STAMP, ID = b"<190>Jan  1 00:00:00 router: ", "550e8400-e29b-41d4-a716-446655440000"


@given(
    st.sampled_from([b"", b"<190>x nginx: ", STAMP, STAMP[1:]]),
    st.sampled_from([b"r/1", b"r-2/17", b"", b"a b", f"{ID}/1".encode(), f"{ID}/17".encode(), ID.encode(), f"{ID[1:]}\xe9/1".encode()]),
    st.sampled_from([b"200", b"499", b"20", b"2000", b""]),
    st.sampled_from([b"0", b"12", b"-1", b"", b"9" * 18, b"9" * 19]),
    st.lists(
        st.sampled_from(
            [
                *(b"-", b"0.001", b"1.5.2", b".", b"12", b"0.1, 0.2", b"", b"0.1 : 0.2", b"- : 0.2", b"0.1 : -", b"0.001 : 0.002"),
                *(b"1.001 : 7.057", b"0.001 :0.002", b"0.0001 : 0.001", b"0.001 : 99999999999.999", b"0.001 : 999999999999.999"),
            ]
        ),
        min_size=2,
        max_size=2,
    ),
    st.sampled_from([b" OK", b" -", b" ", b"", b" OK-", b" OK \n", b" OK\n"]),
)
def test_the_commonest_lines_are_read_as_all_are(
    stamp: bytes, lease: bytes, status: bytes, size: bytes, times: list[bytes], end: bytes
) -> None:
    line = stamp + b" ".join((lease, status, size, *times)) + end
    assert read_line(line) == _read_any(line)


def test_what_nginx_writes_of_one_node_after_selection_is_read() -> None:
    for number in (1, 17):
        line = STAMP + f"{ID}/{number} 200 321 0.001 : 0.002 0.003 : 1.004 ".encode()
        whole = Seen(f"{ID}/{number}", 200, 321, 2.0, 1004.0, True)
        assert _read_common(line + b"OK") == read_line(line + b"OK") == whole
        assert _read_common(line) == Seen(f"{ID}/{number}", 200, 321, 2.0, 1004.0, False) != whole


@pytest.mark.parametrize("line", [b"", b"x", GOOD + b" more", b"r/1 20 1 1 1 OK", b"r/1 200 -1 1 1 OK", b"\xff/1 200 1 1 1 OK"])
def test_what_is_no_line_is_none(line: bytes) -> None:
    assert read_line(line) is None


@given(st.binary(max_size=200))
def test_no_bytes_break_it(data: bytes) -> None:
    read_line(data)
    read_line(b"<190>x nginx: r/1 " + data)


def test_lines_are_read_from_their_socket_until_there_are_no_more() -> None:
    parts = Parts()
    parts.tally.drain()
    ours, nginxs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, nginxs:
        ours.setblocking(False)
        parts.tally.listen(ours)
        parts.out(direct=True)
        for line in (b"garbage", GOOD, GOOD):
            nginxs.send(line)
        parts.tally.drain()
    assert (parts.tally.unreadable, parts.tally.unknown, parts.endings()) == (1, 1, [("r", "success")])


@pytest.mark.parametrize(("waits", "others", "at_once"), [(False, FEW, False), (True, FEW, True), (False, FEW - 1, True)])
async def test_lines_are_read_together_unless_somebody_waits_for_a_node_or_few_are_carried(
    waits: bool, others: int, at_once: bool, mock_clock: trio.testing.MockClock
) -> None:
    parts = Parts()
    for number in range(others):
        parts.out(f"other-{number}", direct=True)
    ours, nginxs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, nginxs:
        ours.setblocking(False)
        parts.tally.listen(ours)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parts.tally.keep_reading, lambda: waits)
            for number in range(3):
                parts.out("r", direct=True)
                nginxs.send(GOOD)
                await trio.testing.wait_all_tasks_blocked()
                assert len(parts.endings()) == number + at_once
                mock_clock.jump(TOGETHER_S)
                await trio.testing.wait_all_tasks_blocked()
                assert len(parts.endings()) == number + 1
            nursery.cancel_scope.cancel()


async def test_more_lines_than_are_read_in_a_row_are_read_all_the_same(mock_clock: trio.testing.MockClock) -> None:
    parts, lines = Parts(), 2 * READS_IN_A_ROW + 3
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nginxs:
        ours.bind(("127.0.0.1", 0))
        ours.setblocking(False)
        nginxs.connect(ours.getsockname())
        parts.tally.listen(ours)
        for number in range(lines):
            parts.out(f"s{number}", direct=True)
            nginxs.send(GOOD.replace(b"r/1", f"s{number}/1".encode()))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parts.tally.keep_reading, lambda: True)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert len(parts.endings()) == lines


# ---------------------------------------------------------------- nodes with a gateway


def test_a_line_gives_the_lease_back_and_the_report_settles() -> None:
    parts = Parts()
    parts.out()
    parts.tally.take(GOOD)
    (freed,) = parts.router.freed()
    assert (freed.request_id, freed.delivered, freed.ttft_ms) == ("r", True, 100.0)
    assert parts.endings() == []
    parts.report(prompt_tokens=3, output_tokens=4, load_ns=5, chunks=6, body_bytes=7, ttft_ms=8.0, duration_ms=9.0)
    (settled,) = parts.router.settled()
    assert settled.usage is not None
    assert (settled.usage.prompt_tokens, settled.usage.output_tokens, settled.usage.load_ns) == (3, 4, 5)
    assert (settled.chunks, settled.body_bytes, settled.ttft_ms, settled.duration_ms) == (6, 7, 8.0, 9.0)
    parts.wait(REPORT_WITHIN_S)
    assert len(parts.router.settled()) == 1


def test_without_a_report_the_line_settles_in_time() -> None:
    parts = Parts()
    parts.out()
    parts.tally.take(GOOD)
    parts.wait(REPORT_WITHIN_S - 0.01)
    assert parts.endings() == []
    parts.wait(0.01)
    assert parts.endings() == [("r", "success")]


def test_a_report_alone_settles_and_a_second_one_is_nobodys() -> None:
    parts = Parts()
    parts.out()
    parts.report(ending="error", status=200, message="cut", node_fault="died")
    parts.report()
    parts.tally.take(GOOD)
    (settled,) = parts.router.settled()
    assert (settled.ending, settled.node_fault, settled.message) == (Ending.ERROR, Failure.DIED, "cut")
    assert parts.tally.unknown == 2


def test_a_fault_that_is_not_known_yet_means_died() -> None:
    parts = Parts()
    parts.out()
    parts.report(ending="error", node_fault="a word of next year")
    assert parts.router.settled()[0].node_fault is Failure.DIED


def test_an_error_answer_waits_for_the_takeover() -> None:
    parts = Parts()
    parts.out()
    parts.report(ending="error", status=500)
    assert parts.endings() == []
    parts.wait(REPORT_WITHIN_S)
    assert parts.endings() == [("r", "error")]


def test_an_error_answer_that_nginx_gave_its_client_ends_at_once() -> None:
    parts = Parts()
    parts.out()
    parts.report(ending="error", status=500, message="no")
    parts.tally.take(b"r/1 500 9 0.1 0.1 OK")
    (settled,) = parts.router.settled()
    assert (settled.status, settled.message) == (500, "no")


@pytest.mark.parametrize("agent_id", ["another", ""])
def test_an_agent_ends_only_what_is_on_itself(agent_id: str) -> None:
    parts = Parts()
    parts.out()
    parts.tally.endings(AgentId(agent_id), [EndingReport(request_id="r", ending="success")])
    assert (parts.endings(), parts.tally.unknown) == ([], 1)


def test_a_line_for_another_attempt_is_nobodys() -> None:
    parts = Parts()
    parts.out()
    parts.tally.take(GOOD.replace(b"r/1", b"r/2"))
    assert (parts.router.freed(), parts.tally.unknown) == ([], 1)


def test_what_is_handed_over_is_no_longer_nginxs() -> None:
    parts = Parts()
    parts.out().handed = True
    parts.tally.take(GOOD)
    parts.report()
    assert (parts.endings(), parts.router.freed(), parts.tally.unknown) == ([], [], 2)


# ---------------------------------------------------------------- nodes without


@pytest.mark.parametrize(
    ("line", "ending", "status", "ttft_ms"),
    [
        (GOOD, "success", 200, 100.0),
        (b"r/1 499 0 - - ", "cancelled", 499, None),
        (b"r/1 200 55 0.5 0.9 ", "cancelled", 200, 500.0),
        (b"r/1 404 55 0.5 0.9 OK", "error", 404, None),
    ],
)
def test_a_line_is_all_that_is_known(line: bytes, ending: str, status: int, ttft_ms: float | None) -> None:
    parts = Parts()
    parts.out(direct=True)
    parts.tally.take(line)
    (settled,) = parts.router.settled()
    assert (settled.ending.value, settled.status, settled.ttft_ms) == (ending, status, ttft_ms)


def test_no_agent_tells_of_a_node_that_has_none() -> None:
    parts = Parts()
    parts.out(direct=True)
    parts.report()
    assert (parts.endings(), parts.tally.unknown) == ([], 1)


def test_the_next_request_of_a_connection_ends_the_one_before_it() -> None:
    parts = Parts()
    for name, connection in (("a", b"1"), ("b", b"2"), ("c", b"1"), ("d", None)):
        parts.out(name, direct=True, connection=connection)
    assert parts.endings() == [("a", "unknown")]


def test_a_line_that_was_not_read_yet_is_no_lost_one() -> None:
    parts = Parts()
    ours, nginxs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, nginxs:
        ours.setblocking(False)
        parts.tally.listen(ours)
        parts.out(direct=True, connection=b"1")
        nginxs.send(GOOD)
        parts.out("next", direct=True, connection=b"1")
    assert parts.endings() == [("r", "success")]


def test_a_connections_request_that_ended_in_time_is_not_ended_again() -> None:
    parts = Parts()
    parts.out(direct=True, connection=b"1")
    parts.tally.take(GOOD)
    parts.out("next", direct=True, connection=b"1")
    parts.wait(0)
    assert parts.endings() == [("r", "success")]


def test_their_leases_are_renewed_while_the_node_is_there_up_to_a_limit() -> None:
    parts = Parts()
    parts.out("kept", direct=True)
    parts.out("gone", direct=True).gone = True
    parts.out("handed", direct=True).handed = True
    parts.out("a gateway's")
    assert parts.tally.alive(now=parts.router.now) == ["kept"]
    assert parts.tally.alive(now=parts.router.now + DIRECT_MAX_S) == []


# ---------------------------------------------------------------- nodes that break off


def cut(connection: str = "9-1", *, text: str = "upstream prematurely closed connection", doing: str = "reading upstream") -> bytes:
    pid, _, number = connection.partition("-")
    about = 'client: 1.2.3.4, server: _, request: "POST /api/chat HTTP/1.1", upstream: "http://10.0.0.1:11434/api/chat"'
    return f"<187>Jan  1 00:00:00 cut: 2026/01/01 00:00:00 [error] {pid}#{pid}: *{number} {text} while {doing}, {about}".encode()


@pytest.mark.parametrize("direct", [True, False])
def test_a_node_that_breaks_off_is_told_from_an_end(direct: bool) -> None:
    parts = Parts()
    parts.out("other", direct=direct, connection=b"9-2")
    parts.out(direct=direct, connection=b"9-1")
    parts.tally.take(cut(text="recv() failed (104: Connection reset by peer)"))
    parts.tally.take(GOOD)
    parts.tally.take(GOOD.replace(b"r/1", b"other/1"))
    parts.wait(REPORT_WITHIN_S)
    other, settled = sorted(parts.router.settled(), key=lambda settled: settled.request_id)
    assert (other.ending, other.node_fault, other.message) == (Ending.SUCCESS, None, "")
    assert (settled.ending, settled.node_fault, settled.status, settled.body_bytes) == (Ending.ERROR, Failure.DIED, 200, 321)
    assert settled.message == "the node broke its answer off: recv() failed (104: Connection reset by peer)"
    assert parts.tally.unreadable == 0


def test_what_a_gateway_reports_of_a_cut_counts_for_more() -> None:
    parts = Parts()
    parts.out(connection=b"9-1")
    parts.tally.take(cut())
    parts.tally.take(GOOD)
    parts.report(ending="error", status=200, message="its own words", node_fault="garbled")
    (settled,) = parts.router.settled()
    assert (settled.message, settled.node_fault) == ("its own words", Failure.GARBLED)


def test_a_cut_is_about_the_connections_request_of_now() -> None:
    parts = Parts()
    freed, handed, now = (parts.out(name, connection=b"9-1") for name in ("freed", "handed", "now"))
    freed.freed = handed.handed = True
    parts.tally.take(cut(doing="sending to client"))
    assert [bool(carried.cut) for carried in (freed, handed, now)] == [False, False, True]


@pytest.mark.parametrize(
    "line",
    [
        cut("9-2"),
        cut(doing="connecting to upstream"),
        cut(text="send() failed (104: Connection reset by peer)", doing="sending to client"),
        cut(doing="reading response header from upstream"),
        cut(text="x, client: 1 upstream prematurely closed connection"),
        b"<187>Jan  1 00:00:00 cut: ",
        cut().replace(b"*1 ", b""),
    ],
)
def test_other_errors_of_nginxs_are_nobodys(line: bytes) -> None:
    parts = Parts()
    carried = parts.out(connection=b"9-1")
    parts.out("no name")
    parts.tally.take(line)
    assert (carried.cut, parts.tally.unreadable, parts.tally.unknown) == ("", 0, 0)


def test_each_reading_looks_anew_at_what_is_carried() -> None:
    parts = Parts()
    ours, nginxs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, nginxs:
        ours.setblocking(False)
        parts.tally.listen(ours)
        for name, connection in (("a", "9-1"), ("b", "9-2")):
            carried = parts.out(name, connection=connection.encode())
            nginxs.send(cut(connection))
            parts.tally.drain()
            assert carried.cut
