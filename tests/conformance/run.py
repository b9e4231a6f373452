"""The whole conformance run: what came of each case, replay and item, each made once per process."""

import re
import tempfile
import traceback
from dataclasses import dataclass
from functools import cache

import trio

from tests.conformance.checklist import CHECKLIST
from tests.conformance.programs import CLIENTS, Case, Client, running
from tests.conformance.replays import REPLAYS, Line, Replay
from tests.conformance.stage import Outcome, Stage, open_stage
from tests.fleet.clients import masked
from tests.fleet.rawhttp import Answer

UNCOMPARED = ("/api/tags", "/api/ps", "/api/pull", "/api/status", "/api/version")
"""Paths whose answers are the fleet's, not a node's."""

MODIFIED = re.compile(rb'"modified_at":"[^"]+"')
"""Nodes pull one model at different times."""
HELPS = ("do it on one node", "on the node")
"""What every refusal says: where it can be done."""


@dataclass(frozen=True)
class Replayed:
    """What came of a replay."""

    said: tuple[str, ...] = ()
    """Each request with its status."""
    problem: str = ""


async def of_client(client: Client) -> dict[Case, Outcome]:
    """What comes of every case of `client` now."""
    with tempfile.TemporaryFile() as errors:
        async with open_stage() as stage, running(client, errors) as talk:
            return {case: await stage.judge(case, talk) for case in client.cases}


@cache
def outcomes(client: Client) -> dict[Case, Outcome]:
    """What came of every case of `client`."""
    return trio.run(of_client, client)


def all_outcomes() -> dict[Case, Outcome]:
    """What came of the cases of all clients."""
    return {case: outcome for client in CLIENTS for case, outcome in outcomes(client).items()}


async def _line(port: int, replay: Replay) -> Line:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        line = Line(stream, f"127.0.0.1:{port}")
        await replay.run(line)
    return line


async def _replayed(stage: Stage, replay: Replay) -> Replayed:
    """`replay` through the router and at a node: nothing a client looks at may differ, unless it is refused."""
    try:
        routed = await _line(stage.fleet.port, replay)
        direct = routed if replay.refused else await _line(stage.alone.port, replay)
    except Exception:
        return Replayed((), traceback.format_exc())
    said = tuple(routed.said)
    if routed.said != direct.said:
        return Replayed(said, f"through the router {routed.said}, at a node {direct.said}")
    for request, ours, theirs in zip(routed.said, routed.answers, direct.answers, strict=True):
        if ours.headers.get("content-type") != theirs.headers.get("content-type"):
            return Replayed(said, f"{request}: {ours.headers} instead of {theirs.headers}")
        if not any(path in request for path in UNCOMPARED) and _steady(ours) != _steady(theirs):
            return Replayed(said, f"{request}: {ours.body!r} instead of {theirs.body!r}")
    if replay.refused and not _refused_well(routed.answers[-1]):
        return Replayed(said, f"not refused with a sentence that helps: {routed.answers[-1]}")
    return Replayed(said)


def _steady(answer: Answer) -> bytes:
    return MODIFIED.sub(b"", masked(answer.body))


def _refused_well(answer: Answer) -> bool:
    if answer.status != 403:
        return False
    text = answer.json()["error"]
    return any(helps in text for helps in HELPS)


async def of_program(program: str) -> dict[Replay, Replayed]:
    """What comes of the replays of `program` now."""
    async with open_stage() as stage:
        return {replay: await _replayed(stage, replay) for replay in REPLAYS if replay.program == program}


@cache
def replayed(program: str) -> dict[Replay, Replayed]:
    """What came of the replays of `program`."""
    return trio.run(of_program, program)


async def of_checklist() -> dict[str, str]:
    """What is wrong with each item of the checklist now."""
    found = {}
    async with open_stage() as stage:
        for text, check in CHECKLIST.items():
            try:
                await check(stage)
                found[text] = ""
            except Exception:
                found[text] = traceback.format_exc()
    return found


@cache
def checked() -> dict[str, str]:
    """What is wrong with each item of the checklist; "" when nothing is."""
    return trio.run(of_checklist)
