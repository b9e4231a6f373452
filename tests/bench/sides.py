"""The sides of a comparison: a node itself, plain nginx, and the router with either edge; all running at once, so that they can take turns.

Decides how the router's programs are set up for a measurement. Knows nothing of loads and bars. Invariant: what a `with` block started has
ended when it is left.
"""

import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tests.bench.children import Child, free_port, get, metrics, running, wait_for
from tests.bench.programs import BURST, PACED, SMALL, STREAM, nginx, node, proxy
from tests.house.tree import ROOT

SLOTS = 1024
"""Requests that one node serves at once: as many as may be set."""
NODES = {"small-1": SMALL, "small-2": SMALL, "stream": STREAM, "burst": BURST, "paced": PACED}
DIRECT, NGINX = "direct", "plain nginx"
EMBEDDED, EMBEDDED_ON = "embedded", "embedded, history"
EDGE, EDGE_ON = "nginx edge", "nginx edge, history"
EMBEDDED_GATEWAYS, EDGE_GATEWAYS = "embedded, gateways", "nginx edge, gateways"
ALL = (DIRECT, NGINX, EMBEDDED, EMBEDDED_ON, EDGE, EDGE_ON, EMBEDDED_GATEWAYS, EDGE_GATEWAYS)
EDGES = (EDGE, EDGE_ON, EDGE_GATEWAYS)


def has_edge() -> bool:
    """Whether this version can put nginx in front."""
    return (ROOT / "edge" / "__main__.py").is_file()


@dataclass(frozen=True)
class Coordinator:
    """`python -m servers`, running."""

    child: Child
    port: int
    data_dir: Path

    def metrics(self) -> dict[str, float]:
        return metrics(self.port)

    def ready(self) -> int:
        """Nodes that may be given requests."""
        agents = msgspec.json.decode(get(self.port, "/api/agents", within_s=30)[1])
        return sum(agent["state"] == "ready" for agent in agents)

    def wait_ready(self, nodes: int, *, within_s: float = 60.0) -> None:
        """Until so many nodes are ready.

        Raises:
            RuntimeError: they were not in time.
        """
        deadline = time.monotonic() + within_s
        while (found := self.ready()) < nodes:
            if time.monotonic() > deadline:
                raise RuntimeError(f"only {found} of {nodes} nodes became ready\n{self.child.said()}")
            time.sleep(0.1)

    def wait_idle(self, *, within_s: float = 30.0) -> float:
        """Until no request is in flight or waits; how many still do when that takes too long."""
        deadline = time.monotonic() + within_s
        while True:
            found = self.metrics()
            left = found["ollama_router_requests_in_flight"] + found["ollama_router_requests_waiting"]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.2)

    def wait_written(self, *, within_s: float = 10.0) -> None:
        """Until no more of history is written; so long at most."""
        deadline, before = time.monotonic() + within_s, -1.0
        while (written := self.metrics().get("ollama_router_history_records_total", 0.0)) != before and time.monotonic() < deadline:
            before = written
            time.sleep(0.15)  # records are sent every tenth of a second


@contextmanager
def coordinator(place: Path, name: str, backends: Mapping[str, int], *, history: bool, **environ: str) -> Iterator[Coordinator]:
    """A coordinator with these nodes without agents, all ready."""
    port, data_dir = free_port(), place / name
    listed = ",".join(f"{node_name}=http://127.0.0.1:{node_port};slots={SLOTS}" for node_name, node_port in backends.items())
    settings = {
        "ROUTER_HOST": "127.0.0.1", "ROUTER_PORT": str(port), "ROUTER_DATA_DIR": str(data_dir), "OLLAMA_BACKENDS": listed,
        "ROUTER_LOG_LEVEL": "warning", "ROUTER_QUEUE_PER_CLIENT": "1024", "ROUTER_STOP_TIMEOUT": "2s", "ROUTER_NGINX_DIRECT": "true",
        **({} if history else {"HISTORY_RETENTION_DAYS": "0"}), **environ,
    }  # fmt: skip
    child = Child(f"coordinator {name}", [sys.executable, "-m", "servers"], place / f"{name}.log", settings)
    with running(child, port=port, path="/readyz"):
        found = Coordinator(child, port, data_dir)
        found.wait_ready(len(backends))
        yield found


