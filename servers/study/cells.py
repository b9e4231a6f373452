"""One cell of a study: a fleet, a trace at a rate, a strategy and a seed; and many of them side by side in processes.

Decides nothing about routing. Invariants: a cell's figures depend on the cell alone; when a study is stopped, what is under way is ended
early and says so.
"""

import contextlib
import math
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, Final

import msgspec

from core.config import STRATEGIES, RouterConfig
from core.placement import Plan
from core.simulation.baselines import rules
from core.simulation.bound import best_placement, demand
from core.simulation.prng import Prng
from core.simulation.study import Dispatcher, Figures, NodeSpec, RuleDispatcher, Study
from core.simulation.study_router import RouterDispatcher
from core.simulation.workload import arrivals
from servers.study.traces import Trace, rows

PERCENTS: Final = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5, 99.9)
"""Of the plotted distribution."""

WINDOWS: Final = 60
"""Points of a plot over time."""

UNSTABLE_FACTOR: Final = 1.3
UNSTABLE_MIN_S: Final = 20.0
"""A run is unstable when the mean wait grows by this factor from the second fifth to the third, and on to the last, beyond so long."""

POLL_S: Final = 0.2
NO_LIMIT: Final = 1_000_000
WITH_ADVICE: Final = "auto+advice"
"""`auto` with the models of the placement plan preloaded, once; then it loads what it likes."""

WITH_PLAN: Final = "auto+plan"
"""`auto` among the nodes that the plan names for a model, where it was preloaded: nothing is ever loaded elsewhere."""


def all_strategies() -> tuple[str, ...]:
    """Names of strategies: the router's own, then the simple rules that it does not have."""
    own = (*STRATEGIES, WITH_ADVICE, WITH_PLAN)
    return (*own, *(name for name in rules() if name not in own))


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One run. `mixes`: which models each kind of row asks for; `limits`: the router's queue is as shipped, otherwise endless."""

    fleet: tuple[NodeSpec, ...]
    trace: Trace
    mixes: dict[str, dict[str, int]]
    strategy: str
    rate_per_s: float
    seed: int
    poisson: bool = False
    limits: bool = True
    unanswered_max: int | None = None
    """The run is cut when more requests than that have come and not ended; None: never."""
    clients: int = 50
    """Who asks, drawn for each request: traces do not tell. Only the router's own queue makes a difference between them."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What a run came to. Times in seconds; infinite: refused."""

    strategy: str
    seed: int
    rate_per_s: float
    requests: int
    refused: int
    ttft_s: dict[float, float]
    """By percent: 50, 95, 99 and `PERCENTS`."""
    loads_per_1000: float
    goodput: float
    utilisation: float
    """Mean over nodes: part of the time with at least one request in flight."""
    over_time: list[tuple[float, float, float]]
    """(seconds, utilisation, goodput) of each window."""
    unstable: bool
    complete: bool = True
    cut: bool = False
    """It was cut: its waits are at least these."""


def jobs(plain: Cell, strategies: Sequence[str], *, rate_per_s: float, seeds: Sequence[int]) -> list[Cell]:
    """A cell for each strategy and seed; the seeds of one strategy one after the other."""
    return [
        msgspec.structs.replace(plain, strategy=strategy, seed=seed, rate_per_s=rate_per_s) for strategy in strategies for seed in seeds
    ]


def plan_of(cell: Cell) -> Plan:
    """The placement for this cell's traffic; its `capacity_per_s` is what loads are measured against."""
    return best_placement(cell.fleet, demand(rows(cell.trace), cell.mixes), rate_per_s=cell.rate_per_s)


def run(cell: Cell, progress: Callable[[int, int], bool] | None = None) -> Summary:
    """Simulate one cell. `progress` as in `Study.run`."""
    dice = Prng(cell.seed)
    requests = arrivals(
        rows(cell.trace),
        rate_per_s=cell.rate_per_s,
        mixes=cell.mixes,
        prng=dice,
        poisson=cell.poisson,
        jitter_s=cell.trace.jitter_s(),
        clients=cell.clients,
    )
    fleet, preloaded = cell.fleet, {}
    if cell.strategy in (WITH_ADVICE, WITH_PLAN):
        planned: dict[str, list[str]] = {node.name: [] for node in fleet}
        for placed in plan_of(cell).placed:
            planned[placed.node].append(placed.model)
        preloaded = {index: planned[node.name] for index, node in enumerate(fleet)}
        if cell.strategy == WITH_PLAN:
            fleet = tuple(msgspec.structs.replace(node, models={name: node.models[name] for name in planned[node.name]}) for node in fleet)
    study = Study(fleet, requests, lambda: _dispatcher(cell, fleet, dice), preloaded=preloaded, unanswered_max=cell.unanswered_max)
    figures = study.run(progress)
    return _summary(cell, figures, complete=figures.cut or len(figures.outcomes) == len(requests))


