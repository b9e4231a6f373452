"""What one small request costs the coordinator: CPU time of its process per request, and of that which part takes how much.

    python -m tests.bench.hot_path [--seconds 2] [--rounds 3] [--history]

The whole is measured from outside (`/proc/PID/stat` of a coordinator under `wrk`, all threads), the parts by calling them in a loop here;
what is left is sockets, tasks and the glue between the parts. CPU time hardly moves with what else the machine does, so two versions can
be compared to a few percent where requests per second cannot.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import native

if __name__ == "__main__":
    native.use()  # before any of it is imported

from core.config import RouterConfig
from core.events import Ending, Forward, Protocol, RequestCame, Route, Settled, Upstream, Usage
from core.router import Router
from core.units import Instant, RequestId
from edge.body import inspect_ordinary
from edge.headers import answer_head, request_head
from edge.verdicts import TAIL_BYTES, usage_of, whole_fault
from edge.wire_heads import parse_request_head, parse_response_head
from servers import clock
from servers.driver import Driver
from tests.bench.counted_sides import NoSinks, add_node
from tests.bench.programs import SMALL, STREAM, more_files, request_body, small_answer, wrk
from tests.bench.sides import EMBEDDED, EMBEDDED_ON, stage

CALLS = 20_000


def whole_us(*, model: str, connections: int, seconds: int, rounds: int, history: bool) -> tuple[float, float, float]:
    """(µs of its own, µs in the kernel, requests per second) that one request takes of the coordinator; medians."""
    found: list[tuple[float, float, float]] = []
    wanted = EMBEDDED_ON if history else EMBEDDED
    with tempfile.TemporaryDirectory() as place, stage(Path(place), [wanted]) as on:
        side = on.sides[wanted]
        child = side.children[0]
        for number in range(rounds + 1):
            own, kernel = child.cpu_parts_s()
            load = wrk(Path(place), side.ports[model], model, connections=connections, seconds=seconds if number else 1)
            own_after, kernel_after = child.cpu_parts_s()
            requests = load.requests
            found.append(((own_after - own) / requests * 1e6, (kernel_after - kernel) / requests * 1e6, load.requests_per_s))
    own_us, kernel_us, rate = (median(values) for values in zip(*found[1:], strict=True))
    return own_us, kernel_us, rate


def _timed(call: Callable[[], Any]) -> float:
    """µs of CPU time per call: the least of some runs."""
    found = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(CALLS // 5):
            call()
        found.append((time.process_time() - began) / (CALLS // 5) * 1e6)
    return min(found)


class _Decided:
    """A driver with two nodes, and the two calls that one request makes of it."""

    def __init__(self) -> None:
        self.driver = Driver(Router(RouterConfig(), now=Instant(0.0)), NoSinks(), clock=time.perf_counter)
        for number in range(2):
            add_node(self.driver, f"node-{number}", 9 + number)

    def came(self, request_id: RequestId) -> Forward:
        desk = self.driver.open_desk(request_id)
        self.driver.apply(
            RequestCame(request_id=request_id, route=Route.CHAT, model=SMALL, client="127.0.0.1", stream=False, input_tokens=12)
        )
        effect = desk.take_nowait()
        assert isinstance(effect, Forward), effect
        return effect

    def settled(self, request_id: RequestId) -> None:
        usage = Usage(prompt_tokens=26, output_tokens=199, total_ns=10**9, load_ns=10**7, prompt_ns=10**8, eval_ns=9 * 10**8)
        self.driver.apply(Settled(request_id=request_id, ending=Ending.SUCCESS, status=200, usage=usage, body_bytes=300))
        self.driver.close_desk(request_id)


def parts() -> list[tuple[str, float]]:
    """The parts that can be called by themselves, each with its µs per request."""
    body = request_body(SMALL)
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost:11434\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    answer = small_answer().encode()
    answered = b"HTTP/1.1 200 OK\r\nServer: nginx\r\nDate: x\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n\r\n"
    answered %= len(answer)
    parsed, response = parse_request_head(head), parse_response_head(answered, no_body=False)
    upstream, request_id = Upstream(host="127.0.0.1", port=11434), clock.new_request_id()
    decided = _Decided()
    ids = iter([clock.new_request_id() for _ in range(CALLS * 2)])

    def one_request() -> None:
        request_id = next(ids)
        decided.came(request_id)
        decided.settled(request_id)

    to_node: Callable[[], bytes] = lambda: request_head(  # noqa: E731
        parsed, upstream, request_id=request_id, body_length=len(body), client_host="127.0.0.1"
    )
    to_client: Callable[[], bytes] = lambda: answer_head(  # noqa: E731
        response, framing="length", length=len(answer), keep_alive=True, request_id=request_id.encode(), node="small-1"
    )
    return [
        ("read the request's head", _timed(lambda: parse_request_head(head))),
        ("read what the body says", _timed(lambda: inspect_ordinary(Route.CHAT, body))),
        ("make an id", _timed(clock.new_request_id)),
        ("decide, and settle", _timed(one_request)),
        ("write the node's head", _timed(to_node)),
        ("read the answer's head", _timed(lambda: parse_response_head(answered, no_body=False))),
        ("judge the answer", _timed(lambda: (whole_fault(Route.CHAT, answer), usage_of(answer[-TAIL_BYTES:], Protocol.NATIVE)))),
        ("write the client's head", _timed(to_client)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.hot_path", description="What one request costs the coordinator.")
    parser.add_argument("--seconds", type=int, default=2, help="length of one run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--history", action="store_true", help="with history on")
    parser.add_argument("--stream", action="store_true", help="streams at full speed in place of small answers; no parts")
    chosen = parser.parse_args()
    more_files()
    model = STREAM if chosen.stream else SMALL
    own, kernel, rate = whole_us(
        model=model, connections=chosen.connections, seconds=chosen.seconds, rounds=chosen.rounds,
        history=chosen.history,
    )  # fmt: skip
    print(f"{own + kernel:6.1f} µs a request: {own:.1f} its own, {kernel:.1f} in the kernel ({rate:,.0f} requests/s)")
    if chosen.stream:
        return
    known = parts()
    for name, us in known:
        print(f"{us:6.2f}    {name}")
    print(f"{own - sum(us for _, us in known):6.2f}    sockets, tasks, and what lies between")


if __name__ == "__main__":
    main()
