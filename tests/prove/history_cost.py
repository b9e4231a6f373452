"""What history costs the answers: requests per second at full load, and the latency at a steady rate, with it on against off.

    python -m tests.prove.history_cost [--pairs 3] [--rounds 5] [--seconds 2]

Two coordinators with the same nodes take turns within one run, round by round; ratios are formed within a round, and their medians count.
How a process comes to lie in memory makes some percent of its latency, so several pairs are started one after the other: what is told is
the middle one's, figure by figure.
"""

import argparse
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec

from tests.bench.measure import DROPS, KINDS, compare
from tests.bench.programs import SMALL, more_files, request_body
from tests.bench.sides import EMBEDDED, EMBEDDED_ON, stage

RATIO_MIN = 0.7
RATE = 500
ADDED_P50_MAX = 0.05
"""A share of what a request takes without history, at `RATE` requests per second."""


TURN_S = 0.1
"""Short, for what the machine gives changes within seconds, by more than what is looked for."""


class Cost(msgspec.Struct):
    """What one run found; off and on."""

    rates: tuple[float, float]
    ratio: float
    cpu_us: tuple[float, float]
    """Of all processes, for one request at full load."""
    p50_ms: tuple[float, float]
    """At `RATE` requests per second."""
    added_p50: float
    written: float
    dropped: float

    def misses(self) -> list[str]:
        """The bars that were not reached, one line each."""
        bars = [
            (self.ratio >= RATIO_MIN, f"with history on {self.ratio:.2f} of the requests, not {RATIO_MIN}"),
            (self.dropped == 0, f"{self.dropped:.0f} bodies or records were dropped"),
            (self.written > 0, "nothing was recorded"),
            (self.added_p50 <= ADDED_P50_MAX, f"history adds {self.added_p50:.1%} to p50 at {RATE}/s, more than {ADDED_P50_MAX:.0%}"),
        ]
        return [text for reached, text in bars if not reached]


class _Asker:
    """One kept connection."""

    def __init__(self, port: int) -> None:
        body = request_body(SMALL)
        head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self._request = head % len(body) + body
        self.line = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def at_rate(self, seconds: float) -> float:
        """The median time in ms of requests of which one is sent every 1/`RATE` s."""
        took = []
        due = time.perf_counter()
        end = due + seconds
        while due < end:
            time.sleep(max(0.0, due - time.perf_counter()))
            began = time.perf_counter()
            self.line.sendall(self._request)
            answer = b""
            while b'"done":true' not in answer:
                data = self.line.recv(65536)
                assert data, "the connection ended"
                answer += data
            took.append((time.perf_counter() - began) * 1000)
            due = max(due + 1 / RATE, began)
        return median(took)


def middle(costs: Sequence[Cost]) -> Cost:
    """Of several pairs: the median of each figure; but all that was written or dropped."""
    return Cost(
        rates=(median(cost.rates[0] for cost in costs), median(cost.rates[1] for cost in costs)),
        ratio=median(cost.ratio for cost in costs),
        cpu_us=(median(cost.cpu_us[0] for cost in costs), median(cost.cpu_us[1] for cost in costs)),
        p50_ms=(median(cost.p50_ms[0] for cost in costs), median(cost.p50_ms[1] for cost in costs)),
        added_p50=median(cost.added_p50 for cost in costs),
        written=sum(cost.written for cost in costs),
        dropped=sum(cost.dropped for cost in costs),
    )


def measure(*, pairs: int, rounds: int, seconds: int) -> Cost:
    """Of the middle one of several pairs. Prints what each took."""
    costs = []
    for number in range(1, pairs + 1):
        with tempfile.TemporaryDirectory() as place:
            costs.append(_measure(Path(place), seconds=seconds, rounds=rounds))
        print(f"pair {number}: {costs[-1].ratio:.2f} of the requests, {costs[-1].added_p50:+.1%} at the median", flush=True)
    return middle(costs)


def _measure(place: Path, *, seconds: int, rounds: int) -> Cost:
    """Of one pair. Takes some `seconds * rounds * 4` seconds."""
    small = next(kind for kind in KINDS if kind.name == "small")
    with stage(place, (EMBEDDED, EMBEDDED_ON)) as on:
        full = compare(on, place, small, seconds=seconds, rounds=rounds, sides=(EMBEDDED, EMBEDDED_ON))
        off_side, on_side = on.sides[EMBEDDED], on.sides[EMBEDDED_ON]
        off, on_ = _Asker(off_side.ports[SMALL]), _Asker(on_side.ports[SMALL])
        with off.line, on_.line:
            steady = []
            for turn in range(round(rounds * seconds / TURN_S)):
                pair = (off, on_) if turn % 2 else (on_, off)  # who has the second turn finds other caches than who has the first
                took = {asker: asker.at_rate(TURN_S) for asker in pair}
                steady.append((took[off], took[on_]))
        assert on_side.behind is not None
        counts = on_side.behind.metrics()
    return Cost(
        rates=(full.middle(EMBEDDED, lambda load: load.requests_per_s), full.middle(EMBEDDED_ON, lambda load: load.requests_per_s)),
        ratio=full.share(EMBEDDED_ON, EMBEDDED),
        cpu_us=(full.middle(EMBEDDED, lambda load: load.cpu_us), full.middle(EMBEDDED_ON, lambda load: load.cpu_us)),
        p50_ms=(median(one for one, _ in steady), median(other for _, other in steady)),
        added_p50=median(other / one for one, other in steady) - 1,
        written=counts["ollama_router_history_records_total"],
        dropped=sum(counts[name] for name in DROPS),
    )


def _print(cost: Cost) -> None:
    print(f"32 connections: {cost.rates[0]:,.0f} requests/s without history, {cost.rates[1]:,.0f} with it: {cost.ratio:.2f} of it")
    print(f"processor time of all processes: {cost.cpu_us[0]:.0f} and {cost.cpu_us[1]:.0f} µs a request")
    print(f"{RATE}/s: p50 {cost.p50_ms[0]:.3f} and {cost.p50_ms[1]:.3f} ms, {cost.added_p50:+.1%}")
    print(f"{cost.written:,.0f} records written, {cost.dropped:.0f} bodies or records dropped", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.prove.history_cost", description="What history costs the answers.")
    parser.add_argument("--seconds", type=int, default=2, help="length of one turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=3)
    chosen = parser.parse_args()
    more_files()
    found = measure(pairs=chosen.pairs, rounds=chosen.rounds, seconds=chosen.seconds)
    _print(found)
    for miss in found.misses():
        print(f"missed: {miss}")
    return int(bool(found.misses()))


if __name__ == "__main__":
    raise SystemExit(main())
