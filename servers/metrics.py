"""What `/metrics` shows: counters that the router asks for, histograms of records, and gauges read when somebody looks.

Decides nothing. Counting is on the way of every request, so it is a dictionary and a bisection here; prometheus-client turns it into
text when it is scraped. Invariant: at most `SERIES_MAX` counter series, whatever labels come.
"""

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator
from typing import Final

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from core.events import Ending, Record, Route
from core.views import AgentView, Statistics
from servers.store.outbox import Written

PREFIX: Final = "ollama_router_"
SERIES_MAX: Final = 10_000
COUNTED_AT_ONCE: Final = 128
"""Records; a tenth of a millisecond."""
STARTS_KEPT: Final = 1000
"""Requests over which the error of predicted starts is told."""
BOUNDS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class _Buckets:
    """One histogram."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.total_s = 0.0

    def add(self, seconds: list[float]) -> None:
        """Several at once: sorted, they need one search for each bound, and not each its own."""
        seconds.sort()
        below = 0
        for number, bound in enumerate(BOUNDS_S):
            until = bisect_right(seconds, bound, below)
            self.counts[number] += until - below
            below = until
            if below == len(seconds):
                break
        self.counts[-1] += len(seconds) - below
        self.total_s += sum(seconds)

    def cumulative(self) -> list[tuple[str, float]]:
        sums, running = [], 0
        for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), self.counts, strict=True):
            running += count
            sums.append((bound, float(running)))
        return sums


class _OfRoute:
    """What is kept of the requests of one route."""

    __slots__ = ("duration", "ended", "first_byte", "queue")

    def __init__(self) -> None:
        self.ended: Counter[Ending] = Counter()
        self.duration = _Buckets()
        self.queue = _Buckets()
        self.first_byte = _Buckets()


class Metrics:
    """All metrics of one coordinator."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, tuple[tuple[str, str], ...]], int] = {}
        self._dropped = 0
        self._fresh: list[Record] = []
        self._routes: dict[Route, _OfRoute] = {}
        self._start_errors_ms: deque[float] = deque(maxlen=STARTS_KEPT)
        self._outcomes: Counter[str] = Counter()
        """Few: failures, endings, and HTTP statuses."""

    def count(self, name: str, labels: dict[str, str], by: int = 1) -> None:
        """Add to a counter; a series that would be one too many is dropped and counted as that."""
        key = (name, tuple(labels.items()))
        counts = self._counts
        if key in counts:
            counts[key] += by
        elif len(counts) < SERIES_MAX:
            counts[key] = by
        else:
            self._dropped += 1

    def observe(self, record: Record) -> None:
        """A request is over: how it and its attempts ended, and its times. Many are counted at once, which costs each a half."""
        self._fresh.append(record)
        if len(self._fresh) >= COUNTED_AT_ONCE:
            self._count_fresh()

    def _count_fresh(self) -> None:
        by_route: dict[Route, list[Record]] = {}
        for record in self._fresh:
            if (records := by_route.get(record.route)) is None:
                by_route[record.route] = [record]
            else:
                records.append(record)
        self._fresh.clear()
        for route, records in by_route.items():
            self._count_records(route, records)

    def _count_records(self, route: Route, records: list[Record]) -> None:
        of_route = self._routes.get(route)
        if of_route is None:
            of_route = self._routes[route] = _OfRoute()
        of_route.ended.update([record.ending for record in records])
        self._outcomes.update([attempt.outcome for record in records for attempt in record.attempts])
        of_route.duration.add([record.duration_ms / 1000 for record in records])
        of_route.queue.add([record.queue_ms / 1000 for record in records])
        of_route.first_byte.add([record.ttft_ms / 1000 for record in records if record.ttft_ms is not None])
        self._start_errors_ms.extend(
            [
                abs(record.observed_start_ms - record.predicted_start_ms)
                for record in records
                if record.predicted_start_ms is not None and record.observed_start_ms is not None
            ]
        )

    def snapshot(
        self, statistics: Statistics, agents: list[AgentView], written: Written | None = None, *, deleted_bytes: int = 0
    ) -> "Snapshot":
        """Everything as it is now, with the router's own state, to be rendered in a worker thread.

        `written`: what became of history; `deleted_bytes`: of it, by its age and size.
        """
        self._count_fresh()
        counts = dict(self._counts)
        histograms: dict[tuple[str, str], _Buckets] = {}
        for route, of_route in self._routes.items():
            for ending, value in of_route.ended.items():
                counts["requests_total", (("route", route.value), ("status", ending.value))] = value
            histograms["request_duration_seconds", route.value] = of_route.duration
            histograms["queue_seconds", route.value] = of_route.queue
            if any(of_route.first_byte.counts):
                histograms["time_to_first_byte_seconds", route.value] = of_route.first_byte
        for outcome, value in self._outcomes.items():
            counts["attempts_total", (("outcome", outcome),)] = value
        if written is not None:
            counts["history_records_total", ()] = written.records
            counts["history_bodies_dropped_total", ()] = written.bodies_dropped
            counts["history_records_dropped_total", ()] = written.records_dropped
            counts["history_write_failures_total", ()] = written.failures
            counts["history_deleted_bytes_total", ()] = deleted_bytes
        failing = written is not None and written.failing is not None
        return Snapshot(counts, self._dropped, histograms, statistics, agents, sorted(self._start_errors_ms), history_failing=failing)


