"""What is done to the simulated world from outside, as data that can be kept, shortened and played again.

Decides the form of a script: a header and timed actions, one JSON object a line. Every action is total: one that names what is not
there (any more) does nothing, so that any part of a script is a script too. Nodes and requests are named by number. The core reads no
files: lines come in and go out as strings.
"""

from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias

import msgspec

from core.errors import RemoteError
from core.simulation.options import Options

FORM: Final = 1
"""Of the lines; a change of their meaning adds one."""


class Ask(msgspec.Struct, frozen=True, kw_only=True, tag="ask"):
    """A client sends a request. `model` counts through the world's models; one beyond them is known to nobody."""

    request: int
    client: int = 0
    model: int = 0
    input_tokens: int = 100
    output_tokens: int = 20
    patience_s: float | None = None
    """The client leaves after so long; None: it never does."""
    stream: bool = True
    num_ctx: int | None = None
    keep_alive_s: float | None = None
    conversation: int | None = None
    kind: str = "chat"
    """`chat`, `embed`, `load`, `unload`, `show`, or `unreadable` (the body names no model that can be read)."""
    spelling: int = 0
    """Which of several ways to write the model's name."""


class Leave(msgspec.Struct, frozen=True, kw_only=True, tag="leave"):
    """The client of this request closes its connection."""

    request: int


class Storm(msgspec.Struct, frozen=True, kw_only=True, tag="storm"):
    """Every `one_in`th client that still waits or reads leaves at once."""

    one_in: int = 1


class Forget(msgspec.Struct, frozen=True, kw_only=True, tag="forget"):
    """The edge that serves this request dies without a word: no renewal, no ending."""

    request: int


class Crash(msgspec.Struct, frozen=True, kw_only=True, tag="crash"):
    """A machine goes down and boots again. `silent`: its power fails, so nobody is told; else its connections are reset."""

    node: int
    for_s: float = 10.0
    silent: bool = False


class OllamaDeath(msgspec.Struct, frozen=True, kw_only=True, tag="ollama_death"):
    """The node's Ollama dies and is started again; its agent lives on."""

    node: int
    for_s: float = 2.0


class Pause(msgspec.Struct, frozen=True, kw_only=True, tag="pause"):
    """The whole machine stands still, connections stay open."""

    node: int
    for_s: float = 5.0


class Slow(msgspec.Struct, frozen=True, kw_only=True, tag="slow"):
    """Gray failure: the node's Ollama works at this many percent of its speed."""

    node: int
    percent: int = 10
    for_s: float = 60.0


class Drift(msgspec.Struct, frozen=True, kw_only=True, tag="drift"):
    """The agent's clock runs at this many percent of true speed from now on."""

    node: int
    percent: int = 101


class Failing(msgspec.Struct, frozen=True, kw_only=True, tag="failing"):
    """Every request that the node is given fails for a while."""

    node: int
    how: str = "refuse_503"
    """`refuse_500`, `refuse_503`, `cut`, `empty`, `died` or `load_error`."""
    for_s: float = 10.0


class Partition(msgspec.Struct, frozen=True, kw_only=True, tag="partition"):
    """Nothing passes between the coordinator and these nodes, one way or both."""

    nodes: tuple[int, ...]
    up: bool = True
    down: bool = True
    for_s: float = 30.0


class Clog(msgspec.Struct, frozen=True, kw_only=True, tag="clog"):
    """The node's link is slow for a while."""

    node: int
    for_s: float = 10.0


class Order(msgspec.Struct, frozen=True, kw_only=True, tag="order"):
    """An admin orders something of a node's agent. `command` is a value of `core.events.Command`."""

    node: int
    command: str


class Configure(msgspec.Struct, frozen=True, kw_only=True, tag="configure"):
    """An admin sets, or with None clears, a node's weight and cap."""

    node: int
    weight: float | None = None
    max_concurrent: int | None = None


class StopAgent(msgspec.Struct, frozen=True, kw_only=True, tag="stop_agent"):
    """The agent is asked to leave in order; its machine boots again later."""

    node: int
    for_s: float = 30.0


class Restart(msgspec.Struct, frozen=True, kw_only=True, tag="restart"):
    """The coordinator dies; a new one starts with nothing but its settings."""

    for_s: float = 2.0


class Echo(msgspec.Struct, frozen=True, kw_only=True, tag="echo"):
    """One of the node's last heartbeats is delivered once more. `back` counts from the newest."""

    node: int
    back: int = 0


class Inventory(msgspec.Struct, frozen=True, kw_only=True, tag="inventory"):
    """A model is deleted from a node, or comes (back) to it."""

    node: int
    model: int
    held: bool


class Measured(msgspec.Struct, frozen=True, kw_only=True, tag="measured"):
    """The node's processor and memory are this busy, percent."""

    node: int
    cpu: int
    memory: int


class Heal(msgspec.Struct, frozen=True, kw_only=True, tag="heal"):
    """The end of all trouble: these nodes are made whole, the others stay dead, and everything must come to rest."""

    survivors: tuple[int, ...]


Action: TypeAlias = (
    Ask | Leave | Storm | Forget | Crash | OllamaDeath | Pause | Slow | Drift | Failing | Partition | Clog | Order | Configure
    | StopAgent | Restart | Echo | Inventory | Measured | Heal
)  # fmt: skip


class Timed(msgspec.Struct, frozen=True):
    """An action and its instant, seconds since the start."""

    at_s: float
    do: Action


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first line. `story` says what the script shows; `seed` is for the dice inside the world (network, machines)."""

    story: str = ""
    form: int = FORM
    seed: int
    options: Options


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """A run, apart from the code that it ran."""

    header: Header
    actions: list[Timed]


def dump(script: Script) -> Iterator[str]:
    """The script's lines, without line ends."""
    yield msgspec.json.encode(script.header).decode()
    for timed in script.actions:
        yield msgspec.json.encode(timed).decode()


def load(lines: Iterable[str]) -> Script:
    """The script that these lines hold; blank ones are skipped.

    Raises:
        RemoteError: they are none; the text names the line.
    """
    header: Header | None = None
    actions: list[Timed] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if header is None:
                header = msgspec.json.decode(line, type=Header)
            else:
                actions.append(msgspec.json.decode(line, type=Timed))
        except (msgspec.DecodeError, UnicodeError) as error:
            raise RemoteError(f"line {number} is no part of a script: {error}") from None
    if header is None:
        raise RemoteError("a script begins with a header line; this one is empty")
    if header.form != FORM:
        raise RemoteError(f"this is a script of form {header.form}; only form {FORM} can be played")
    return Script(header=header, actions=actions)
