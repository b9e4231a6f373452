"""What is handed over: who may claim it, what is told of the node that nginx tried, and what becomes of it when nobody comes."""

from base64 import b64encode
from typing import Any

import pytest
import trio
import trio.testing

from core.events import AttemptEnded, Cut, Ending, Failure, Forward, Refuse, RequestCame, Route, Wait
from core.units import RequestId
from edge.handover import TAKEN_WITHIN_S, Carried, Claim, Handover
from edge.wire_heads import RequestHead, parse_request_head
from tests.edge.nginx_parts import ScriptedRouter, forward_to

R = RequestId("r")
SECRET = b"the-secret"


class Parts:
    """A handover, and one request that came."""

    def __init__(self) -> None:
        self.router = ScriptedRouter()
        self.handover = Handover(self.router, secret=SECRET, lives=self.router.lives, now=lambda: self.router.now)
        self.carried = Carried(R, route=Route.CHAT, stream=True)
        self.handover.add(self.carried)
        self.router.apply(RequestCame(request_id=R, route=Route.CHAT, model="m"))

    def out(self) -> Forward:
        """nginx was given a node."""
        (forward,) = forward_to()(R)
        assert isinstance(forward, Forward)
        self.carried.put(forward)
        assert self.carried.take_decision() is forward
        self.carried.forward, self.carried.lease_id, self.carried.agent_id = forward, forward.lease.id, forward.lease.agent_id
        return forward

    def claim(self, takeover: bytes = SECRET + b" r", route: Route = Route.CHAT, **fields: str) -> Claim | None:
        return self.handover.claim(takeover, route, head(**fields))


def head(**fields: str) -> RequestHead:
    lines = "".join(f"X-Ollama-Router-{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return parse_request_head(f"POST /api/chat HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())


class Resumed:
    """What a claim tells of `edge.live.Live`."""

    kept: object = None
    agent_id: object = None


def resume(claim: Claim | None) -> Resumed:
    assert claim is not None
    one = Resumed()
    claim.resume(one)  # type: ignore[arg-type]
    return one


def test_a_decision_that_nginx_may_not_carry_out_lies_at_the_desk_for_who_claims_it() -> None:
    parts = Parts()
    refuse = Refuse(request_id=R, status=404, text="no")
    parts.handover.hand_over(parts.carried, refuse)
    assert parts.handover.pulse() == [R]
    claim = parts.claim()
    resume(claim)
    assert claim is not None
    assert claim.desk.take_nowait() is refuse
    assert (claim.route, claim.stream, parts.handover.table) == (Route.CHAT, True, {})
    assert parts.claim() is None


@pytest.mark.parametrize(
    "takeover", [b"", b"r", b"wrong r", SECRET, SECRET + b" ", SECRET + b"x r", SECRET + b" nobody", SECRET + b" \xff"]
)
def test_others_claim_nothing(takeover: bytes) -> None:
    parts = Parts()
    parts.handover.hand_over(parts.carried, Refuse(request_id=R, status=404, text="no"))
    assert parts.claim(takeover) is None
    assert parts.claim(route=Route.GENERATE) is None
    assert parts.claim() is not None


def test_what_nobody_comes_for_is_settled() -> None:
    parts = Parts()
    parts.handover.hand_over(parts.carried, Refuse(request_id=R, status=404, text="no"))
    parts.router.now += TAKEN_WITHIN_S
    parts.handover.sweep(now=parts.router.now)
    (settled,) = parts.router.settled()
    assert (settled.ending, settled.status, parts.handover.table, parts.router.desks) == (Ending.CANCELLED, 499, {}, {})
    assert parts.claim() is None


def test_a_node_that_failed_in_a_way_that_nobody_knows_is_tried_again() -> None:
    parts = Parts()
    forward = parts.out()
    claim = parts.claim(Tried=f"{forward.lease.id} 0")
    resume(claim)
    assert claim is not None
    assert claim.desk.take_nowait() is forward
    assert not any(isinstance(event, AttemptEnded) for event in parts.router.events)


