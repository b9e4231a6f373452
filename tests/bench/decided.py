"""What one request costs the core: the event that it came, its node chosen, and the event that it is over, through the driver.

    python -m tests.bench.decided [--nodes 10 100 1000] [--slots 64] [--count] [--profile]

All nodes have the model in memory, which is the dearest case of a choice; `IN_FLIGHT` requests are on their way at any time. Without
`--count` it is processor time, the least of many short runs, so that what else the machine does hardly counts; with it, instructions under
valgrind, which nothing else moves at all. No socket, no edge, no sinks: only `servers.driver`, its tape and `core`.
"""

import argparse
import cProfile
import gc
import os
import pstats
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import native

if __name__ == "__main__":
    native.use()  # before any of it is imported

from core.config import RouterConfig
from core.events import BackendAdded, Ending, Forward, NodePolled, RequestCame, Route, Settled, Upstream, Usage
from core.router import Router
from core.units import AgentId, Instant, RequestId, UnixMs
from servers.driver import Driver
from tests.bench.counted_sides import LOADED_ROW, MODEL_ROW, NoSinks
from tests.bench.programs import SMALL, needed

IN_FLIGHT = 32
RUN = 500
"""Requests of one run."""
RUNS = 40
COUNTED = 2_000
WARM = 3_000
"""Requests before anything is measured: by then the speeds are known."""


class Served:
    """A driver with so many nodes, and one request after the other, each settled when `IN_FLIGHT` others have come."""

    def __init__(self, nodes: int, *, slots: int) -> None:
        self._now = 0.0
        self.driver = Driver(Router(RouterConfig(), now=Instant(0.0)), NoSinks(), clock=self._clock)
        for number in range(nodes):
            agent_id, upstream = AgentId(f"node-{number}"), Upstream(host="127.0.0.1", port=number + 1)
            self.driver.apply(BackendAdded(agent_id=agent_id, name=agent_id, upstream=upstream, slots=slots, now_unix=UnixMs(0)))
            polled = NodePolled(agent_id=agent_id, version="0", installed=[MODEL_ROW], loaded=[LOADED_ROW], now_unix=UnixMs(0))
            self.driver.apply(polled)
        self._live: deque[RequestId] = deque()
        self._number = 0
        self.where: dict[str, int] = {}

    def _clock(self) -> float:
        self._now += 0.000_02
        return self._now

    def serve(self, requests: int) -> None:
        """So many of them."""
        live, driver = self._live, self.driver
        usage = Usage(prompt_tokens=26, output_tokens=199, total_ns=10**9, load_ns=10**7, prompt_ns=10**8, eval_ns=9 * 10**8)
        for _ in range(requests):
            self._number += 1
            request_id = RequestId(f"{self._number:032x}")
            desk = driver.open_desk(request_id)
            driver.apply(RequestCame(request_id=request_id, route=Route.CHAT, model=SMALL, client="127.0.0.1", input_tokens=12))
            live.append(request_id)
            effect = desk.take_nowait()
            assert isinstance(effect, Forward), effect
            if len(live) > IN_FLIGHT:
                over = live.popleft()
                driver.apply(Settled(request_id=over, ending=Ending.SUCCESS, status=200, usage=usage, body_bytes=300))
                driver.close_desk(over)


def timed_us(nodes: int, *, slots: int) -> float:
    """Processor time of one request: the least of `RUNS` runs."""
    served = Served(nodes, slots=slots)
    served.serve(WARM)
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 25, 50)  # as the coordinator's own
    found = []
    for _ in range(RUNS):
        began = time.process_time()
        served.serve(RUN)
        found.append((time.process_time() - began) / RUN * 1e6)
    return min(found)


def instructions(nodes: int, *, slots: int) -> float:
    """Thousands of instructions of one request."""
    control = needed("callgrind_control", "valgrind")
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "instructions"
        valgrind = [needed("valgrind", "valgrind"), "-q", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        command = [*valgrind, sys.executable, "-m", "tests.bench.decided", "--nodes", str(nodes), "--slots", str(slots), "--serve"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, env={**os.environ, "PYTHONHASHSEED": "0"}, text=True, **pipes) as child:  # type: ignore[call-overload]
            child.stdout.readline()
            subprocess.run([control, "-i", "on", str(child.pid)], check=True, capture_output=True)
            for order in ("-z", "-d"):
                child.stdin.write("\n")
                child.stdin.flush()
                child.stdout.readline()
                subprocess.run([control, order, str(child.pid)], check=True, capture_output=True)
            child.stdin.close()
        total = re.search(r"^summary: (\d+)", out.with_name(f"{out.name}.1").read_text(), re.MULTILINE)
    assert total is not None, "callgrind did not say how many"
    return int(total[1]) / COUNTED / 1000


def _serve(nodes: int, *, slots: int) -> None:
    """The counted process: serves at each line that it is given."""
    served = Served(nodes, slots=slots)
    served.serve(WARM)
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 25, 50)
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        served.serve(COUNTED if number else 10)
        print("served", flush=True)


def _profile(nodes: int, *, slots: int) -> None:
    served = Served(nodes, slots=slots)
    served.serve(WARM)
    profile = cProfile.Profile()
    profile.runcall(served.serve, 20_000)
    pstats.Stats(profile).sort_stats("tottime").print_stats(40)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.decided", description="What one request costs the core.")
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--count", action="store_true", help="instructions under valgrind, not processor time")
    parser.add_argument("--profile", action="store_true", help="which functions take it")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    for nodes in chosen.nodes:
        if chosen.serve:
            _serve(nodes, slots=chosen.slots)
        elif chosen.profile:
            _profile(nodes, slots=chosen.slots)
        elif chosen.count:
            print(f"{nodes:5} nodes: {instructions(nodes, slots=chosen.slots):8.1f} thousand instructions a request")
        else:
            print(f"{nodes:5} nodes: {timed_us(nodes, slots=chosen.slots):8.1f} µs a request")


if __name__ == "__main__":
    main()
