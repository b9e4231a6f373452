"""`ollama-router simulate`: what a fleet would do under a trace, strategy by strategy.

Decides what is asked of a person and what is shown. Invariants: what goes wrong is one line; Ctrl-C shows what is there so far and exits
with 130; the same arguments give the same figures.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from servers.study import cells, fleet_file
from servers.study.traces import FORMATS, Trace, TraceError, guessed_format, mixes_of

LOAD_DEFAULT: Final = 0.5
SEEDS_MAX: Final = 100
PIPE_WIDTH: Final = 160
INTERRUPTED: Final = 130


def _strategies(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    known = cells.all_strategies()
    for name in chosen:
        if name not in known:
            raise click.BadParameter(f"there is no strategy {name!r}: use {', '.join(known)}")
    if not chosen:
        raise click.BadParameter(f"name at least one of {', '.join(known)}")
    return chosen


@click.command()
@click.argument("fleet_path", metavar="[FLEET.toml]", type=click.Path(path_type=Path, dir_okay=False, exists=True), required=False)
@click.option(
    "--trace",
    "traces",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Requests as a file; may be given more than once. By default an extract of the Azure trace that comes with this program.",
)
@click.option("--format", "form", type=click.Choice(FORMATS), help="Of the trace; by default guessed from its name.")
@click.option(
    "--strategies",
    default="auto,metrics,least-outstanding,warm+spill",
    show_default=True,
    callback=_strategies,
    help="Separated by commas: auto, metrics, least-busy and round-robin are the router itself; auto+advice preloads what "
    "placement advice names, auto+plan also stays with it; random, least-outstanding, p2c, warm+spill "
    "and lmetric-like are simple rules to compare with.",
)
@click.option(
    "--load", type=click.FloatRange(0, 2, min_open=True), help=f"Part of what the fleet can carry at most. [default: {LOAD_DEFAULT}]"
)
@click.option("--rate", type=click.FloatRange(0, 10_000, min_open=True), help="Requests per second, instead of --load.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1, SEEDS_MAX), help="Runs of each strategy, averaged.")
@click.option("--first-seed", default=1, show_default=True, type=int)
@click.option("--poisson", is_flag=True, help="Requests come at random times instead of the trace's own rhythm.")
@click.option("--no-limits", is_flag=True, help="An endless queue in the router, so that nothing is refused.")
@click.option("--plots", "plots_in", type=click.Path(path_type=Path, file_okay=False), help="Write SVG plots into this directory.")
def simulate(
    fleet_path: Path | None,
    traces: tuple[Path, ...],
    form: str | None,
    strategies: tuple[str, ...],
    load: float | None,
    rate: float | None,
    seeds: int,
    first_seed: int,
    poisson: bool,
    no_limits: bool,
    plots_in: Path | None,
) -> None:
    """Simulate a fleet under a trace: how long people would wait, and what it would cost in model loads.

    FLEET.toml describes the machines (see docs/routing.md); without it, eight mixed ones are simulated. No machine, no model and no network
    is needed.
    """
    if load is not None and rate is not None:
        raise click.UsageError("give --load or --rate, not both")
    try:
        fleet = fleet_file.mixed() if fleet_path is None else fleet_file.read(fleet_path)
        trace = Trace(paths=tuple(map(str, traces)), form=form or (guessed_format(traces[0]) if traces else "azure"))
        if not traces and trace.form == "history":
            raise click.UsageError("a history is a file of yours: name it with --trace")
        mixes = fleet_file.usable_mixes(fleet, trace, mixes_of(trace))
    except (fleet_file.FleetError, TraceError) as error:
        raise click.ClickException(str(error)) from None
    plain = cells.Cell(
        fleet=fleet.nodes, trace=trace, mixes=mixes, strategy="auto", rate_per_s=1.0, seed=first_seed, poisson=poisson, limits=not no_limits
    )
    plan = cells.plan_of(plain)
    if not plan.capacity_per_s:
        raise click.ClickException("no machine has the memory for any of the models that are asked for")
    rate = rate if rate is not None else (load or LOAD_DEFAULT) * plan.capacity_per_s
    console = _console()
    console.print(
        f"{len(fleet.nodes)} nodes, {trace.title()}, {'Poisson' if poisson else 'its own'} timing, {rate:.3g} requests/s", highlight=False
    )
    console.print(
        f"With everything warm the fleet carries {plan.capacity_per_s:.3g} requests/s: load {rate / plan.capacity_per_s:.2f}",
        highlight=False,
    )
    for unheld in plan.unheld:
        console.print(f"{unheld.model} cannot be kept warm anywhere: {unheld.why}", highlight=False, markup=False)
    jobs = cells.jobs(plain, strategies, rate_per_s=rate, seeds=range(first_seed, first_seed + seeds))
    found, whole = _run(jobs, console)
    if found:
        console.print(table(found))
    if plots_in is not None and found:
        from servers.study import plots  # takes a while to import, and every other command does without

        try:
            written = plots.write(plots_in, found)
        except OSError as error:
            raise click.ClickException(f"the plots cannot be written: {error}") from None
        console.print(f"Plots: {', '.join(path.name for path in written)} in {plots_in}", highlight=False, markup=False, soft_wrap=True)
    if not whole:
        click.echo("interrupted: these are the figures so far", err=True)
        sys.exit(INTERRUPTED)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def _run(jobs: Sequence[cells.Cell], console: Console) -> tuple[list[cells.Summary], bool]:
    """What came of it, in the order of the jobs; and whether all of them came to their end."""
    found: dict[int, cells.Summary] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("runs", total=len(jobs))
        for number, summary in cells.run_all(jobs, progress=lambda done: bar.update(task, completed=round(done, 1))):
            found[number] = summary
    ordered = [found[number] for number in sorted(found)]
    return ordered, len(found) == len(jobs) and all(summary.complete for summary in ordered)


def table(summaries: Sequence[cells.Summary]) -> Table:
    """A row for each strategy: the mean of its seeds."""
    shown = Table(box=None)
    for title in ("strategy", "TTFT p50", "p95", "p99", "loads/1000", "goodput", "utilisation", "refused", ""):
        shown.add_column(title, justify="left" if title in ("strategy", "") else "right", no_wrap=True)
    for strategy in dict.fromkeys(summary.strategy for summary in summaries):
        runs = [summary for summary in summaries if summary.strategy == strategy]
        remarks = [
            text
            for text, holds in (
                ("unstable: its queue still grows", any(run.unstable for run in runs)),
                ("incomplete", not all(run.complete for run in runs)),
            )
            if holds
        ]
        requests = sum(run.requests for run in runs)
        shown.add_row(
            strategy,
            *(seconds(sum(run.ttft_s[percent] for run in runs) / len(runs)) for percent in (50, 95, 99)),
            f"{sum(run.loads_per_1000 for run in runs) / len(runs):.1f}",
            f"{sum(run.goodput for run in runs) / len(runs):.0%}",
            f"{sum(run.utilisation for run in runs) / len(runs):.0%}",
            f"{sum(run.refused for run in runs) / requests:.1%}",
            ", ".join(remarks),
        )
    return shown


def seconds(value: float) -> str:
    """A time with two or three digits that mean something."""
    if math.isinf(value):
        return "refused"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s" if value < 100 else f"{value:.0f} s"
