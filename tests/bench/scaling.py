"""What a request costs with few and many nodes, and over few and many connections: it must grow slowly and without a cliff.

Decides the numbers and the bar. The cost is the processor time per request of the coordinator (and of nginx in front of it); what the
coordinator does without any request, asking its nodes how they are, is measured first and taken off.
"""

import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median

import msgspec

from tests.bench.children import Child, more_files
from tests.bench.programs import SMALL, nginx, node, wrk
from tests.bench.sides import EDGE, EMBEDDED, coordinator, edge, has_edge

NODES = (1, 10, 100, 1000)
CONNECTIONS = (1, 10, 100, 1000)
NODES_STEP_MAX, CONNECTIONS_STEP_MAX = 10.0, 2.0
"""Ten times as many may cost a request so many times as much: a choice among nodes linearly, a connection hardly."""
IDLE_S = 3.0


class Cell(msgspec.Struct):
    """One number of nodes and connections on one side; medians."""

    nodes: int
    connections: int
    cpu_us: float
    requests_per_s: float
    p50_ms: float


class Scaling(msgspec.Struct):
    """Cells by side, and the share of a core that the coordinator takes without requests, by number of nodes."""

    seconds: int
    rounds: int
    cells: dict[str, list[Cell]]
    idle_share: dict[int, float]


def many_ports(count: int) -> list[int]:
    """Free ports, all held until the last is found, so that none comes twice."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]


def _idle_share(child: Child) -> float:
    before_s, began = child.cpu_s(), time.monotonic()
    time.sleep(IDLE_S)
    return (child.cpu_s() - before_s) / (time.monotonic() - began)


def _cell(
    place: Path, port: int, children: list[Child], *, nodes: int, connections: int, seconds: int, rounds: int, idle_share: float
) -> Cell:  # fmt: skip
    wrk(place, port, SMALL, connections=connections, seconds=seconds)  # connections on both sides are opened
    loads = [wrk(place, port, SMALL, connections=connections, seconds=seconds, asked=children) for _ in range(rounds)]
    return Cell(
        nodes, connections, median(load.cpu_us - idle_share * 1e6 / max(1.0, load.requests_per_s) for load in loads),
        median(load.requests_per_s for load in loads), median(load.p50_ms for load in loads),
    )  # fmt: skip


def run(
    place: Path, *, seconds: int, rounds: int, say: Callable[[str], None], nodes: Sequence[int] = NODES,
    connections: Sequence[int] = CONNECTIONS,
) -> Scaling:  # fmt: skip
    """All cells; about `seconds * (rounds + 1) * 16` seconds for each side, and a minute to start."""
    more_files()
    cells: dict[str, list[Cell]] = {}
    shares: dict[int, float] = {}
    for count in nodes:
        say(f"{count} nodes")
        where = place / f"nodes-{count}"
        where.mkdir()
        ports = many_ports(count)
        with ExitStack() as stack:
            stack.enter_context(nginx(where, "nodes", node(ports, SMALL), workers=1, port=ports[-1]))
            backends = {f"node-{number}": port for number, port in enumerate(ports, 1)}
            behind = stack.enter_context(coordinator(where, "coordinator", backends, history=False))
            sides = {EMBEDDED: (behind.port, [behind.child])}
            if has_edge():
                front = stack.enter_context(edge(where, "edge", behind))
                sides[EDGE] = (front.port, [front.child, behind.child])
            for port, _ in sides.values():
                wrk(where, port, SMALL, connections=32, seconds=1)
            shares[count] = _idle_share(behind.child)
            for side, (port, children) in sides.items():
                for at_once in connections:
                    cells.setdefault(side, []).append(
                        _cell(
                            where, port, children, nodes=count, connections=at_once, seconds=seconds, rounds=rounds,
                            idle_share=shares[count],
                        )
                    )  # fmt: skip
    return Scaling(seconds, rounds, cells, shares)


def _steps(cells: list[Cell]) -> list[tuple[str, float, float]]:
    """What each step of ten multiplies the cost by, and what it may."""
    at = {(cell.nodes, cell.connections): cell.cpu_us for cell in cells}
    nodes, connections = (sorted({key[part] for key in at}) for part in (0, 1))
    found = [
        (f"{few} to {many} nodes with {same} connections", at[many, same] / at[few, same], NODES_STEP_MAX)
        for few, many in pairwise(nodes) for same in connections
    ]  # fmt: skip
    return found + [
        (f"{few} to {many} connections with {same} nodes", at[same, many] / at[same, few], CONNECTIONS_STEP_MAX)
        for few, many in pairwise(connections) for same in nodes
    ]  # fmt: skip


def misses(found: Scaling) -> list[str]:
    return [
        f"{side}: from {what} a request costs {times:.1f} times as much, more than {most:g}"
        for side, cells in found.cells.items()
        for what, times, most in _steps(cells)
        if times > most
    ]


def section(found: Scaling) -> str:
    parts = [
        "## Many nodes, many connections",
        "",
        "Processor µs of one small answer: the coordinator's, with the nginx edge also nginx's; history off. In brackets the requests per"
        f" second that came of it on shared cores. No cliff: ten times the nodes cost a request at most {NODES_STEP_MAX:g} times as much,"
        f" ten times the connections at most {CONNECTIONS_STEP_MAX:g} times, wherever in the table.",
    ]
    for side, cells in found.cells.items():
        connections = sorted({cell.connections for cell in cells})
        parts += ["", f"| {side} | " + " | ".join(f"{number:,} connection{'s' if number > 1 else ''}" for number in connections) + " |"]
        parts += ["| --- |" + " ---: |" * len(connections)]
        for nodes in sorted({cell.nodes for cell in cells}):
            row = {cell.connections: cell for cell in cells if cell.nodes == nodes}
            shown = " | ".join(f"{row[number].cpu_us:,.0f} ({row[number].requests_per_s:,.0f}/s)" for number in connections)
            parts.append(f"| {nodes:,} node{'s' if nodes > 1 else ''} | {shown} |")
        worst = max(_steps(cells), key=lambda step: step[1] / step[2], default=None)
        if worst is not None:
            parts += ["", f"The steepest step: from {worst[0]}, {worst[1]:.2f} times."]
    shares = ", ".join(f"{share:.1%} with {nodes:,}" for nodes, share in found.idle_share.items())
    parts += [
        "",
        f"Without requests the coordinator takes this share of a core to ask its nodes how they are: {shares}. It is not in the table.",
    ]
    return "\n".join(parts)
