"""`python -m tests.bench.soak [--minutes 30]`: mixed traffic with faults, and whether anything grows or is forgotten.

A coordinator with five nodes, two of them behind agents, and nginx in front where this version has it; clients ask through both edges.
First, whatever the coordinator keeps a fixed number of is filled (`KEPT_ENTRIES`): a table that is not full yet would look like a leak.
All the time nodes answer with 503 and 500, cut and reset streams; now and then one is killed and comes back, an agent too, and nginx is
reloaded. At the end: no growth of memory, descriptors or leases, and every request is in history once. Writes `build/soak/samples.csv` and
`build/soak/verdict.txt`, which docs/performance.md shows; exits with 1 when the verdict is bad.
"""

import argparse
import itertools
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from core.affinity import HOMES_MAX
from core.config import RouterConfig
from servers.coordinator import RECORDS_KEPT
from tests.bench import page
from tests.bench.children import Child, end_in_order, free_port, more_files, running
from tests.bench.sides import Coordinator, Edge, agent, coordinator, edge, has_edge
from tests.bench.soak_clients import MODEL, Clients, shown
from tests.bench.soak_watch import JUDGED_FROM_S, Growth, Sample, growths, table, write_csv
from tests.house.tree import ROOT

CLIENTS = 32
SAMPLES_MAX = 600
FAULT_EVERY_S = (8.0, 20.0)
AWAY_S = 3.0
KEPT_ENTRIES = max(RECORDS_KEPT, RouterConfig().explain_ring, HOMES_MAX)
"""What the coordinator holds of its newest requests: records, explanations, beginnings of prompts."""
FILL_REQUESTS = KEPT_ENTRIES + KEPT_ENTRIES // 5
KEPT = ROOT / "build" / "soak"
DRAIN_S = 60.0


@dataclass
class World:
    """Everything that runs."""

    behind: Coordinator
    nodes: list[Child]
    steady_agent: Child
    """Never restarted, so that its growth can be judged."""
    other_agent: Child
    front: Edge | None
    faults: dict[str, int] = field(default_factory=dict)

    @property
    def ports(self) -> list[int]:
        return [self.behind.port] if self.front is None else [self.behind.port, self.front.port]

    def watched(self) -> dict[str, Child]:
        """What is judged."""
        found = {"coordinator": self.behind.child, "agent": self.steady_agent}
        return found if self.front is None else {**found, "nginx": self.front.child}


@contextmanager
def open_world(place: Path) -> Iterator[World]:
    """Three nodes without agents, two with, the coordinator, and nginx."""
    ports = [free_port() for _ in range(5)]
    with ExitStack() as stack:
        nodes = []
        for number, port in enumerate(ports):
            command = [sys.executable, "-m", "tests.bench.soak_node", str(port), str(number), MODEL]
            nodes.append(stack.enter_context(running(Child(f"node {number}", command, place / f"node-{number}.log"), port=port)))
        backends = {f"bare-{number}": port for number, port in enumerate(ports[:3])}
        behind = stack.enter_context(coordinator(place, "coordinator", backends, history=True, HEALTH_CHECK_INTERVAL="5s"))
        agents = [
            stack.enter_context(agent(place, f"agent-{number}", behind.port, port, AGENT_HEARTBEAT_INTERVAL_SECS="2"))
            for number, port in enumerate(ports[3:])
        ]
        behind.wait_ready(5)
        front = stack.enter_context(edge(place, "edge", behind)) if has_edge() else None
        yield World(behind, nodes, agents[0], agents[1], front)


async def _faults(world: World, dice: random.Random) -> None:
    """One thing after the other goes wrong, until cancelled."""
    jobs = ["node killed", "node killed", "node stopped", "agent killed", *(["nginx reloaded"] * 2 if world.front is not None else [])]
    for job in itertools.cycle(jobs):
        await trio.sleep(dice.uniform(*FAULT_EVERY_S))
        world.faults[job] = world.faults.get(job, 0) + 1
        if job == "nginx reloaded":
            assert world.front is not None
            _reload(world.front)
            continue
        child = world.other_agent if job == "agent killed" else dice.choice(world.nodes)
        how = signal.SIGTERM if job == "node stopped" else signal.SIGKILL
        with trio.CancelScope(shield=True):  # what was stopped is started again
            await trio.to_thread.run_sync(child.stop, how)
            await trio.sleep(AWAY_S)
            child.start()


def _reload(front: Edge) -> None:
    """As an operator would: the master reads its configuration anew."""
    _, master, *_ = front.child.pids()
    Child.signal_pid(master, signal.SIGHUP)


async def _samples(world: World, samples: list[Sample], *, every_s: float, began: float) -> None:
    while True:
        values: dict[str, float | None] = {}
        for name, child in world.watched().items():
            values[f"{name}_bytes"] = child.memory_bytes() or None
            values[f"{name}_files"] = child.descriptors() or None
        try:
            found = await trio.to_thread.run_sync(world.behind.metrics)
        except (OSError, RuntimeError):
            found = {}
        values["leases"] = found.get("ollama_router_requests_in_flight")
        values["waiting"] = found.get("ollama_router_requests_waiting")
        samples.append(Sample(time.monotonic() - began, values))
        await trio.sleep(every_s)


