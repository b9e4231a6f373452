"""The simulated Ollama against the recorded real one: lists and the other routes that answer at once, and how a stream is framed.

Inference is in `test_simulated_groups.py`. The same can be seen by eye: `python -m agent.simulated --models recorded`.
"""

import re
from typing import Any

from agent.simulated import SimulatedOllama, recorded_models
from tests.agent.conversations import body_shape
from tests.fleet.rawhttp import Answer, parse_answer, raw_request
from tests.fleet.recorded import Exchange, load

HEADERS_COMPARED = ("content-type", "allow", "location", "vary", "access-control-allow-origin", "access-control-max-age")
NOT_THE_SAME = {
    "plain/ps": "a model was loaded when it was recorded",
    "plain/recommendations": "a list that ollama.com gives out",
    "plain/show-verbose": "the model's whole vocabulary",
}


def fingerprint(answer: Answer) -> tuple[Any, ...]:
    sized = "content-length" in answer.headers
    return answer.status, answer.headers.get("content-type"), answer.whole, sized, body_shape(answer)


def differs(got: Answer, recorded: Answer) -> str:
    ours, theirs = fingerprint(got), fingerprint(recorded)
    return "" if ours == theirs else f"{ours}, recorded {theirs}"


async def answered(sim: SimulatedOllama, tape: Exchange) -> Answer:
    request = tape.request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    return parse_answer(await raw_request(sim.port, request), tape.method)


async def test_recorded_requests_of_the_other_routes_are_answered_alike() -> None:
    built = re.compile(r"/(v1/models.*|api/(version|status|tags|ps|show|nosuch|chat|experimental/.*)/?|metrics|debug/pprof/)?|//api/tags")
    tapes = [tape for tape in load("plain") if built.fullmatch(tape.target) and tape.case.partition("#")[0] not in NOT_THE_SAME]
    assert len(tapes) > 25
    five = [model for model in recorded_models() if model.name.partition(":")[0] in ("mid2", "mid", "tiny", "tiny2", "embed")]
    wrong = {}
    async with SimulatedOllama(models=five, version="0.33.0-rc2", check_host=True).serve() as sim:
        for tape in tapes:
            got, recorded = await answered(sim, tape), tape.answer
            fault = differs(got, recorded)
            for name in HEADERS_COMPARED:
                if got.headers.get(name) != recorded.headers.get(name):
                    fault += f" {name}: {got.headers.get(name)!r}, recorded {recorded.headers.get(name)!r}"
            if got.status >= 400 and got.body != recorded.body:
                fault += f" body {got.body!r}, recorded {recorded.body!r}"
            if fault:
                wrong[tape.case] = fault
    assert wrong == {}


async def test_a_stream_is_framed_as_recorded() -> None:
    """One HTTP chunk for each line, the head with the first, and header names in the recorded order."""
    tape = next(tape for tape in load("generate") if tape.case == "generate/stream#a")
    async with SimulatedOllama(models=recorded_models(), load_s=0.01, banner=False).serve() as sim:
        data = await raw_request(sim.port, tape.request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
    head, _, rest = data.partition(b"\r\n\r\n")
    names = [line.partition(b":")[0] for line in head.split(b"\r\n")[1:]]
    assert names == [b"Content-Type", b"Date", b"Connection", b"Transfer-Encoding"]
    chunks = re.findall(rb"([0-9a-f]+)\r\n(\{.*\}\n)?\r\n", rest)
    assert all(int(size, 16) == len(line) for size, line in chunks)
    assert [line.count(b"\n") for _, line in chunks] == [1] * 7 + [0]


async def test_created_at_is_go_s() -> None:
    tape = next(tape for tape in load("generate") if tape.case == "generate/stream#a")
    async with SimulatedOllama(models=recorded_models(), load_s=0.01).serve() as sim:
        lines = (await answered(sim, tape)).lines()
    form = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{0,8}[1-9])?Z")
    assert all(form.fullmatch(line["created_at"]) for line in lines)
    last = lines[-1]
    parts = last["load_duration"] + last["prompt_eval_duration"] + last["eval_duration"]
    assert 0 < parts <= last["total_duration"]
    assert last["load_duration"] >= 10_000_000
    assert last["eval_count"] == len(lines) - 1
