"""Cells: figures that depend on the cell alone, here and in another process; early ends that own up."""

import functools
import math
from collections.abc import Callable

import msgspec
import pytest

from core.config import RouterConfig
from core.simulation.study import Figures, Outcome
from servers.study import cells
from servers.study.cells import Cell, Summary, all_strategies, jobs, plan_of, run, run_all
from servers.study.fleet_file import mixed, usable_mixes
from servers.study.traces import Trace, mixes_of


def cell(strategy: str = "auto", **changes: object) -> Cell:
    trace, fleet = Trace(form="mooncake"), mixed()
    plain = Cell(
        fleet=fleet.nodes, trace=trace, mixes=usable_mixes(fleet, trace, mixes_of(trace)), strategy=strategy, rate_per_s=2.0, seed=1
    )
    return msgspec.structs.replace(plain, **changes)


@pytest.mark.parametrize("strategy", all_strategies())
def test_every_strategy_serves_every_request(strategy: str) -> None:
    summary = run(cell(strategy, limits=False))
    assert (summary.requests, summary.refused, summary.complete, summary.strategy) == (800, 0, True, strategy)
    assert 0 < summary.ttft_s[50] <= summary.ttft_s[95] <= summary.ttft_s[99] < math.inf
    assert 0 < summary.goodput <= 1
    assert 0 < summary.utilisation <= 1
    assert len(summary.over_time) == cells.WINDOWS
    assert sum(part for _, part, _ in summary.over_time) / cells.WINDOWS == pytest.approx(summary.utilisation, rel=0.01)


def test_the_same_cell_gives_the_same_figures_and_another_seed_others() -> None:
    assert run(cell()) == run(cell())
    assert run(cell()).ttft_s != run(cell(seed=2)).ttft_s


def test_advice_that_was_followed_saves_loads() -> None:
    assert run(cell("auto+advice")).loads_per_1000 < run(cell("auto")).loads_per_1000


def test_the_plan_says_what_the_fleet_carries() -> None:
    plan = plan_of(cell())
    assert plan.exact
    assert plan.capacity_per_s > 5
    assert max(plan.utilisation.values()) <= 1


def test_limits_refuse_and_count_as_endless_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "RouterConfig", functools.partial(RouterConfig, queue_timeout_s=2.0))
    summary = run(cell(rate_per_s=20.0))
    assert summary.refused > 0
    assert math.isinf(summary.ttft_s[99.9])


@pytest.mark.parametrize(("wait_s", "unstable"), [(lambda at_s: at_s, True), (lambda at_s: 50.0, False), (lambda at_s: at_s / 100, False)])
def test_a_queue_that_grows_is_told(wait_s: Callable[[float], float], unstable: bool) -> None:
    outcomes = [
        Outcome(model="m", client="", ttft_s=wait_s(float(n)), total_s=2000.0, output_tokens=5, node=0, cold=False, at_s=float(n))
        for n in range(500)
    ]
    figures = Figures(outcomes=outcomes, loads=1, busy_s=[10.0], span_s=500.0)
    assert cells._summary(cell(), figures, complete=True).unstable is unstable


def test_figures_of_nothing() -> None:
    empty = cells._summary(cell(), Figures(outcomes=[], loads=0, busy_s=[], span_s=0.0), complete=False)
    assert (empty.requests, empty.ttft_s[50], empty.over_time, empty.unstable) == (0, 0.0, [], False)


def test_goodput_of_a_window_without_requests_is_full() -> None:
    outcome = Outcome(model="m", client="", ttft_s=9.0, total_s=10.0, output_tokens=5, node=0, cold=False, at_s=0.0)
    figures = Figures(outcomes=[outcome], loads=1, busy_s=[10.0], span_s=10.0, busy_spans=[[(0.0, 5.0)]])
    over_time = cells._over_time(figures)
    assert (over_time[0][2], over_time[-1][2]) == (0.0, 1.0)
    assert (over_time[0][1], over_time[-1][1]) == (pytest.approx(1.0), 0.0)


def test_many_run_in_processes_as_they_would_here() -> None:
    seen: list[float] = []
    wanted = jobs(cell(), ["auto", "random"], rate_per_s=2.0, seeds=[1, 2])
    found = dict(run_all(wanted, progress=seen.append, processes=2))
    assert [(job.strategy, job.seed) for job in wanted] == [("auto", 1), ("auto", 2), ("random", 1), ("random", 2)]
    assert [found[number] for number in range(4)] == [run(job) for job in wanted]
    assert seen[-1] == 4.0


def test_ctrl_c_ends_what_is_under_way_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised while the first results are waited for: the cells end early or not at all, and nothing hangs."""
    waited = 0

    def interrupted(*given: object, **named: object) -> tuple[set[object], set[object]]:
        nonlocal waited
        waited += 1
        if waited == 1:
            raise KeyboardInterrupt
        return real(*given, **named)  # type: ignore[arg-type]

    real = cells.wait
    monkeypatch.setattr(cells, "wait", interrupted)
    trace = Trace()
    many = [cell(trace=trace, mixes=usable_mixes(mixed(), trace, mixes_of(trace)), seed=seed) for seed in range(6)]
    found: list[tuple[int, Summary]] = list(run_all(many, progress=lambda done: None, processes=1))
    assert len(found) < 6


def test_a_cell_that_is_stopped_says_that_it_is_not_complete() -> None:
    trace = Trace()
    summary = run(cell(trace=trace, mixes=usable_mixes(mixed(), trace, mixes_of(trace))), lambda done, of_all: False)
    assert not summary.complete
    assert summary.requests < 1972
