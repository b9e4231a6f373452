"""`ollama-router history`: list, show, export and repeat the requests that a running coordinator recorded.

Decides how a person sees records. Invariants: what clients and models said reaches a terminal without escapes or markup; an export that
did not come whole leaves no file; only a request that was recorded as it came is sent again.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import quote, urlencode

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.table import Table

from core.history import BODY_CUT, BODY_DROPPED, BODY_NOT_CAPTURED, BODY_OFF, BODY_REDACTED, STATUSES
from servers.remote import Remote, lines, plain, print_table, remote_options, shown

ROOT: Final = "/api/dashboard/request-responses"
BODIES: Final = ("request_body", "response_body")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_WHY_NOT: Final = {
    BODY_CUT: "a body was longer than HISTORY_BODY_MAX_BYTES and was cut",
    BODY_REDACTED: "it was redacted (HISTORY_BODIES, or the request's own X-Router-History)",
    BODY_OFF: "no bodies were kept (HISTORY_BODIES, or the request's own X-Router-History)",
    BODY_DROPPED: "the database was too slow to keep it",
    BODY_NOT_CAPTURED: "it came through nginx, which keeps none",
}


@click.group()
def history() -> None:
    """See, export and repeat recorded requests."""


def _filter_options(command: Callable[..., None]) -> Callable[..., None]:
    """The filters, as `list` and `export` take them; they come as one dictionary, `filters`."""
    options = (
        click.option("--model", help="A part of the model's name."),
        click.option("--node", help="Name or id of the node that answered."),
        click.option("--status", type=click.Choice(STATUSES)),
        click.option("--since", callback=_moment, help="A moment such as 2026-01-31T12:00:00Z, or an age such as 90m, 2h, 3d."),
        click.option("--until", callback=_moment, help="The same; what came then or later is left out."),
        click.option("--client", help="An address, exactly."),
        click.option("--text", help="Text in a request or an answer."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _moment(_: click.Context, option: click.Parameter, value: str | None) -> str | None:
    age = None if value is None else re.fullmatch(r"(\d{1,6})([smhd])", value)
    if age is None:
        return value  # the coordinator says what is wrong with it
    return (datetime.now(UTC) - timedelta(seconds=int(age[1]) * _UNITS[age[2]])).isoformat()


def _query(remote: Remote, given: dict[str, Any]) -> str:
    """Filters and what else is asked for, as the end of a URL."""
    names = {"since": "start_time", "until": "end_time", "text": "q", "node": "agent_id"}
    if given.get("node") is not None:
        given["node"] = remote.agent_id(given["node"])
    asked = {names.get(name, name): value for name, value in given.items() if value is not None}
    return "?" + urlencode(asked) if asked else ""


# ---------------------------------------------------------------- seeing


@history.command("list")
@_filter_options
@click.option("--sort", default="-timestamp", show_default=True, help="timestamp, duration_ms, ttft_ms, …; a minus: greatest first.")
@click.option("--page", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--limit", "per_page", type=click.IntRange(1, 500), default=50, show_default=True, help="Records of a page.")
@remote_options
def listed(url: str | None, token: str | None, **given: Any) -> None:
    """List recorded requests, the newest first."""
    remote = Remote(url, token)
    found = remote.call("GET", ROOT + _query(remote, given))
    table = Table("when", "id", "type", "model", "node", "client", "status", "took", "first", "tokens", "why", box=None)
    for record in found["records"]:
        table.add_row(*map(shown, _row(record)))
    print_table(table)
    begin, count = (found["page"] - 1) * found["per_page"], len(found["records"])
    total = f"{'more than ' if found['total_is_floor'] else ''}{found['total_count']}"
    where = f"{begin + 1} to {begin + count}" if count else "none"
    click.echo(f"{where} of {total}. 'ollama-router history show ID' shows one with its bodies.", err=True)


def _row(record: dict[str, Any]) -> tuple[object, ...]:
    return (
        record["timestamp"], record["id"], record["request_type"], record["model"] or "", record["agent_name"] or "", record["client"],
        record["status"], _time(record["duration_ms"]), _time(record["ttft_ms"]),
        f"{record['prompt_tokens']} + {record['output_tokens']}", record["message"],
    )  # fmt: skip


def _time(ms: float | None) -> str:
    if ms is None:
        return ""
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


@history.command()
@click.argument("request_id", metavar="ID")
@remote_options
def show(request_id: str, url: str | None, token: str | None) -> None:
    """Show the record of request ID, with its bodies."""
    record = Remote(url, token).call("GET", f"{ROOT}/{quote(request_id, safe='')}")
    table = Table("", shown(record["id"]), box=None)
    for name, value in record.items():
        if name not in ("id", "attempts", *BODIES):
            table.add_row(shown(name.replace("_", " ")), "–" if value is None else shown(value))
    for number, attempt in enumerate(record["attempts"], 1):
        table.add_row(f"attempt {number}", shown(f"{attempt['node']}: {attempt['outcome']}, {_time(attempt['ms'])}"))
    print_table(table)
    for name in BODIES:
        click.echo(f"\n{name.replace('_', ' ')}:")
        click.echo(_readable(record[name]))


def _readable(body: Any) -> str:
    if body is None:
        return "(none)"
    if isinstance(body, str):
        return lines(body)
    return lines(msgspec.json.format(msgspec.json.encode(body), indent=2).decode())


# ---------------------------------------------------------------- exporting


@history.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
@click.option("--format", "form", type=click.Choice(["json", "csv"]), help="By default as the file's name says, else json.")
@_filter_options
@remote_options
def export(file: Path, form: str | None, url: str | None, token: str | None, **given: Any) -> None:
    """Write recorded requests with their bodies to FILE; '-' is standard output."""
    remote = Remote(url, token)
    given["format"] = form or ("csv" if file.suffix.lower() == ".csv" else "json")
    path = f"{ROOT}/export{_query(remote, given)}"
    with whole_file(file) as out, remote.stream("GET", path) as answer, moving_bar(file.name) as advance:
        for data in answer.iter_bytes():
            out.write(data)
            advance(len(data))


@contextmanager
def whole_file(file: Path) -> Iterator[BinaryIO]:
    """What is written to it becomes `file`, its owner's alone, once the block has ended well."""
    if str(file) == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    part = file.with_name(file.name + ".part")
    try:
        part.unlink(missing_ok=True)
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            yield out
        part.replace(file)
    except OSError as error:
        raise click.ClickException(f"{file} cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def moving_bar(name: str) -> Iterator[Callable[[int], None]]:
    """A bar on standard error. How much will come nobody knows, so it moves without an end."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(plain(name), total=None)
        yield lambda count: progress.advance(bar, count)


# ---------------------------------------------------------------- repeating


class _Recorded(msgspec.Struct):
    """What a repetition needs; the body byte for byte as it is kept."""

    path: str
    bodies: str
    request_body: msgspec.Raw = msgspec.Raw(b"null")


@history.command()
@click.argument("request_id", metavar="ID")
@remote_options
def replay(request_id: str, url: str | None, token: str | None) -> None:
    """Send request ID once more, and print the answer as it comes.

    It goes through the router as the first one did, so another node may answer. What is printed is the answer's text; when it has none,
    the answer itself.
    """
    remote = Remote(url, token)
    try:
        recorded = msgspec.json.decode(remote.download(f"{ROOT}/{quote(request_id, safe='')}"), type=_Recorded)
    except msgspec.MsgspecError:
        raise click.ClickException(f"what answers at {remote.url} is another version of the router: it tells records otherwise") from None
    if recorded.bodies in _WHY_NOT:
        raise click.ClickException(f"this request cannot be sent again: {_WHY_NOT[recorded.bodies]}")
    body = bytes(recorded.request_body)
    if not body.startswith(b"{"):
        raise click.ClickException("this request cannot be sent again: its body was no JSON object")
    with remote.stream("POST", recorded.path, content=body, headers={"Content-Type": "application/json"}) as answer:
        _print_answer(answer.iter_lines())


def _print_answer(answer: Iterator[str]) -> None:
    rest, spoke, error = [], False, ""
    for line in answer:
        value = _object(line)
        if value is None:
            rest.append(line)
            continue
        error = str(value["error"]) if value.get("error") else error
        text = _text_of(value)
        spoke = spoke or bool(text)
        click.echo(lines(text), nl=False)
        if not text:
            rest.append(line)
    click.echo("" if spoke else lines("\n".join(rest)))
    if error:
        raise click.ClickException(f"the answer ended with an error: {plain(error)}")


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = msgspec.json.decode(line.removeprefix("data:"))
    except (msgspec.DecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _text_of(value: dict[str, Any]) -> str:
    """The text in a line or an event of an answer, in any of the four protocols; whole answers count as one line."""
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    delta = value.get("delta")
    parts = [
        value.get("response"), choice.get("text"), delta if value.get("type") == "response.output_text.delta" else None,
        *(inner.get(name)
          for inner, name in ((value.get("message"), "content"), (delta, "text"), (choice.get("delta"), "content"),
                              (choice.get("message"), "content"))
          if isinstance(inner, dict)),
    ]  # fmt: skip
    return "".join(part for part in parts if isinstance(part, str))
