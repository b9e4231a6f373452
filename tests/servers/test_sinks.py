"""Where the router's effects go."""

from typing import Any

import msgspec

from core.events import Ending, Record, Route
from core.units import AgentId, RequestId
from core.views import Statistics
from edge.proxy import KEYED
from servers.metrics import Metrics
from servers.sinks import RECORDS_KEPT, RecordRing, Sinks

RECORD = Record(
    RequestId("r"), Route.CHAT, "m", "client", None, None, Ending.SUCCESS, "", 200, 1.0, 0.0, None, None, None, (), 0, 0
)  # fmt: skip


def test_the_newest_records_are_kept_and_told() -> None:
    ring, told = RecordRing(), list[Record]()
    ring.listeners += [told.append, told.append]
    records = [msgspec.structs.replace(RECORD, request_id=RequestId(str(number))) for number in range(RECORDS_KEPT + 3)]
    for record in records:
        ring.add(record)
    assert list(ring.newest) == records[3:]
    assert told == [record for record in records for _ in range(2)]


def test_who_listens_for_keys_is_told_of_those_only() -> None:
    ring, told = RecordRing(), list[Record]()
    ring.of_keys.append(told.append)
    keyed = msgspec.structs.replace(RECORD, client=KEYED + "k1")
    for record in (RECORD, keyed, RECORD):
        ring.add(record)
    assert told == [keyed]


def test_effects_come_where_they_belong() -> None:
    metrics, ring, probed = Metrics(), RecordRing(), list[AgentId]()
    sinks = Sinks(metrics, ring)
    sinks.probe(AgentId("nobody asks yet"))
    sinks.probes = probed.append
    sinks.probe(AgentId("a"))
    sinks.count("things_total", {"kind": "x"}, 3)
    sinks.record(RECORD)
    text = metrics.snapshot(_STATISTICS, []).exposition().decode()
    assert (probed, list(ring.newest)) == ([AgentId("a")], [RECORD])
    assert 'ollama_router_things_total{kind="x"} 3.0' in text
    assert 'ollama_router_request_duration_seconds_count{route="chat"} 1.0' in text


def test_a_log_that_nobody_reads_any_more_stops_nothing() -> None:
    class Log:
        def __init__(self) -> None:
            self.told: list[tuple[str, dict[str, Any]]] = []

        def info(self, event: str, **fields: object) -> None:
            self.told.append((event, fields))

        def warning(self, event: str, **fields: object) -> None:
            raise ValueError("I/O operation on closed file")

    sinks = Sinks(Metrics(), RecordRing())
    sinks._log = log = Log()
    sinks.note("info", "happened", {"where": "here"})
    sinks.note("warning", "happened", {})
    assert log.told == [("happened", {"where": "here"})]


_STATISTICS = Statistics(
    in_flight=0, waiting=0, agents=0, agents_ready=0, in_flight_by_agent={}, requests_total=0, loads_total=0, reloads_total=0,
    reloads_avoided_total=0,
)  # fmt: skip
