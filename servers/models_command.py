"""The commands about models: what is where, downloads with their progress, and tasks.

Decides how a person sees them. Invariant: a download that is watched goes on when the watching ends; Ctrl-C says so, and how to stop it.
"""

import time
from collections.abc import Sequence
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from core.names import display, key_or_none
from servers.remote import Remote, plain, print_table, remote_options, shown

LOOK_S: Final = 0.5
OVER: Final = ("completed", "failed", "cancelled")


@click.command()
@remote_options
def models(url: str | None, token: str | None) -> None:
    """List the fleet's models, where they are, and where their files differ."""
    remote = Remote(url, token)
    drift = {entry["model"]: entry for entry in remote.call("GET", "/api/models/drift")["drift"]}
    where: dict[str, list[str]] = {}
    for agent in remote.call("GET", "/api/agents"):
        loaded = {_key(name) for name in agent["loaded_models"]}
        for name in agent["installed_models"]:
            mark = "*" if _key(name) in loaded else ""
            where.setdefault(_key(name), []).append(agent["name"] + mark + ("" if agent["status"] == "online" else " (offline)"))
    table = Table("model", "on (* in memory)", "files differ", box=None)
    for name in sorted(where):
        table.add_row(shown(name), shown(", ".join(where[name])), shown(_differs(drift.get(name))))
    print_table(table)
    if drift:
        click.echo("Where files differ, nodes hold different versions under one name: 'ollama-router pull MODEL' brings all to the newest.")


@click.command()
@click.argument("model")
@click.option("--on", "nodes", multiple=True, help="Name or id of a node; may be given more than once. By default all nodes.")
@click.option("--all", "everywhere", is_flag=True, help="Every node, also those that are offline: they download when they are back.")
@click.option("--insecure", is_flag=True, help="Allow a registry that speaks plain http.")
@remote_options
def pull(model: str, nodes: tuple[str, ...], everywhere: bool, insecure: bool, url: str | None, token: str | None) -> None:
    """Download MODEL to nodes, and show how far each is."""
    if nodes and everywhere:
        raise click.UsageError("--on and --all exclude each other")
    remote = Remote(url, token)
    agents = remote.call("GET", "/api/agents")
    if nodes:
        chosen = [remote.agent_id(node) for node in nodes]
    else:
        chosen = [agent["id"] for agent in agents if everywhere or agent["status"] == "online"]
        if not chosen:
            raise click.ClickException("no node is online; see 'ollama-router agents list'")
    body = {"model_name": model, "target": "specific", "agent_ids": chosen, "insecure": insecure}
    task_ids = remote.call("POST", "/api/models/distribute", body)["task_ids"]
    try:
        failed = watch(remote, task_ids)
    except KeyboardInterrupt:
        raise click.ClickException(
            "the downloads go on; see 'ollama-router tasks', stop one with 'ollama-router tasks --cancel ID'"
        ) from None
    if failed:
        raise click.ClickException("; ".join(failed))


@click.command()
@click.option("--cancel", "cancelled", multiple=True, help="Id of a task to stop; may be given more than once.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many, the newest first.")
@remote_options
def tasks(cancelled: tuple[str, ...], limit: int, url: str | None, token: str | None) -> None:
    """List downloads and other work on nodes' models, or stop some."""
    remote = Remote(url, token)
    for task_id in cancelled:
        task = remote.call("DELETE", f"/api/tasks/{task_id}")
        click.echo(f"{plain(task['kind'])} of {plain(task['model'])} on {plain(_node(task))} is {task['status']}.")
    if cancelled:
        return
    table = Table("what", "model", "node", "status", "progress", "speed", "tries", "why", "id", box=None)
    for task in remote.call("GET", f"/api/tasks?limit={limit}"):
        speed = task["download_speed_bps"]
        rate = "" if speed is None else f"{speed / 1e6:.1f} MB/s"
        why = task["error"] or ""
        if task["next_try_s"] is not None:
            why = f"{why}; again in {task['next_try_s']:.0f} s"
        row = (task["kind"], task["model"], _node(task), task["status"], f"{task['progress']:.0%}", rate, task["attempts"], why, task["id"])
        table.add_row(*map(shown, row))
    print_table(table)


def watch(remote: Remote, task_ids: Sequence[str]) -> list[str]:
    """Show a bar for each task until all are over. Returns what went wrong, as sentences."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[why]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars: dict[str, TaskID] = {}
        while True:
            found = [remote.call("GET", f"/api/tasks/{task_id}") for task_id in task_ids]
            for task in found:
                if task["id"] not in bars:
                    bars[task["id"]] = progress.add_task(plain(_node(task)), total=None, why="")
                _show(progress, bars[task["id"]], task)
            if all(task["status"] in OVER for task in found):
                break
            time.sleep(LOOK_S)
    for task in found:
        if task["status"] == "completed":
            click.echo(f"{plain(_node(task))}: {plain(task['model'])} is there.")
    return [f"{plain(_node(task))}: {plain(task['error'] or task['status'])}" for task in found if task["status"] != "completed"]


def _show(progress: Progress, bar: TaskID, task: dict[str, Any]) -> None:
    total = task["total_bytes"] or None
    completed = total if task["status"] == "completed" and total else task["completed_bytes"]
    why = task["error"] if task["error"] else task["phase"] if task["status"] == "downloading" else task["status"]
    progress.update(bar, total=total, completed=completed, why=plain(why or task["status"]))


def _node(task: dict[str, Any]) -> str:
    return str(task["agent_name"] or task["agent_id"])


def _key(name: str) -> str:
    key = key_or_none(name)
    return name if key is None else display(key)


def _differs(entry: dict[str, Any] | None) -> str:
    """Which nodes have other files than most."""
    if entry is None:
        return ""
    other = [f"{held['agent_name']} {held['digest'][:12]}" for held in entry["digests"] if held["digest"] != entry["canonical"]]
    return f"{entry['canonical'][:12]}; {', '.join(other)}"
