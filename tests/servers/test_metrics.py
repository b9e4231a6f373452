"""What Prometheus sees."""

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from core.events import Ending, Record, Route, Upstream
from core.units import AgentId, RequestId, UnixMs
from core.views import AgentView, Statistics
from servers import metrics as module
from servers.metrics import Metrics
from servers.store.outbox import Written

AGENT = AgentView(
    id=AgentId("a"), name="gpu1", machine_name="gpu1", ip_address="10.0.0.5", ollama_version="0.33.0", ollama_port=11434,
    upstream=Upstream(host="10.0.0.5", port=11434), status="online", state="ready", registered_at=UnixMs(0), slots=1, in_flight=2,
)  # fmt: skip
STATISTICS = Statistics(in_flight=2, waiting=3, agents=1, agents_ready=1, in_flight_by_agent={AgentId("a"): 2}, requests_total=9)


def record(duration_ms: float, ttft_ms: float | None) -> Record:
    return Record(
        request_id=RequestId("r"), route=Route.CHAT, model="m", client="c", agent_id=None, agent_name=None, ending=Ending.SUCCESS,
        message="", status=200, duration_ms=duration_ms, queue_ms=0.0, ttft_ms=ttft_ms, predicted_start_ms=None, usage=None, attempts=(),
        body_bytes=0, chunks=0,
    )  # fmt: skip


def scraped(
    metrics: Metrics, written: Written | None = None, *, deleted_bytes: int = 0
) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    snapshot = metrics.snapshot(STATISTICS, [AGENT], written, deleted_bytes=deleted_bytes)
    return {
        (sample.name.removeprefix("ollama_router_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(snapshot.exposition().decode())
        for sample in family.samples
    }


def test_counters_add_up_by_name_and_labels() -> None:
    counted = Metrics()
    counted.count("requests_total", {"route": "chat", "ending": "success"})
    counted.count("requests_total", {"route": "chat", "ending": "success"}, 2)
    counted.count("requests_total", {"route": "embed", "ending": "success"})
    counted.count("ejections", {})
    seen = scraped(counted)
    assert seen["requests_total", (("ending", "success"), ("route", "chat"))] == 3
    assert seen["requests_total", (("ending", "success"), ("route", "embed"))] == 1
    assert seen["ejections_total", ()] == 1


def test_histograms_of_requests() -> None:
    counted = Metrics()
    counted.observe(record(40.0, 10.0))
    counted.observe(record(700_000.0, None))
    seen = scraped(counted)
    assert seen["request_duration_seconds_count", (("route", "chat"),)] == 2
    assert seen["request_duration_seconds_sum", (("route", "chat"),)] == pytest.approx(700.04)
    assert seen["request_duration_seconds_bucket", (("le", "0.05"), ("route", "chat"))] == 1
    assert seen["request_duration_seconds_bucket", (("le", "600.0"), ("route", "chat"))] == 1
    assert seen["time_to_first_byte_seconds_bucket", (("le", "0.01"), ("route", "chat"))] == 1
    assert seen["time_to_first_byte_seconds_count", (("route", "chat"),)] == 1


def test_gauges_are_read_at_the_scrape() -> None:
    seen = scraped(Metrics())
    assert (seen["requests_in_flight", ()], seen["requests_waiting", ()]) == (2, 3)
    assert (seen["agent_ready", (("agent", "gpu1"),)], seen["agent_in_flight", (("agent", "gpu1"),)]) == (1, 2)


def test_what_became_of_history_is_told() -> None:
    assert not any(name.startswith("history_records") for name, _ in scraped(Metrics()))
    written = Written()
    written.records, written.bodies_dropped, written.records_dropped, written.failures = 5, 4, 3, 2
    seen = scraped(Metrics(), written, deleted_bytes=6)
    assert [seen[f"history_{name}_total", ()] for name in ("records", "bodies_dropped", "records_dropped", "write_failures")] == [
        5,
        4,
        3,
        2,
    ]
    assert (seen["history_deleted_bytes_total", ()], seen["history_failing", ()]) == (6, 0)
    written.failing = "disk full"
    assert scraped(Metrics(), written)["history_failing", ()] == 1


def test_series_are_limited_and_the_dropped_ones_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SERIES_MAX", 2)
    counted = Metrics()
    for number in range(5):
        counted.count("x", {"model": str(number)})
    seen = scraped(counted)
    assert seen["metric_series_dropped_total", ()] == 3
    assert seen["x_total", (("model", "0"),)] == 1
    assert ("x_total", (("model", "4"),)) not in seen


def test_the_error_of_predicted_starts_is_told_without_sign() -> None:
    counted = Metrics()
    assert not any(name == "start_error_seconds" for name, _ in scraped(counted))
    for predicted, observed in ((100.0, 100.0), (500.0, 300.0), (0.0, 1000.0), (None, 7.0), (7.0, None)):
        counted.observe(msgspec.structs.replace(record(1.0, None), predicted_start_ms=predicted, observed_start_ms=observed))
    told = scraped(counted)
    assert told["start_error_seconds", (("quantile", "0.5"),)] == 0.2
    assert told["start_error_seconds", (("quantile", "0.9"),)] == 1.0
