"""Streams that wait: runs the client and its order, and the nodes that stream for it. Knows no bar.

Invariant: the client's process has ended when `seen` returns or raises.
"""

import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from tests.bench.children import Child, free_port, running
from tests.bench.client import PATIENCE_S, Order, Seen
from tests.house.tree import ROOT

MODEL = "tokens:latest"


@contextmanager
def streamers(place: Path, nodes: int) -> Iterator[dict[str, int]]:
    """So many nodes of one process that stream `MODEL`; their ports by name."""
    ports = {f"node-{number}": free_port() for number in range(1, nodes + 1)}
    command = [sys.executable, "-m", "tests.bench.streamer", MODEL, *map(str, ports.values())]
    with running(Child("streamer", command, place / "streamer.log"), port=next(iter(ports.values()))):
        yield ports


def seen(order: Order, when_open: Callable[[], None] = lambda: None) -> Seen:
    """What the client saw. `when_open` is called while all streams are open, and has their hold to do its work.

    Raises:
        RuntimeError: the client failed, or took far longer than its order says.
    """
    command = [sys.executable, "-m", "tests.bench.client", msgspec.json.encode(order).decode()]
    client = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert client.stdout is not None
        limit_s = order.ramp_s + order.hold_s + 3 * PATIENCE_S
        if not select.select([client.stdout], [], [], limit_s)[0]:
            raise RuntimeError(f"no {order.streams} streams were open after {limit_s:.0f} s")
        first = client.stdout.readline()
        if first.strip() == b"open":
            when_open()
        said, complaint = client.communicate(timeout=limit_s)
        if client.returncode:
            raise RuntimeError(f"the client failed: {complaint.decode(errors='replace')[-1000:]}")
        return msgspec.json.decode(said, type=Seen)
    finally:
        if client.poll() is None:
            client.kill()
        client.wait()


def sample(value: Callable[[], float], *, seconds: float, every_s: float = 0.5) -> list[float]:
    """`value` now and then."""
    until = time.monotonic() + seconds
    found = [value()]
    while time.monotonic() < until:
        time.sleep(every_s)
        found.append(value())
    return found
