"""The `ollama-router` command: serve, try it out on one machine, and manage a running coordinator.

Decides how a person is talked to. Invariants: what goes wrong is one line, never a traceback; exit status 2 means a setting or an
argument cannot be used, 1 that something else went wrong; a token is printed only when it is asked for.
"""

import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import trio
from rich.table import Table

from core.errors import ConfigError
from edge.steady import SteadyClock
from servers import log, settings
from servers.backup_command import backup, restore
from servers.dump_command import dump
from servers.history_command import history
from servers.keys_command import keys
from servers.models_command import models, pull, tasks
from servers.remote import Remote, plain, print_table, remote_options, shown
from servers.study.command import simulate

if TYPE_CHECKING:  # to load what serves takes two thirds of a second, which the commands that ask a running coordinator do not need
    from servers.coordinator import Coordinator

    Work = Callable[[Coordinator], Awaitable[None]]


def _version() -> str:
    try:
        return version("ollama-router")
    except PackageNotFoundError:
        return "unknown (not installed)"


SWITCH_S: Final = 0.001
"""How long a worker thread may keep the interpreter's lock while the loop waits for it; Python's own 5 ms would be felt by every stream."""

FILES_WANTED: Final = 65_536


@click.group()
@click.version_option(_version(), prog_name="ollama-router")
def main() -> None:
    """One URL in front of many machines that run Ollama."""


# ---------------------------------------------------------------- serving


_config_option = click.option(
    "--config", "config_file", type=click.Path(path_type=Path, dir_okay=False), help="Settings file (TOML); the environment wins."
)


def _settings_help() -> str:
    """The settings as `--help` shows them."""
    rows = [
        f"  {setting.name:<28}{setting.about}{'' if setting.active else ' (checked, but not used in this version)'}"
        for setting in settings.TABLE
    ]
    return "\b\nSettings come from the environment, or under the same names from the settings file:\n" + "\n".join(rows)


@main.command(epilog=_settings_help())
@_config_option
def serve(config_file: Path | None) -> None:
    """Start the coordinator (the same as python -m servers)."""
    _run_until_stopped(config_file, lambda coordinator: coordinator.run())


@main.command("up")
@_config_option
def up_command(config_file: Path | None) -> None:
    """Start the coordinator and a node: this machine's Ollama, or three simulated ones."""
    from servers import up

    _run_until_stopped(config_file, lambda coordinator: up.run(coordinator, os.environ, lambda line: click.echo(line)))


def _run_until_stopped(config_file: Path | None, work: "Work") -> None:
    """Run `work` with a coordinator; the first signal stops it in order, the second at once. Exits the process on failure."""
    from servers.coordinator import Coordinator
    from servers.listen import CannotListen

    try:
        chosen = settings.load(os.environ, config_file=config_file)
        log.configure(chosen.log_level, chosen.log_format)
        _calm_collector()
        _open_many_files()
        trio.run(_with_signals, Coordinator(chosen), work, clock=SteadyClock(), strict_exception_groups=True)
    except* ConfigError as group:
        _fail(_first(group), status=2)
    except* CannotListen as group:
        _fail(_first(group), status=1)


def _calm_collector() -> None:
    """Let the garbage collector look seldom, and never at what was there at the start.

    Almost nothing here is cyclic: reference counting frees a request's objects at its end. With Python's own thresholds the collector
    would run several times per hundred requests, and its full runs hold the loop for milliseconds.
    """
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 25, 50)


def _open_many_files() -> None:
    """Two descriptors per stream: ask the system for as many as it gives. The usual soft limit of 1,024 would end at 500 streams."""
    try:
        import resource
    except ImportError:  # not on this system, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(FILES_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _with_signals(coordinator: "Coordinator", work: "Work") -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(_obey_signals, coordinator, nursery.cancel_scope)
        await work(coordinator)
        nursery.cancel_scope.cancel()


