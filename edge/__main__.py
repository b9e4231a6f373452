"""`python -m edge`: nginx in front of the coordinator.

Decides how a person is talked to. Invariants: what goes wrong is one line, never a traceback; exit status 2 means an argument cannot be
used, 1 that something else is missing or went wrong.
"""

import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import msgspec
import trio

from core.errors import ConfigError
from edge import nginx as files
from edge.nginx import Facts, Nginx, Options
from edge.nginx_run import FACTS, Away, Runner, ask, saved, work_in_batches

_NOBODY: Final = Facts(secret="0" * 32, coordinator="127.0.0.1:9")
"""Facts to try a configuration with while there is no coordinator."""


def _data_dir() -> Path:
    return Path(os.environ.get("ROUTER_DATA_DIR") or "~/.ollama-router").expanduser()


def _options(command: Callable[..., None]) -> Callable[..., None]:
    place: Any = click.Path(path_type=Path)
    for option in (
        click.option("--selection", type=place, help="The coordinator's socket (ROUTER_SELECTION).  [default: in ROUTER_DATA_DIR]"),
        click.option("--listen", multiple=True, default=["0.0.0.0:80"], show_default=True, help="ADDRESS:PORT; may be given again."),
        click.option("--dir", "directory", type=place, help="Where nginx's files are written.  [default: nginx in ROUTER_DATA_DIR]"),
        click.option("--tls-cert", type=place, help="Certificate (PEM): serve HTTPS and HTTP/2."),
        click.option("--tls-key", type=place, help="Its key (PEM)."),
        click.option("--workers", type=click.IntRange(1, 1024), help="Worker processes.  [default: one for each core]"),
        click.option("--stop-timeout", type=click.IntRange(0), default=30, show_default=True, help="Seconds that streams get to end."),
    ):
        command = option(command)
    return command


def _chosen(
    selection: Path | None,
    listen: tuple[str, ...],
    directory: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    workers: int | None,
    stop_timeout: int,
) -> Options:
    try:
        return Options(
            selection=(selection or _data_dir() / "selection.sock").absolute(),
            listen=tuple(listen),
            directory=(directory or _data_dir() / "nginx").absolute(),
            tls_cert=tls_cert.absolute() if tls_cert else None,
            tls_key=tls_key.absolute() if tls_key else None,
            workers=workers,
            stop_within_s=stop_timeout,
        )
    except ConfigError as error:
        _give_up(error, 2)


def _give_up(error: Exception, status: int = 1) -> NoReturn:
    print(f"edge: {error}", file=sys.stderr)
    raise SystemExit(status)


def _say(line: str) -> None:
    print(f"edge: {line}", file=sys.stderr, flush=True)


def _run_command(options: Options) -> str:
    words = [sys.executable, "-m", "edge", "run", "--selection", str(options.selection), "--dir", str(options.directory)]
    for address in options.listen:
        words += ["--listen", address]
    if options.tls_cert and options.tls_key:
        words += ["--tls-cert", str(options.tls_cert), "--tls-key", str(options.tls_key)]
    if options.workers:
        words += ["--workers", str(options.workers)]
    return shlex.join([*words, "--stop-timeout", str(options.stop_within_s)])


@click.group()
def main() -> None:
    """nginx in front of an Ollama Router: renders its files, runs it, and keeps it up to date."""


@main.command()
@_options
def render(**chosen: Any) -> None:
    """Write nginx's files, and see that nginx takes them."""
    options = _chosen(**chosen)
    try:
        nginx = files.look(tls=options.tls_cert is not None)
        facts = trio.run(_facts, options)
        made = files.render(options, nginx, facts, run=_run_command(options))
        files.write(options.directory, {**made, FACTS: msgspec.json.encode(facts).decode()})
        if problem := files.test(nginx, options.directory):
            raise ConfigError(f"nginx does not take its configuration: {problem}")
    except ConfigError as error:
        _give_up(error)
    print(f"written: {options.directory / files.CONFIG}, {files.UNIT} and what they need")


@main.command()
@_options
def run(**chosen: Any) -> None:
    """Run nginx, and reload it when the coordinator's nodes change. SIGTERM: stop once streams have ended; SIGHUP: reload."""
    options = _chosen(**chosen)
    try:
        nginx = files.look(tls=options.tls_cert is not None)
        runner = Runner(
            options, nginx, say=lambda line: print(f"edge: {line}", file=sys.stderr, flush=True), run_command=_run_command(options)
        )
        work_in_batches()
        trio.run(_run, runner, options.stop_within_s)
    except ConfigError as error:
        _give_up(error)


@main.command()
@_options
def check(**chosen: Any) -> None:
    """Say whether everything that `run` needs is there; exit status 1 when something is missing."""
    options = _chosen(**chosen)
    problems = 0
    try:
        nginx = files.look(tls=options.tls_cert is not None)
        print(f"ok       nginx {nginx.version_text} ({nginx.program})")
    except ConfigError as error:
        print(f"missing  {error}")
        raise SystemExit(1) from None
    facts = _NOBODY
    try:
        facts = trio.run(ask, options.selection)
        print(f"ok       the coordinator answers at {options.selection}; {_nodes(facts)}")
    except (Away, ConfigError) as error:
        problems += 1
        print(f"missing  the coordinator at {options.selection}: {error}; start it, or name its socket with --selection")
    problem = _try(options, nginx, facts)
    problems += bool(problem)
    print(f"wrong    nginx does not take the configuration: {problem}" if problem else "ok       nginx takes the configuration")
    raise SystemExit(1 if problems else 0)


def _nodes(facts: Facts) -> str:
    if not facts.nodes:
        return "no node that nginx may reach itself (nodes with an agent's gateway, or with ROUTER_NGINX_DIRECT=true all that are polled)"
    return f"{len(facts.nodes)} that nginx may reach itself"


def _try(options: Options, nginx: Nginx, facts: Facts) -> str:
    """What nginx says against the files, written to a directory of their own."""
    with tempfile.TemporaryDirectory() as place:
        tried = replace(options, directory=Path(place))
        try:
            files.write(tried.directory, files.render(tried, nginx, facts))
        except ConfigError as error:
            return str(error)
        return files.test(nginx, tried.directory)


async def _facts(options: Options) -> Facts:
    """The coordinator's, or those of the last time. Raises ConfigError."""
    try:
        return await ask(options.selection)
    except Away as error:
        known = saved(options.directory)
        if known is None:
            raise ConfigError(
                f"the coordinator does not answer at {options.selection} ({error}); start it, or name its socket with --selection"
            ) from None
        return known


async def _run(runner: Runner, stop_within_s: float) -> ConfigError | None:
    """Until a signal stops it; what went wrong else."""
    problem: ConfigError | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(_obey_signals, runner, stop_within_s)
        try:
            await runner.run()
        except ConfigError as error:
            problem = error
        nursery.cancel_scope.cancel()
    return problem


async def _obey_signals(runner: Runner, stop_within_s: float, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGHUP:
                    nursery.start_soon(runner.reload)
                else:
                    runner.stop()
                    nursery.start_soon(_cut_later, runner, stop_within_s)


async def _cut_later(runner: Runner, stop_within_s: float) -> None:
    await trio.sleep(stop_within_s)
    runner.stop()


if __name__ == "__main__":
    main(prog_name="python -m edge")