def test_a_gateways_own_failure_is_told_and_the_next_decision_awaited() -> None:
    parts = Parts()
    forward = parts.out()
    parts.router.script.append(forward_to(name="second"))
    parts.carried.put(Cut(request_id=R, reason="its node is gone"))
    claim = parts.claim(Tried=f"{forward.lease.id} 502", Failure="refused")
    one = resume(claim)
    ended = parts.router.events[-1]
    assert isinstance(ended, AttemptEnded)
    assert (ended.failure, one.agent_id, one.kept) == (Failure.REFUSED, "a1", None)
    assert claim is not None
    second = claim.desk.take_nowait()
    assert isinstance(second, Forward)
    claim.desk.begin(NeverCut())  # the cut was about the first node


class NeverCut:
    def give_up(self, why: str, unload: tuple[str, ...]) -> None:
        raise AssertionError(why)


def test_a_nodes_own_answer_is_kept_for_the_client() -> None:
    parts = Parts()
    forward = parts.out()
    said = b'{"error":"model is broken"}'
    one = resume(parts.claim(Tried=f"{forward.lease.id} 500", Answer=b64encode(said).decode()))
    ended = parts.router.events[-1]
    assert isinstance(ended, AttemptEnded)
    assert (ended.failure, ended.status, ended.text) == (Failure.ANSWERED, 500, "model is broken")
    kept, name = one.kept  # type: ignore[misc]
    assert (kept.body, kept.head.status, name) == (said, 500, "box")


@pytest.mark.parametrize("tried", ["", "r/2 500", "other/1 500"])
def test_a_takeover_from_a_node_that_it_is_not_on_is_no_takeover(tried: str) -> None:
    parts = Parts()
    parts.out()
    assert parts.claim(**({"Tried": tried} if tried else {})) is None
    assert (parts.handover.late, list(parts.handover.table)) == (1, [R])


def test_what_nginx_said_is_over_cannot_be_claimed() -> None:
    parts = Parts()
    forward = parts.out()
    parts.carried.freed = True
    assert parts.claim(Tried=f"{forward.lease.id} 0") is None


def test_what_the_router_has_given_up_is_forgotten() -> None:
    for claims in (True, False):
        parts = Parts()
        forward = parts.out()
        parts.router.live.clear()
        if claims:
            assert parts.claim(Tried=f"{forward.lease.id} 0") is None
        else:
            parts.carried.put(Cut(request_id=R, reason="nothing was heard"))
            parts.handover.sweep(now=parts.router.now)
        assert (parts.handover.table, parts.router.desks, parts.router.settled()) == ({}, {}, [])


def test_a_cut_alone_ends_nothing() -> None:
    parts = Parts()
    parts.out()
    parts.carried.put(Cut(request_id=R, reason="the node is gone"))
    parts.handover.sweep(now=parts.router.now)
    assert (parts.carried.gone, list(parts.handover.table)) == (True, [R])


def test_who_holds_an_answer_back_is_told_once_and_not_of_waiting() -> None:
    parts = Parts()
    told: list[object] = []

    class Holder:
        def decided(self, carried: Carried, effect: object) -> None:
            told.append(effect)

    parts.carried.put(Wait(request_id=R, position=1, why="full"))
    assert parts.carried.take_decision() is None
    parts.carried.holder = Holder()
    assert parts.claim() is None
    parts.carried.put(Wait(request_id=R, position=1, why="full"))
    (forward,) = forward_to()(R)
    parts.carried.put(forward)
    assert told == [forward]
    assert parts.carried.holder is None


def test_at_a_stop_everything_is_settled() -> None:
    parts = Parts()
    parts.out()
    parts.handover.close()
    assert [settled.ending for settled in parts.router.settled()] == [Ending.UNKNOWN]
    assert parts.handover.table == {}


async def test_who_waits_at_the_desk_of_a_request_that_was_handed_over_is_woken() -> None:
    carried = Carried(R, route=Route.CHAT, stream=True)
    taken: list[Any] = []

    async def wait() -> None:
        taken.append(await carried.take())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        (forward,) = forward_to()(R)
        carried.put(forward)
    assert taken == [forward]