async def _run(world: World, clients: Clients, samples: list[Sample], *, seconds: float, seed: int, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("soak", total=seconds, said=f"{FILL_REQUESTS:,} requests first")
        await clients.fill(FILL_REQUESTS, CLIENTS)
        began = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clients.run, CLIENTS)
            async with trio.open_nursery() as beside:
                beside.start_soon(_faults, world, random.Random(seed))
                beside.start_soon(lambda: _samples(world, samples, every_s=max(1.0, seconds / SAMPLES_MAX), began=began))
                while (passed := time.monotonic() - began) < seconds:
                    leases = samples[-1].values["leases"] if samples else None
                    progress.update(bar, completed=passed, said=f"{clients.account.sent:,} requests, {leases or 0:.0f} in flight")
                    await trio.sleep(1)
                beside.cancel_scope.cancel()
            clients.stopping = True
            progress.update(bar, completed=seconds, said="clients end")


def _recorded(data_dir: Path) -> list[str]:
    """The ids of all records of a coordinator that has stopped."""
    line = sqlite3.connect(f"file:{data_dir / 'coordinator.db'}?mode=ro", uri=True)
    try:
        return [row[0] for row in line.execute("SELECT request_id FROM requests")]
    finally:
        line.close()


@dataclass(frozen=True)
class Outcome:
    """What is told at the end."""

    problems: list[str]
    text: str


def judge(
    clients: Clients, samples: list[Sample], recorded: list[str], *, leases: float, faults: dict[str, int], seconds: float
) -> Outcome:  # fmt: skip
    """The verdict."""
    account = clients.account
    known = set(recorded)
    problems = []
    grown: list[Growth] = growths(samples)
    if seconds >= JUDGED_FROM_S:
        problems += [
            f"{one.column} grew from {one.second_fifth:,.0f} to {one.last_fifth:,.0f}"
            for one in grown if one.too_much and one.column not in ("leases", "waiting")
        ]  # fmt: skip
    if leases:
        problems.append(f"{leases:.0f} requests are still in flight after everything has ended")
    if lost := account.ids - known:
        problems.append(f"{len(lost)} ids that clients saw are not in history, such as {min(lost)}")
    if len(recorded) != len(known):
        problems.append(f"{len(recorded) - len(known)} ids are in history twice")
    silent = account.left_early + account.unanswered
    if not account.sent - silent <= len(known) <= account.sent:
        problems.append(f"{account.sent} requests were sent ({silent} of them without an answer), and history has {len(known)}")
    if account.without_id or account.twice:
        problems.append(f"{account.without_id} answers had no id, {account.twice} had one that was there already")
    told = [
        f"{seconds / 60:g} minutes of {CLIENTS} clients, after {FILL_REQUESTS:,} requests that filled the tables; faults: {faults}",
        *(f"{name}: {value}" for name, value in shown(account).items()),
        f"in history: {len(known)} (every id that a client saw: {'yes' if account.ids <= known else 'no'})",
        f"leases at the end: {leases:.0f}",
        "growth, median of the second fifth -> of the last fifth"
        + ("" if seconds >= JUDGED_FROM_S else f" (shown, not judged, in less than {JUDGED_FROM_S / 60:.0f} minutes)") + ":",
        *(f"  {one.column}: {one.second_fifth:,.0f} -> {one.last_fifth:,.0f}" for one in grown),
        "VERDICT: " + ("good" if not problems else "bad"), *(f"  {problem}" for problem in problems),
    ]  # fmt: skip
    return Outcome(problems, "\n".join(told))


def soak(place: Path, *, minutes: float, seed: int, console: Console) -> tuple[Outcome, list[Sample]]:
    """Everything, from start to verdict."""
    seconds = minutes * 60
    samples: list[Sample] = []
    with open_world(place) as world:
        clients = Clients(world.ports, seed=seed)
        trio.run(lambda: _run(world, clients, samples, seconds=seconds, seed=seed, console=console))
        leases = world.behind.wait_idle(within_s=DRAIN_S)
        data_dir, faults = world.behind.data_dir, world.faults
    return judge(clients, samples, _recorded(data_dir), leases=leases, faults=faults, seconds=seconds), samples


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.soak", description="Mixed traffic with faults: does anything grow?")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    console = Console(stderr=True)
    more_files()
    end_in_order()
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)  # nginx's workers may be another user's
        outcome, samples = soak(Path(place), minutes=chosen.minutes, seed=chosen.seed, console=console)
    KEPT.mkdir(parents=True, exist_ok=True)
    write_csv(KEPT / "samples.csv", samples)
    (KEPT / "verdict.txt").write_text(outcome.text + "\n")
    if chosen.minutes * 60 >= JUDGED_FROM_S:
        page.write()
    print(table(samples))
    print(outcome.text)
    print(f"(all samples: {(KEPT / 'samples.csv').relative_to(ROOT)})")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
