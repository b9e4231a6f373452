"""A running coordinator as the commands see it, and how they print what it says.

Decides where it is and with which token it is asked; knows no command. Invariants: what a node says of itself reaches a terminal without
escapes or markup; an error is the coordinator's own sentence.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import click
import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from core.errors import ConfigError
from servers import settings
from servers.tokens import ADMIN_TOKEN_FILE

CALL_LIMIT_S: Final = 30.0
PIPE_WIDTH: Final = 240
LOOPBACK_HOSTS: Final = ("127.0.0.1", "localhost", "::1")


class Remote:
    """A running coordinator, as the commands below see it."""

    def __init__(self, url: str | None, token: str | None) -> None:
        try:
            chosen = settings.load(os.environ)
        except ConfigError as error:
            raise click.ClickException(str(error)) from None
        self.url = (url or f"http://127.0.0.1:{chosen.port}").rstrip("/")
        self._token_file = chosen.data_dir / ADMIN_TOKEN_FILE
        self._token = token or chosen.admin_token

    def admin_token(self) -> str | None:
        """As given, else from the data directory; the file's is shown to nobody but this machine."""
        if self._token is None and httpx.URL(self.url).host in LOOPBACK_HOSTS:
            try:
                self._token = self._token_file.read_text("ascii").strip() or None
            except (OSError, UnicodeDecodeError):
                pass
        return self._token

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The answer's JSON, None when it has none. Raises ClickException with the coordinator's own words."""
        data = self._ask(method, path, body)
        try:
            return json.loads(data) if data else None
        except ValueError:
            raise self._a_stranger() from None

    def download(self, path: str) -> bytes:
        """The answer's bytes. Raises ClickException with the coordinator's own words."""
        return self._ask("GET", path, None)

    @contextmanager
    def stream(self, method: str, path: str, *, content: bytes | None = None, headers: Mapping[str, str] = {}) -> Iterator[httpx.Response]:
        """A good answer whose body is still to be read, however long it takes.

        Raises ClickException with the coordinator's own words, also when the body breaks off.
        """
        limits = httpx.Timeout(CALL_LIMIT_S, read=None)
        answer: httpx.Response | None = None
        try:
            with (
                httpx.Client(timeout=limits, trust_env=False) as client,
                client.stream(method, self.url + path, content=content, headers={**self._credential(), **headers}) as answer,
            ):
                if not answer.is_success:
                    answer.read()
                    raise click.ClickException(self._problem(answer))
                yield answer
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            if answer is not None and answer.is_success:
                raise click.ClickException(f"the answer broke off ({error})") from None
            raise self._nobody(error) from None

    def _credential(self) -> dict[str, str]:
        token = self.admin_token()
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _ask(self, method: str, path: str, body: Any) -> bytes:
        try:
            with httpx.Client(timeout=CALL_LIMIT_S, trust_env=False) as client:
                answer = client.request(method, self.url + path, json=body, headers=self._credential())
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._nobody(error) from None
        if answer.is_success:
            return answer.content
        raise click.ClickException(self._problem(answer))

    def _problem(self, answer: httpx.Response) -> str:
        """What a bad answer says: the router's own form of it, or OpenAI's."""
        try:
            problem = answer.json()["error"]
        except (ValueError, KeyError, TypeError):
            raise self._a_stranger() from None
        return plain(problem["message"] if isinstance(problem, dict) and "message" in problem else problem)

    def _nobody(self, error: Exception) -> click.ClickException:
        return click.ClickException(f"no router answers at {self.url} ({error}); give another address with --url")

    def _a_stranger(self) -> click.ClickException:
        return click.ClickException(f"what answers at {self.url} is not this router; give another address with --url")

    def agent_id(self, named: str) -> str:
        """The id of the agent with this id or name."""
        agents = self.call("GET", "/api/agents")
        found = [agent["id"] for agent in agents if named in (agent["id"], agent["name"])]
        if not found:
            known = ", ".join(agent["name"] for agent in agents) or "none"
            raise click.ClickException(f"there is no agent {named!r} (known: {known})")
        return str(found[0])


def print_table(table: Table) -> None:
    """To a terminal as it fits, to a file or pipe in full."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    console.print(table)


def shown(value: object) -> str:
    """`value` for a terminal: nodes name themselves, and a name may try to be an escape sequence or markup."""
    return escape(plain(value))


def plain(value: object) -> str:
    """`value` without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value))


def lines(text: str) -> str:
    """`text` of many lines, each without what a terminal would obey."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in text)


def remote_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options `--url` and `--token`, as every command that asks a coordinator takes them."""
    url = click.option("--url", envvar="ROUTER_URL", help="The coordinator's URL; by default this machine's.")
    token = click.option("--token", help="Admin token; by default ROUTER_ADMIN_TOKEN, or the one in the data directory.")
    return url(token(command))