class Snapshot(Collector):
    """One scrape."""

    def __init__(
        self,
        counts: dict[tuple[str, tuple[tuple[str, str], ...]], int],
        dropped: int,
        histograms: dict[tuple[str, str], _Buckets],
        statistics: Statistics,
        agents: list[AgentView],
        start_errors_ms: list[float],
        *,
        history_failing: bool,
    ) -> None:
        self._counts = counts
        self._dropped = dropped
        self._histograms = histograms
        self._statistics = statistics
        self._agents = agents
        self._start_errors_ms = start_errors_ms
        self._history_failing = history_failing

    def exposition(self) -> bytes:
        """In Prometheus' text format; takes milliseconds where there is much to tell."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus-client."""
        yield from self._counters()
        yield from self._histogram_families()
        yield from self._gauges()

    def _counters(self) -> Iterator[Metric]:
        families: dict[tuple[str, tuple[str, ...]], CounterMetricFamily] = {}
        for (name, labels), value in sorted(self._counts.items()):
            label_names = tuple(label for label, _ in labels)
            family = families.get((name, label_names))
            if family is None:
                bare = name.removeprefix(PREFIX).removesuffix("_total")
                family = families[name, label_names] = CounterMetricFamily(PREFIX + bare, bare.replace("_", " "), labels=label_names)
            family.add_metric([text for _, text in labels], value)
        yield from families.values()
        yield CounterMetricFamily(PREFIX + "metric_series_dropped", "counter series beyond the limit", value=self._dropped)

    def _histogram_families(self) -> Iterator[Metric]:
        families: dict[str, HistogramMetricFamily] = {}
        for (name, route), buckets in sorted(self._histograms.items()):
            family = families.get(name)
            if family is None:
                family = families[name] = HistogramMetricFamily(PREFIX + name, name.replace("_", " "), labels=["route"])
            family.add_metric([route], buckets.cumulative(), buckets.total_s)
        yield from families.values()

    def _gauges(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(PREFIX + "requests_in_flight", "requests on nodes", value=self._statistics.in_flight)
        yield GaugeMetricFamily(PREFIX + "requests_waiting", "requests in the queue", value=self._statistics.waiting)
        yield GaugeMetricFamily(PREFIX + "history_failing", "whether history cannot be written now", value=float(self._history_failing))
        up = GaugeMetricFamily(PREFIX + "agent_ready", "whether a node takes requests", labels=["agent"])
        in_flight = GaugeMetricFamily(PREFIX + "agent_in_flight", "requests on a node", labels=["agent"])
        for agent in self._agents:
            up.add_metric([agent.name], float(agent.state == "ready"))
            in_flight.add_metric([agent.name], agent.in_flight)
        yield up
        yield in_flight
        errors = self._start_errors_ms
        if errors:
            text = f"predicted against observed start, without sign, of the last {STARTS_KEPT} requests whose nodes told their times"
            start = GaugeMetricFamily(PREFIX + "start_error_seconds", text, labels=["quantile"])
            for share in (0.5, 0.9):
                start.add_metric([str(share)], errors[min(int(len(errors) * share), len(errors) - 1)] / 1000)
            yield start
