"""`ollama-router dump`: what a running coordinator's router was told lately, as a file that the simulator plays.

Decides how a person is talked to. Invariants: the file is its owner's alone; a dump that did not come whole leaves no file.
"""

import os
from pathlib import Path

import click

from core.dump import load
from core.errors import RemoteError
from servers.remote import Remote, remote_options


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), default="router.dump", show_default=True, help="Where to.")
@remote_options
def dump(output: Path, url: str | None, token: str | None) -> None:
    """Write the router's state and its last events to a file.

    \b
    Play it with: python -m core.simulation --replay FILE
    It names models, nodes, addresses and API key ids; it holds no prompt, no answer and no secret.
    """
    data = Remote(url, token).download("/api/admin/dump")
    try:
        made = load(data)
    except RemoteError as error:
        raise click.ClickException(str(error)) from None
    try:
        output.unlink(missing_ok=True)
        with open(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written: {error.strerror}") from None
    click.echo(f"{len(made.steps)} steps are in {output}. Play them with: python -m core.simulation --replay {output}")
