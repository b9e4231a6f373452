"""The dump's file: what goes in comes out, but for what must not be told."""

import pytest

from core.dump import FIRST_LINE, TICK, Step, event_of, frames, load, phrases, plain_step, records_of, written
from core.errors import RemoteError
from core.events import AttemptEnded, Ending, Failure, Note, Record, Refuse, Registered, Settled
from core.health import CLIENT_TEXTS, MEMORY_TEXTS, classify
from core.snapshot import take
from core.units import AgentId, Instant, RequestId
from tests.core.routing import World, registration

TEXT = "error parsing tool call: raw='my secret', out of memory"


def made(world: World, steps: list[Step]) -> bytes:
    return b"".join(frames(take(world.router), steps, version="1", made_at="now"))


def test_what_goes_in_comes_out() -> None:
    world = World()
    world.backend("n", "m", loaded=("m",))
    event = Settled(request_id=RequestId("r"), ending=Ending.SUCCESS)
    data = made(world, [(Instant(101.0), event, []), (Instant(102.0), TICK, None)])
    found = load(data)
    assert (found.version, found.made_at) == ("1", "now")
    assert [(at, event_of(what), effects) for at, what, effects in found.steps] == [(101.0, event, ["l", []]), (102.0, TICK, None)]
    assert [agent.name for agent in found.router().agents()] == ["n"]
    assert load(b"".join(written(found))) == found


def test_what_a_node_said_is_left_out_and_decides_as_before() -> None:
    world = World()
    world.backend("n", "m", loaded=("m",))
    for number in range(4):
        world.ask(f"r{number}")
        world.fail(f"r{number}", Failure.ANSWERED, 500, TEXT)
        if number < 3:
            world.settle(f"r{number}", Ending.ERROR, message=TEXT)
    event = AttemptEnded(request_id=RequestId("r"), failure=Failure.ANSWERED, status=500, text=TEXT)
    note = Note(level="warning", event="attempt failed", fields={"why": TEXT, "agent": "n"})
    data = made(world, [(Instant(200.0), event, [note, Refuse(request_id=RequestId("r"), status=500, text=TEXT)])])
    assert b"my secret" not in data
    ((_, what, effects),) = load(data).steps
    told = event_of(what)
    assert isinstance(told, AttemptEnded)
    assert told.text == "out of memory"
    assert effects == plain_step([note, Refuse(request_id=RequestId("r"), status=500, text="else")])


@pytest.mark.parametrize("text", ["", "anything", "model not found", "it does not support tools", *CLIENT_TEXTS, *MEMORY_TEXTS])
@pytest.mark.parametrize("status", [400, 404, 499, 500, 503])
def test_the_phrases_that_stay_are_judged_like_the_whole(text: str, status: int) -> None:
    whole = f"before {text} after" if text else ""
    assert classify(Failure.ANSWERED, status=status, text=phrases(whole)) == classify(Failure.ANSWERED, status=status, text=whole)


def test_approval_codes_are_left_out() -> None:
    world = World()
    (answer, *_) = world.register(registration("stranger"), trusted=False)
    assert isinstance(answer, Registered)
    assert answer.code
    data = made(world, [(Instant(200.0), TICK, [answer])])
    assert answer.code.encode() not in data
    assert plain_step(Registered(agent_id=AgentId("a"), status="new")) == plain_step(
        Registered(agent_id=AgentId("a"), status="new", code=None)
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no dump"),
        (b"PK something", "no dump"),
        (b"ollama-router dump 2\n", "form 2"),
        (FIRST_LINE, "damaged"),
        (FIRST_LINE + b"\x00\x00\x00\x01\x80", "damaged"),
        (FIRST_LINE + b"\xff\xff\xff\xff", "cut off"),
        (FIRST_LINE + b"\x00\x00\x00\x01\xc1", "damaged"),
    ],
)
def test_what_is_no_dump_is_said_in_a_sentence(data: bytes, said: str) -> None:
    with pytest.raises(RemoteError, match=said):
        load(data)


def test_one_that_is_cut_off_is_said() -> None:
    data = made(World(), [(Instant(200.0), TICK, [])])
    for length in (len(data) - 1, len(data) - 30):
        with pytest.raises(RemoteError, match="damaged"):
            load(data[:length])


def test_an_event_of_another_version_is_said() -> None:
    with pytest.raises(RemoteError, match="does not know"):
        event_of(["s", "core.events.Unheard", []])


def test_records_are_found_among_the_effects_of_a_step() -> None:
    world = World()
    world.backend("n", "m", loaded=("m",))
    world.ask("r")
    effects = world.settle("r")
    assert records_of(plain_step(effects)) == [effect for effect in effects if isinstance(effect, Record)] != []
    assert records_of(None) == []
    with pytest.raises(RemoteError, match="does not know"):
        records_of(["l", [["s", "core.events.Record", ["too", "short"]]]])
