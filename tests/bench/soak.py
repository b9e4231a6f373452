"""`python -m tests.bench.soak [--minutes 30]`: mixed traffic with faults, and whether anything grows or is forgotten.

A coordinator with five nodes, two of them behind agents, and nginx in front where this version has it; clients ask through both edges.
First, whatever the coordinator keeps a fixed number of is filled (`KEPT_ENTRIES`): a table that is not full yet would look like a leak.
All the time nodes answer with 503 and 500, cut and reset streams; now and then one is killed and comes back, an agent too, and nginx is
reloaded. Twice everything rests, clients and faults, until kept connections have ended: what is held then is compared. At the end: no
growth of memory, descriptors or leases, and every request is in history once. Writes `build/soak/samples.csv` and
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from core.affinity import HOMES_MAX
from core.config import RouterConfig
from servers.sinks import RECORDS_KEPT
from tests.bench import page
from tests.bench.children import Child, end_in_order, free_port, more_files, running
from tests.bench.sides import Coordinator, Edge, agent, coordinator, edge, has_edge
from tests.bench.soak_clients import MODEL, Clients, shown
from tests.bench.soak_watch import (
    COUNTED,
    HELD_MORE_MAX,
    JUDGED_FROM_S,
    REST_S,
    Sample,
    ended,
    growths,
    growths_at_rest,
    rests,
    table,
    write_csv,
)
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
SHIFTS = (0.3, 0.7)
"""Shares of the time; after each everything rests. In half an hour there were faults of all kinds before the first rest."""


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


def _jobs(world: World) -> Iterator[str]:
    """What goes wrong, one after the other."""
    reloads = ["nginx reloaded"] * 2 if world.front is not None else []
    return itertools.cycle(["node killed", "node killed", "node stopped", "agent killed", *reloads])


async def _faults(world: World, jobs: Iterator[str], dice: random.Random) -> None:
    """One thing after the other goes wrong, until cancelled."""
    while True:
        await trio.sleep(dice.uniform(*FAULT_EVERY_S))
        job = next(jobs)
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


@dataclass
class Course:
    """The soak as it goes on: clients and faults by turns with rests. `seconds`: of clients that ask; the rests come on top."""

    world: World
    clients: Clients
    seconds: float
    rest_s: float
    dice: random.Random
    samples: list[Sample] = field(default_factory=list)
    jobs: Iterator[str] = field(init=False)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.jobs = _jobs(self.world)

    async def run(self, say: Callable[[float, str], None]) -> None:
        """All of it. `say` is told the seconds that are over, and what goes on."""
        say(0.0, f"{FILL_REQUESTS:,} requests first")
        await self.clients.fill(FILL_REQUESTS, CLIENTS)
        self.began = time.monotonic()
        over_s = 0.0
        for share in SHIFTS:
            await self._shift(share * self.seconds, over_s, say)
            over_s += share * self.seconds
            say(over_s, "everything rests")
            await self._rest()

    async def _shift(self, seconds: float, over_s: float, say: Callable[[float, str], None]) -> None:
        began = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.clients.run, CLIENTS)
            async with trio.open_nursery() as beside:
                beside.start_soon(_faults, self.world, self.jobs, self.dice)
                beside.start_soon(self._sample_for_ever)
                while (passed := time.monotonic() - began) < seconds:
                    leases = self.samples[-1].values["leases"] if self.samples else None
                    say(over_s + passed, f"{self.clients.account.sent:,} requests, {leases or 0:.0f} in flight")
                    await trio.sleep(1)
                beside.cancel_scope.cancel()
            self.clients.stopping = True
            say(over_s + seconds, "clients end")

    async def _rest(self) -> None:
        """Nobody asks any more: until kept connections have ended, and on to what is held then.

        The coordinator is asked for its leases at both ends only: calls that meet an agent's heartbeat make it keep connections.
        """
        await trio.to_thread.run_sync(lambda: self.world.behind.wait_idle(within_s=DRAIN_S))
        first = await self._sample(at_rest=True)
        passed = 0.0
        while passed < self.rest_s:
            await trio.sleep(min(1.0, self.rest_s / COUNTED))
            passed = time.monotonic() - self.began - first.at_s
            await self._sample(at_rest=True, asking=passed >= self.rest_s)

    async def _sample_for_ever(self) -> None:
        while True:
            await self._sample(at_rest=False)
            await trio.sleep(max(1.0, self.seconds / SAMPLES_MAX))

    async def _sample(self, *, at_rest: bool, asking: bool = True) -> Sample:
        values: dict[str, float | None] = {}
        at_s = time.monotonic() - self.began
        for name, child in self.world.watched().items():
            values[f"{name}_bytes"] = child.memory_bytes() or None
            values[f"{name}_files"] = child.descriptors() or None
        try:
            found = await trio.to_thread.run_sync(self.world.behind.metrics) if asking else {}
        except (OSError, RuntimeError):
            found = {}
        values["leases"] = found.get("ollama_router_requests_in_flight")
        values["waiting"] = found.get("ollama_router_requests_waiting")
        sample = Sample(at_s, values, at_rest)
        self.samples.append(sample)
        return sample


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


def _grown(samples: list[Sample], seconds: float) -> tuple[list[str], list[str]]:
    """What grew though it should not have, and what is told of all."""
    resting, under_load, at_rest = rests(samples), growths(samples), growths_at_rest(samples)
    judged = [*at_rest, *(under_load if seconds >= JUDGED_FROM_S else [])]
    problems = [f"{one.column} grew from {one.earlier:,.0f} to {one.later:,.0f}" for one in judged if one.too_much]
    problems += [f"nothing is left of what {column} counts" for column in ended(samples)]
    if seconds >= JUDGED_FROM_S and not at_rest:
        problems.append(f"there were no two rests of {REST_S:.0f} s, so descriptors cannot be judged")
    leases = [rest.leases for rest in resting]
    if not leases or any(held is None for held in leases):
        problems.append("the coordinator did not say what is in flight when everything has ended")
    elif most := max(held for held in leases if held is not None):
        problems.append(f"{most:.0f} requests are still in flight after everything has ended")
    told = [
        "in flight after everything had ended: " + ", ".join("unknown" if held is None else f"{held:.0f}" for held in leases),
        f"descriptors {REST_S:.0f} s after that, when kept connections have ended, first rest -> last (at most {HELD_MORE_MAX} more)"
        + (":" if at_rest else f": not judged, for a rest was shorter than {REST_S:.0f} s"),
        *(f"  {one.column}: {one.earlier:,.0f} -> {one.later:,.0f}" for one in at_rest),
        "while clients asked, median of the second fifth -> of the last fifth; memory is judged, the rest follows the load"
        + ("" if seconds >= JUDGED_FROM_S else f" (memory, too, is only shown in less than {JUDGED_FROM_S / 60:.0f} minutes)") + ":",
        *(f"  {one.column}: {one.earlier:,.0f} -> {one.later:,.0f}" for one in under_load),
    ]  # fmt: skip
    return problems, told


def judge(clients: Clients, samples: list[Sample], recorded: list[str], *, faults: dict[str, int], seconds: float) -> Outcome:
    """The verdict."""
    account = clients.account
    known = set(recorded)
    problems, grown = _grown(samples, seconds)
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
        *grown,
        "VERDICT: " + ("good" if not problems else "bad"), *(f"  {problem}" for problem in problems),
    ]  # fmt: skip
    return Outcome(problems, "\n".join(told))


def soak(place: Path, *, minutes: float, seed: int, console: Console, rest_s: float = REST_S) -> tuple[Outcome, list[Sample]]:
    """Everything, from start to verdict."""
    seconds = minutes * 60
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    with open_world(place) as world, Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("soak", total=seconds, said="")
        clients = Clients(world.ports, seed=seed)
        course = Course(world, clients, seconds, rest_s, random.Random(seed))
        trio.run(course.run, lambda passed, said: progress.update(bar, completed=passed, said=said))
        data_dir, faults = world.behind.data_dir, world.faults
    return judge(clients, course.samples, _recorded(data_dir), faults=faults, seconds=seconds), course.samples


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
