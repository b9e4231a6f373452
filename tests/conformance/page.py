"""docs/compatibility.md, written from what the conformance run found. Decides layout, no verdict."""

from collections.abc import Iterable, Sequence

from tests.conformance.checklist import CHECKLIST
from tests.conformance.programs import CLIENTS, Case, Client
from tests.conformance.replays import REPLAYS
from tests.conformance.run import all_outcomes, checked, replayed
from tests.conformance.stage import BREAKS, LEAVES, REFUSED, Outcome
from tests.house.tree import ROOT

PAGE = ROOT / "docs" / "compatibility.md"
NOT_TRIED, FINE, FORBIDDEN, FAILS = "·", "yes", "refused", "**no**"
SILENT = "*nothing*"

OPENING = """# Compatibility

What real programs do with the router, as the conformance run found it: each client library unmodified from its registry, in front of a
coordinator with two [simulated](simulated.md) nodes, and the same calls made to such a node directly. This page is written by that run
(`make clients`, then `.venv/bin/python -m tests.conformance --write`), and `make test` fails when it says something else.

Tried are:

"""

MEANING = f"""
## Clients and routes

*{FINE}*: the client gets through the router exactly what it gets from a node. *{FORBIDDEN}*: the router's rules forbid it by default, and
it says where to do it instead. *{NOT_TRIED}*: not tried, mostly because the client has no such call. A client that *leaves* is cancelled
on its node within the test's patience, nothing counts against the node, and nothing stays in flight.
"""

BROKEN = """
## Streams that break

What a client tells its user when a node fails in mid-answer: behind the router by name, and at a node directly. *Nothing* means that it
takes the shortened answer for a whole one. A *cut* connection is a node that dies, between two lines unless it says otherwise; *end
without a last line* is how Ollama itself ends many failed answers; *node's own error* is an error that the node tells in the protocol's
own way. On `/v1` Ollama tells none, which is why the router does.
"""

SEQUENCES = """
## Call sequences

The requests of two programs that are no libraries, replayed in their order with their headers and bodies, on one kept connection, each with
the status of its answer. Through the router they are answered as by a node, except those refused.
"""

ITEMS = """
## What programs rely on beyond that

"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _clients_of(cases: Iterable[Case]) -> list[Client]:
    asked = {case.client for case in cases}
    return [client for client in CLIENTS if client.name in asked]


def _verdict(outcome: Outcome | None) -> str:
    if outcome is None:
        return NOT_TRIED
    if outcome.problem:
        return FAILS
    return FORBIDDEN if outcome.case.what == REFUSED else FINE


def _matrix(found: dict[Case, Outcome]) -> str:
    """A table for each route."""
    parts = []
    for route in dict.fromkeys(case.route for case in found):
        cases = [case for case in found if case.route == route and case.what not in BREAKS]
        clients = _clients_of(cases)
        whats = sorted(dict.fromkeys(case.what for case in cases), key=LEAVES.__contains__)
        rows = [[what, *(_verdict(found.get(Case(client.name, route, what))) for client in clients)] for what in whats]
        parts.append(f"\n### `{route}`\n\n" + table(["what", *(client.title for client in clients)], rows))
    return "".join(parts)


def _broken(found: dict[Case, Outcome]) -> str:
    cases = [case for case in found if case.what in BREAKS]
    titles = {client.name: client.title for client in CLIENTS}
    rows = []
    for case in cases:
        outcome = found[case]
        said = FAILS if outcome.problem else f"`{outcome.said}`" if outcome.said else SILENT
        rows.append([titles[case.client], f"`{case.route}`", case.what, said, "an error" if outcome.said_directly else SILENT])
    return "\n" + table(["client", "route", "what happens", "behind the router", "at a node"], rows)


def _sequences() -> str:
    rows = []
    for replay in REPLAYS:
        found = replayed(replay.program)[replay]
        verdict = FAILS if found.problem else FORBIDDEN if replay.refused else FINE
        rows.append([replay.program, replay.command, ", ".join(found.said), verdict])
    return "\n" + table(["program", "command", "requests", ""], rows)


def _items() -> str:
    return table(["item", ""], [[text, FAILS if checked()[text] else FINE] for text in CHECKLIST])


def written() -> str:
    """The page."""
    found = all_outcomes()
    versions = table(["client", "from", "version"], [[client.package, client.registry, client.version] for client in CLIENTS])
    return "".join([OPENING, versions, MEANING, _matrix(found), BROKEN, _broken(found), SEQUENCES, _sequences(), ITEMS, _items()])