def _dispatcher(cell: Cell, fleet: Sequence[NodeSpec], dice: Prng) -> Dispatcher:
    own = "auto" if cell.strategy in (WITH_ADVICE, WITH_PLAN) else cell.strategy
    if own not in STRATEGIES:
        return RuleDispatcher(rules()[own](), fleet, dice.split("choices"))
    if cell.limits:
        config = RouterConfig(strategy=own)
    else:
        config = RouterConfig(strategy=own, queue_max=NO_LIMIT, queue_per_client=NO_LIMIT, queue_timeout_s=1e9)
    return RouterDispatcher(config, fleet, with_metrics=own == "metrics")


def _summary(cell: Cell, figures: Figures, *, complete: bool) -> Summary:
    ordered = sorted(outcome.ttft_s for outcome in figures.outcomes)
    return Summary(
        strategy=cell.strategy,
        seed=cell.seed,
        rate_per_s=cell.rate_per_s,
        requests=len(ordered),
        refused=sum(math.isinf(ttft_s) for ttft_s in ordered),
        ttft_s={percent: ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0 for percent in PERCENTS},
        loads_per_1000=figures.loads_per_1000(),
        goodput=figures.goodput(),
        utilisation=sum(figures.busy_s) / max(len(figures.busy_s) * figures.span_s, 1e-9),
        over_time=_over_time(figures),
        unstable=figures.cut or _is_unstable(figures),
        complete=complete,
        cut=figures.cut,
    )


def _is_unstable(figures: Figures) -> bool:
    """Whether the queue still grows at the end: then percentiles measure how long the run was."""
    by_arrival = [outcome.ttft_s for outcome in sorted(figures.outcomes, key=lambda outcome: outcome.at_s)]
    fifth = len(by_arrival) // 5
    if not fifth:
        return False
    early, middle, last = (sum(by_arrival[start : start + fifth]) / fifth for start in (fifth, 2 * fifth, len(by_arrival) - fifth))
    return last > UNSTABLE_MIN_S and last > UNSTABLE_FACTOR * middle > UNSTABLE_FACTOR**2 * early


def _over_time(figures: Figures) -> list[tuple[float, float, float]]:
    width = figures.span_s / WINDOWS
    if width <= 0:
        return []
    busy = [0.0] * WINDOWS
    for spans in figures.busy_spans:
        for since, until in spans:
            for window in range(int(since / width), min(int(until / width), WINDOWS - 1) + 1):
                busy[window] += max(0.0, min(until, (window + 1) * width) - max(since, window * width))
    came, good = [0] * WINDOWS, [0] * WINDOWS
    for outcome in figures.outcomes:
        window = min(int(outcome.at_s / width), WINDOWS - 1)
        came[window] += 1
        good[window] += outcome.is_good()
    nodes = max(len(figures.busy_spans), 1)
    return [
        (window * width, busy[window] / width / nodes, good[window] / came[window] if came[window] else 1.0) for window in range(WINDOWS)
    ]


# ---------------------------------------------------------------- many


_stop: Any = None
_told: Any = None


def _begin(stop: Any, told: Any) -> None:
    """In each process: the keyboard's signal is the main process's business."""
    global _stop, _told
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _stop, _told = stop, told


def _run_apart(number: int, cell: Cell) -> Summary | None:
    if _stop.is_set():
        return None

    def progress(done: int, of_all: int) -> bool:
        with contextlib.suppress(queue.Full):
            _told.put_nowait((number, done / max(of_all, 1)))
        return not _stop.is_set()

    return run(cell, progress)


def run_all(cells: Sequence[Cell], *, progress: Callable[[float], None], processes: int | None = None) -> Iterator[tuple[int, Summary]]:
    """Each cell's number and figures, as they end; `progress` hears how many cells' worth of work is done.

    Ctrl-C, raised here as KeyboardInterrupt, ends what is under way: those cells come out incomplete, and the iteration ends.
    """
    context = multiprocessing.get_context("spawn")
    stop, told = context.Event(), context.Queue(1000)
    parts = [0.0] * len(cells)
    workers = max(1, min(len(cells), processes or os.cpu_count() or 1))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(stop, told)) as pool:
        pending: dict[Future[Summary | None], int] = {pool.submit(_run_apart, number, cell): number for number, cell in enumerate(cells)}
        try:
            yield from _collected(pending, told, stop, parts, progress)
        finally:
            stop.set()


def _collected(
    pending: dict[Future[Summary | None], int], told: Any, stop: Any, parts: list[float], progress: Callable[[float], None]
) -> Iterator[tuple[int, Summary]]:
    while pending:
        try:
            ended, _ = wait(pending, timeout=POLL_S, return_when=FIRST_COMPLETED)
            with contextlib.suppress(queue.Empty):
                while True:
                    number, part = told.get_nowait()
                    parts[number] = max(parts[number], part)
            for future in ended:
                number = pending.pop(future)
                parts[number] = 1.0
                if (summary := future.result()) is not None and summary.requests:
                    yield number, summary
            progress(sum(parts))
        except KeyboardInterrupt:
            if stop.is_set():
                raise
            stop.set()
