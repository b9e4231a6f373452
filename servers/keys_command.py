"""`ollama-router keys`: make, list and remove API keys of a running coordinator.

Decides how a person is talked to. Invariant: a secret is printed once, alone on standard output, so that a script can take it.
"""

from datetime import UTC, datetime, timedelta

import click
from rich.table import Table

from core.keys import INFERENCE, SCOPES
from servers.remote import Remote, print_table, remote_options, shown


@click.group()
def keys() -> None:
    """Make, list and remove API keys."""


@keys.command("add")
@click.argument("name")
@click.option("--model", "models", multiple=True, help="A model that the key opens; may be repeated. Without: all.")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(SCOPES), default=(INFERENCE,), show_default=True)
@click.option("--days", type=click.IntRange(1, 36_500), help="How long it is valid. Without: until it is removed.")
@click.option("--requests-per-minute", type=click.IntRange(min=1), help="At most so many requests in a minute.")
@click.option("--tokens-per-day", type=click.IntRange(min=1), help="At most so many tokens, in and out, in a day (UTC).")
@remote_options
def add(
    name: str,
    models: tuple[str, ...],
    scopes: tuple[str, ...],
    days: int | None,
    requests_per_minute: int | None,
    tokens_per_day: int | None,
    url: str | None,
    token: str | None,
) -> None:
    """Make a key called NAME and print its secret, this once."""
    expires_at = None if days is None else (datetime.now(UTC) + timedelta(days=days)).isoformat()
    wanted = {
        "name": name, "models": models, "scopes": scopes, "expires_at": expires_at,
        "requests_per_minute": requests_per_minute, "tokens_per_day": tokens_per_day,
    }  # fmt: skip
    made = Remote(url, token).call("POST", "/api/keys", wanted)
    click.echo(made["key"])
    click.echo("It is shown this once. Send it as 'Authorization: Bearer <key>' or 'x-api-key: <key>'.", err=True)


@keys.command("list")
@remote_options
def listed(url: str | None, token: str | None) -> None:
    """List all keys and what they used."""
    table = Table("id", "name", "opens", "models", "until", "requests", "refused", "tokens today", "tokens", "last used", box=None)
    for key in Remote(url, token).call("GET", "/api/keys"):
        used = key["used"]
        limits = (
            f"{used['requests']}" + (f" (≤ {key['requests_per_minute']}/min)" if key["requests_per_minute"] else ""),
            used["refused"],
            f"{used['tokens_today']}" + (f" of {key['tokens_per_day']}" if key["tokens_per_day"] else ""),
            used["prompt_tokens"] + used["output_tokens"],
        )
        opens, models = ", ".join(key["scopes"]), ", ".join(key["models"]) or "all"
        row = (key["id"], key["name"], opens, models, key["expires_at"] or "removed", *limits, used["last_used_at"] or "never")
        table.add_row(*map(shown, row))
    print_table(table)


@keys.command("remove")
@click.argument("key")
@remote_options
def remove(key: str, url: str | None, token: str | None) -> None:
    """Remove KEY (id or name): it opens nothing any more."""
    remote = Remote(url, token)
    found = [one["id"] for one in remote.call("GET", "/api/keys") if key in (one["id"], one["name"])]
    if len(found) != 1:
        raise click.ClickException(f"there is no key {key!r}" if not found else f"{len(found)} keys are called {key!r}: give the id")
    remote.call("DELETE", f"/api/keys/{found[0]}")
    click.echo(f"{key} is removed.")