async def _obey_signals(
    coordinator: "Coordinator", everything: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    wanted = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    with trio.open_signal_receiver(*wanted) as signals:
        task_status.started()
        asked = False
        async for _ in signals:
            if asked:
                everything.cancel()
                return
            asked = True
            coordinator.stop()


def _first(group: BaseExceptionGroup[BaseException]) -> str:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else str(found)


def _fail(text: str, *, status: int) -> None:
    click.echo(f"ollama-router: {text}", err=True)
    raise SystemExit(status)


# ---------------------------------------------------------------- asking a running coordinator


@main.command()
@remote_options
def status(url: str | None, token: str | None) -> None:
    """Show how the fleet is doing."""
    remote = Remote(url, token)
    summary = remote.call("GET", "/api/metrics/summary")
    table = Table("", remote.url, show_header=True, box=None)
    for name, value in summary.items():
        table.add_row(name.replace("_", " "), "–" if value is None else str(value))
    print_table(table)


@main.command()
@remote_options
def placement(url: str | None, token: str | None) -> None:
    """Show which model should be warm where, for what is asked now."""
    plan = Remote(url, token).call("GET", "/api/placement")
    if not plan["rates_per_s"]:
        click.echo("Nothing was asked for yet: there is nothing to place.")
        return
    table = Table("node", "model", "its traffic", "node time", "loaded", "why", box=None)
    for placed in plan["placed"]:
        loaded = "yes" if placed["loaded"] else "no"
        numbers = f"{placed['share']:.0%}", f"{placed['time_share']:.0%}"
        table.add_row(*map(shown, (placed["node"], placed["model"], *numbers, loaded, placed["why"])))
    print_table(table)
    for unload in plan["unloads"]:
        click.echo(f"{plain(unload['model'])} should leave {plain(unload['node'])} to make room.")
    for unheld in plan["unheld"]:
        click.echo(f"{plain(unheld['model'])} ({unheld['rate_per_s']:.3g} requests/s) stays cold: {unheld['why']}.")
    if plan["placed"]:
        click.echo(f"Asked: {plan['rate_per_s']:.3g} requests/s; with these warm the fleet carries {plan['capacity_per_s']:.3g}.")
    if plan["memory_guessed"]:
        click.echo(f"The memory of {plain(', '.join(plan['memory_guessed']))} is not known: what was seen in it counts.")


main.add_command(simulate)
main.add_command(backup)
main.add_command(restore)
main.add_command(dump)
main.add_command(history)
main.add_command(keys)
main.add_command(models)
main.add_command(pull)
main.add_command(tasks)


@main.group()
def agents() -> None:
    """See and manage nodes."""


@agents.command("list")
@remote_options
def list_agents(url: str | None, token: str | None) -> None:
    """List all nodes."""
    table = Table(box=None)
    for title in ("name", "state", "address", "version", "slots", "in flight", "models", "loaded"):
        table.add_column(title, no_wrap=title in ("name", "state", "address"))
    table.add_column("why not ready", overflow="fold")
    for agent in Remote(url, token).call("GET", "/api/agents"):
        state = f"{agent['state']} ({agent['code']})" if agent.get("code") else agent["state"]
        port = agent["agent_api_port"] or agent["ollama_port"]
        table.add_row(
            *map(
                shown,
                (agent["name"], state, f"{agent['ip_address']}:{port}", agent["ollama_version"], agent["slots"], agent["in_flight"],
                 len(agent["installed_models"]), ", ".join(agent["loaded_models"]), "" if agent["state"] == "ready" else agent["detail"]),
            )
        )  # fmt: skip
    print_table(table)


@agents.command()
@click.argument("code")
@remote_options
def approve(code: str, url: str | None, token: str | None) -> None:
    """Let the waiting agent with this CODE in."""
    agent = Remote(url, token).call("POST", "/api/agents/approve", {"code": code})
    click.echo(f"{agent['name']} is approved.")


@agents.command()
@click.argument("node_url")
@click.option("--name", help="What to call it.")
@click.option("--slots", type=click.IntRange(1, settings.SLOTS_MAX), help="Its OLLAMA_NUM_PARALLEL.")
@remote_options
def add(node_url: str, name: str | None, slots: int | None, url: str | None, token: str | None) -> None:
    """Add the Ollama at NODE_URL, without an agent."""
    agent = Remote(url, token).call("POST", "/api/agents/backends", {"url": node_url, "name": name, "slots": slots})
    click.echo(f"{agent['name']} is added.")


def _command(name: str, method: str, path: str, done: str, about: str) -> None:
    """A command about one agent."""

    @agents.command(name, help=about)
    @click.argument("agent")
    @remote_options
    def command(agent: str, url: str | None, token: str | None) -> None:
        remote = Remote(url, token)
        remote.call(method, f"/api/agents/{remote.agent_id(agent)}{path}")
        click.echo(f"{agent} {done}.")


_command("drain", "POST", "/drain", "takes nothing new", "Give AGENT (name or id) nothing new.")
_command("connect", "POST", "/connect", "is used again", "Use AGENT (name or id) again.")
_command("disconnect", "POST", "/disconnect", "is held offline", "Hold AGENT (name or id) offline once its work has ended.")
_command("remove", "DELETE", "", "is forgotten", "Forget AGENT (name or id).")


@main.group()
def token() -> None:
    """Print or make tokens."""


@token.command("admin")
def admin_token() -> None:
    """Print the admin token of this machine's coordinator."""
    found = Remote(None, None).admin_token()
    if found is None:
        raise click.ClickException("there is no admin token yet: it is made at the coordinator's first start")
    click.echo(found)


@token.command("join")
@remote_options
def join_token(url: str | None, token: str | None) -> None:
    """Make a token with which agents may join for 24 hours."""
    made = Remote(url, token).call("POST", "/api/admin/join-tokens")
    click.echo(made["token"])
    click.echo(f"Start agents with ROUTER_JOIN_TOKEN set to it, until {made['expires_at']}.", err=True)


if __name__ == "__main__":
    main()
