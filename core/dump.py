"""A dump as a file: a snapshot of the router, and each step since with what came of it.

Decides the form of the file and what must not be in it; never when a dump is made (`servers`), nor what it shows
(`core.simulation.playback`). The file is a line that names the form, then frames: four bytes of length, then msgpack. One frame is one
short step of work.

Invariants: no prompt or answer is in it, for events carry none; what a node said when it failed may quote one, so of such texts only the
phrases stay that decisions look for; approval codes are left out. What is left decides exactly as the whole did.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Final

import msgspec

from core.errors import RemoteError
from core.events import Effect, Event, Record
from core.health import CLIENT_TEXTS, MEMORY_TEXTS
from core.router import Router
from core.snapshot import Snapshot, kind_of, names_of, pack, plain, unpack, value_of
from core.units import Instant

FORM: Final = 1
MAGIC: Final = b"ollama-router dump "
FIRST_LINE: Final = b"%b%d\n" % (MAGIC, FORM)

STEPS_PER_FRAME: Final = 20
FRAME_MAX_BYTES: Final = 64 << 20

TICK: Final = "tick"
PLACEMENT: Final = "placement"
"""What is no event and may change the router all the same: time passed, or somebody asked for advice."""

Step = tuple[Instant, Event | str, list[Effect] | None]
"""When, what, and what came of it; None: it raised."""

_PHRASES: Final = (*CLIENT_TEXTS, *MEMORY_TEXTS, "not found", "does not support")
_LEFT_OUT: Final = "(left out)"


class Dump(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds. `steps` are in plain form, as recorded: (when, what, effects)."""

    version: str
    made_at: str
    nodes: list[Any]
    steps: list[tuple[Instant, Any, Any]]

    def router(self) -> Router:
        """The router as it was before the first step. Raises RemoteError."""
        return unpack(self.nodes)


# ---------------------------------------------------------------- writing


def frames(snapshot: Snapshot, steps: Sequence[Step], *, version: str, made_at: str) -> Iterator[bytes]:
    """The file, piece by piece: each piece is a short step of work."""
    yield FIRST_LINE + _frame({"version": version, "made_at": made_at})
    nodes = 0
    for part in pack(snapshot):
        nodes += len(part)
        yield _frame({"nodes": scrubbed(part)})
    for begin in range(0, len(steps), STEPS_PER_FRAME):
        rows = [(at, plain_step(what), plain_step(effects)) for at, what, effects in steps[begin : begin + STEPS_PER_FRAME]]
        yield _frame({"steps": rows})
    yield _frame({"end": [nodes, len(steps)]})


def written(dump: Dump) -> Iterator[bytes]:
    """The file of a dump that was read."""
    yield FIRST_LINE + _frame({"version": dump.version, "made_at": dump.made_at})
    yield _frame({"nodes": dump.nodes})
    yield _frame({"steps": dump.steps})
    yield _frame({"end": [len(dump.nodes), len(dump.steps)]})


def plain_step(value: Any) -> Any:
    """An event, or effects, in plain form and without what must not be told."""
    return scrubbed(plain(value))


def _frame(content: dict[str, Any]) -> bytes:
    data = msgspec.msgpack.encode(content)
    return len(data).to_bytes(4, "big") + data


# ---------------------------------------------------------------- leaving out


def phrases(text: str) -> str:
    """Of a node's own words only what decisions look for."""
    return " ... ".join([phrase for phrase in _PHRASES if phrase in text]) or (_LEFT_OUT if text else "")


def _hidden(text: str) -> str:
    return _LEFT_OUT if text else text


_SCRUBS: Final = {
    "core.events.AttemptEnded": {"text": phrases},
    "core.events.Settled": {"message": phrases},
    "core.events.Record": {"message": _hidden},
    "core.events.Refuse": {"text": _hidden},
    "core.events.AgentRegistered": {"code": _hidden},
    "core.events.Registered": {"code": _hidden},
    "core.health.Ejection": {"why": _hidden},
    "core.agents.Agent": {"code": _hidden},
}
"""What is left out of which class: everything that a node's text or an approval code gets into."""

_NOTE_HIDES: Final = ("why", "code")


def scrubbed(value: Any) -> Any:
    """`value`, in plain form, without what must not be told."""
    if type(value) is not list:
        return value
    if len(value) == 3 and value[0] == "s" and isinstance(value[1], str):
        fields = [scrubbed(part) for part in value[2]]
        return ["s", value[1], _note(fields) if value[1] == "core.events.Note" else _without(value[1], fields)]
    if len(value) == 2 and value[0] == "core.agents.Agent":
        return [value[0], ["l", _without(value[0], [scrubbed(part) for part in value[1][1]])]]
    return [scrubbed(part) for part in value]


def _without(name: str, fields: list[Any]) -> list[Any]:
    for attribute, scrub in _SCRUBS.get(name, {}).items():
        index = names_of(kind_of(name)).index(attribute)
        fields[index] = scrub(fields[index])
    return fields


def _note(fields: list[Any]) -> list[Any]:
    """A line for the log: `fields` is its last member, a dict in plain form."""
    pairs = [[key, _hidden(part) if key in _NOTE_HIDES else part] for key, part in fields[-1][1]]
    return [*fields[:-1], ["d", pairs]]


# ---------------------------------------------------------------- reading


def load(data: bytes) -> Dump:
    """The dump in a file's bytes.

    Raises:
        RemoteError: it is none, of another form, or cut off.
    """
    if not data.startswith(MAGIC):
        raise RemoteError("this is no dump of the router; make one with ollama-router dump")
    if not data.startswith(FIRST_LINE):
        form = data[len(MAGIC) : len(MAGIC) + 8].split(b"\n")[0].decode("ascii", "replace")
        raise RemoteError(f"this is a dump of form {form}, and this version plays form {FORM} only: use the version that made it")
    try:
        head, *parts = _contents(data[len(FIRST_LINE) :])
        nodes = list(chain.from_iterable(part["nodes"] for part in parts if "nodes" in part))
        rows = list(chain.from_iterable(part["steps"] for part in parts if "steps" in part))
        if parts[-1].get("end") != [len(nodes), len(rows)]:
            raise ValueError("its end is missing")
        steps = [(Instant(at), what, effects) for at, what, effects in rows]
        return Dump(version=str(head["version"]), made_at=str(head["made_at"]), nodes=nodes, steps=steps)
    except (LookupError, TypeError, ValueError, AttributeError, msgspec.DecodeError) as error:
        raise RemoteError(f"the dump is damaged ({error}); make it again, or copy it again") from None


def event_of(given: Any) -> Event | str:
    """The event of a recorded step. Raises RemoteError."""
    try:
        event: Event | str = value_of(given)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RemoteError(f"the dump holds an event that this version does not know ({error}): use the version that made it") from None
    return event


def records_of(effects: Any) -> list[Record]:
    """The records among a recorded step's effects. Raises RemoteError."""
    try:
        given = [] if effects is None else [effect for effect in effects[1] if effect[1] == "core.events.Record"]
        return [value_of(effect) for effect in given]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RemoteError(f"the dump holds a record that this version does not know ({error}): use the version that made it") from None


def _contents(data: bytes) -> Iterable[dict[str, Any]]:
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if length > FRAME_MAX_BYTES or at + 4 + length > len(data):
            raise ValueError("it is cut off")
        yield msgspec.msgpack.decode(data[at + 4 : at + 4 + length], type=dict[str, Any])
        at += 4 + length
