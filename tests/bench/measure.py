"""What is measured, and against which bars. Knows no program, only the ports they listen on.

All sides of a comparison take turns within one run, round by round, and medians are compared: other work on the machine then hits all
of them alike. A ratio says something on any machine; absolute figures only beside the direct ones of the same run.
"""

import socket
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.bench.programs import CHUNKS, IDLE, PACED, SMALL, STREAM, Bench, Load, request_body, wrk

SIDES = ("direct", "nginx", "router")
IDLE_STREAMS = 2000
IDLE_KB_MAX = 30.0
RATIO_SMALL_MIN = 0.25
RATIO_STREAM_MIN = 0.6
ADDED_P50_MS_MAX = 0.3


@dataclass(frozen=True)
class Compared:
    """The rounds of one load on all sides."""

    rounds: dict[str, list[Load]]

    def rate(self, side: str) -> float:
        return median(load.requests_per_s for load in self.rounds[side])

    def p50_ms(self, side: str) -> float:
        return median(load.p50_ms for load in self.rounds[side])

    def p99_ms(self, side: str) -> float:
        return median(load.p99_ms for load in self.rounds[side])

    @property
    def ratio(self) -> float:
        """Requests per second of the router as a share of plain nginx's."""
        return self.rate("router") / self.rate("nginx")


@dataclass(frozen=True)
class Figures:
    """Everything one run found."""

    small: Compared
    alone: Compared
    stream: Compared
    paced: Compared
    idle_kb: float

    @property
    def added_p50_ms(self) -> float:
        return self.alone.p50_ms("router") - self.alone.p50_ms("direct")

    def misses(self) -> list[str]:
        """The bars that were not reached, one line each."""
        bars = [
            (self.small.ratio >= RATIO_SMALL_MIN, f"small answers reach {self.small.ratio:.2f} of plain nginx, not {RATIO_SMALL_MIN}"),
            (self.stream.ratio >= RATIO_STREAM_MIN, f"streams reach {self.stream.ratio:.2f} of plain nginx, not {RATIO_STREAM_MIN}"),
            (
                self.added_p50_ms <= ADDED_P50_MS_MAX,
                f"one connection waits {self.added_p50_ms:.3f} ms longer, more than {ADDED_P50_MS_MAX}",
            ),
            (self.idle_kb <= IDLE_KB_MAX, f"an idle stream takes {self.idle_kb:.1f} KB, more than {IDLE_KB_MAX}"),
        ]
        return [text for reached, text in bars if not reached]


def compare(bench: Bench, place: Path, model: str, *, connections: int, seconds: int, rounds: int) -> Compared:
    """The same load on all sides in turn."""
    found: dict[str, list[Load]] = {side: [] for side in SIDES}
    for side in SIDES:
        wrk(place, bench.ports.of(side, model), model, connections=connections, seconds=1)  # connections, caches, learned speeds
    for _ in range(rounds):
        for side in SIDES:
            found[side].append(wrk(place, bench.ports.of(side, model), model, connections=connections, seconds=seconds))
    return Compared(found)


def idle_stream_kb(bench: Bench, streams: int = IDLE_STREAMS) -> float:
    """Resident memory of the coordinator per stream that is open and silent, in KB (1,000 bytes)."""
    body = request_body(IDLE)
    request = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    before = bench.router_memory_bytes()
    lines: list[socket.socket] = []
    try:
        for _ in range(streams):
            line = socket.create_connection(("127.0.0.1", bench.ports.router), timeout=20)
            lines.append(line)
            line.sendall(request)
            got = line.recv(65536)
            if b"sky" not in got:
                raise RuntimeError(f"idle stream {len(lines)} got {got[:300]!r}")
        time.sleep(1.0)  # what is freed after the last answer's beginning
        return (bench.router_memory_bytes() - before) / streams / 1000
    finally:
        for line in lines:
            line.close()


def measure_all(bench: Bench, place: Path, *, seconds: int, rounds: int) -> Figures:
    """Every figure; takes about `seconds * rounds * 12` seconds."""
    return Figures(
        small=compare(bench, place, SMALL, connections=32, seconds=seconds, rounds=rounds),
        alone=compare(bench, place, SMALL, connections=1, seconds=seconds, rounds=rounds),
        stream=compare(bench, place, STREAM, connections=32, seconds=seconds, rounds=rounds),
        paced=compare(bench, place, PACED, connections=64, seconds=max(seconds, 2), rounds=rounds),
        idle_kb=idle_stream_kb(bench),
    )


def table(figures: Figures) -> str:
    """The figures as Markdown."""

    def row(name: str, found: Compared, share: float, bar: str) -> str:
        rates = " | ".join(f"{found.rate(side):,.0f}" for side in SIDES)
        latencies = " | ".join(f"{found.p50_ms(side):.3f}" for side in SIDES)
        return f"| {name} | {rates} | {latencies} | {share:.2f} | {bar} |"

    small, alone, stream, paced = figures.small, figures.alone, figures.stream, figures.paced
    return "\n".join(
        [
            "| load | direct /s | nginx /s | router /s | direct p50 ms | nginx p50 ms | router p50 ms | router / nginx | bar |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
            row("small answers, 32 connections", small, small.ratio, f"≥ {RATIO_SMALL_MIN}"),
            row("small answers, 1 connection", alone, alone.ratio, ""),
            row(f"streams of {CHUNKS} lines at full speed, 32 connections", stream, stream.ratio, f"≥ {RATIO_STREAM_MIN}"),
            row(f"streams of {CHUNKS} lines, one each 2 ms, 64 connections", paced, paced.ratio, ""),
            "",
            "| | figure | bar |",
            "| --- | ---: | --- |",
            f"| latency that the router adds at one connection, p50 | {figures.added_p50_ms:.3f} ms | ≤ {ADDED_P50_MS_MAX} ms |",
            f"| memory of one idle stream, {IDLE_STREAMS:,} held | {figures.idle_kb:.1f} KB | ≤ {IDLE_KB_MAX:.0f} KB |",
        ]
    )