@contextmanager
def agent(place: Path, name: str, router_port: int, node_port: int, **environ: str) -> Iterator[Child]:
    """An agent, whose gateway stands before the node on `node_port`."""
    settings = {
        "ROUTER_URL": f"http://127.0.0.1:{router_port}", "OLLAMA_API_BASE": f"http://127.0.0.1:{node_port}", "OLLAMA_PORT": str(node_port),
        "AGENT_API_PORT": "0", "AGENT_ADVERTISE_ADDRESS": "127.0.0.1", "AGENT_STOP_TIMEOUT_SECS": "1", "OLLAMA_NUM_PARALLEL": str(SLOTS),
        "AGENT_DATA_DIR": str(place / f"agent-{name}"), "ROUTER_LOG_LEVEL": "warning", **environ,
    }  # fmt: skip
    with running(Child(f"agent {name}", [sys.executable, "-m", "agent"], place / f"agent-{name}.log", settings)) as child:
        yield child


@dataclass(frozen=True)
class Edge:
    """`python -m edge run`: nginx in front of a coordinator."""

    child: Child
    port: int


@contextmanager
def edge(place: Path, name: str, behind: Coordinator) -> Iterator[Edge]:
    """nginx in front of `behind`, once it serves."""
    port = free_port()
    command = [
        sys.executable, "-m", "edge", "run", "--selection", str(behind.data_dir / "selection.sock"),
        "--listen", f"127.0.0.1:{port}", "--dir", str(place / f"edge-{name}"), "--stop-timeout", "2",
    ]  # fmt: skip
    with running(Child(f"edge {name}", command, place / f"edge-{name}.log"), port=port) as child:
        yield Edge(child, port)


@dataclass(frozen=True)
class Side:
    """Whom to ask, and what serves that."""

    ports: Mapping[str, int]
    """By model."""
    children: list[Child] = field(default_factory=list)
    behind: Coordinator | None = None


@dataclass(frozen=True)
class Stage:
    """All sides, running."""

    sides: dict[str, Side]
    nodes: Mapping[str, int]


@contextmanager
def _nodes(place: Path, ports: Mapping[str, int]) -> Iterator[None]:
    """The nodes of `NODES`, all of them one nginx but for the one that streams without a pause."""
    configuration = "".join(node([port], NODES[name]) for name, port in ports.items() if NODES[name] != BURST)
    streamer = Child("streamer", [sys.executable, "-m", "tests.bench.streamer", BURST, str(ports["burst"])], place / "streamer.log")
    with nginx(place, "nodes", configuration, workers=1, port=ports["small-1"]), running(streamer, port=ports["burst"]):
        yield


@contextmanager
def stage(place: Path, wanted: Collection[str]) -> Iterator[Stage]:
    """The nodes and these sides. `place` is an empty directory."""
    nodes = {name: free_port() for name in NODES}
    by_model: dict[str, list[int]] = {}
    for name, port in nodes.items():
        by_model.setdefault(NODES[name], []).append(port)
    with ExitStack() as stack:
        stack.enter_context(_nodes(place, nodes))
        sides = {DIRECT: Side({model: ports[0] for model, ports in by_model.items()})}
        if NGINX in wanted:
            plain = {model: free_port() for model in by_model}
            configuration = "".join(
                proxy(plain[model], model.partition(":")[0], ports, "" if model == SMALL else "proxy_buffering off;")
                for model, ports in by_model.items()
            )
            child = stack.enter_context(nginx(place, "plain", configuration, workers=2, port=plain[SMALL]))
            sides[NGINX] = Side(plain, [child])
        for embedded, with_edge, history, gateways in (
            (EMBEDDED, EDGE, False, False),
            (EMBEDDED_ON, EDGE_ON, True, False),
            (EMBEDDED_GATEWAYS, EDGE_GATEWAYS, True, True),
        ):
            if embedded in wanted or (with_edge in wanted and has_edge()):
                sides.update(_router(stack, place, nodes, embedded, with_edge, wanted, history=history, gateways=gateways))
        yield Stage({name: sides[name] for name in ALL if name in sides and (name in wanted or name == DIRECT)}, nodes)


def _router(
    stack: ExitStack, place: Path, nodes: Mapping[str, int], embedded: str, with_edge: str, wanted: Collection[str], *, history: bool,
    gateways: bool,
) -> dict[str, Side]:  # fmt: skip
    """One coordinator, asked itself and, where wanted, through nginx."""
    name = embedded.replace(", ", "-")
    behind = stack.enter_context(coordinator(place, name, {} if gateways else nodes, history=history))
    agents = [stack.enter_context(agent(place, one, behind.port, port)) for one, port in nodes.items()] if gateways else []
    behind.wait_ready(len(nodes))
    found = {embedded: Side(dict.fromkeys(NODES.values(), behind.port), [behind.child, *agents], behind)}
    if with_edge in wanted and has_edge():
        front = stack.enter_context(edge(place, name, behind))
        wait_for(front.port, "/api/version", front.child)
        found[with_edge] = Side(dict.fromkeys(NODES.values(), front.port), [front.child, behind.child, *agents], behind)
    return found
