"""Effects reach the task that serves the request, in order, and a Cut reaches the attempt that runs."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from core.errors import LocalError
from core.events import Cut, Forward, Lease, PassOn, Refuse, Upstream, Wait
from core.units import AgentId, LeaseId, RequestId
from edge.desk import Desk

ID = RequestId("r")
WAIT = Wait(request_id=ID, position=1, why="busy")
PASS = PassOn(request_id=ID)


def test_what_is_put_is_taken_in_order() -> None:
    desk = Desk(ID)
    assert desk.take_nowait() is None
    desk.put(WAIT)
    desk.put(PASS)
    assert [desk.take_nowait(), desk.take_nowait(), desk.take_nowait()] == [WAIT, PASS, None]


async def test_take_waits_for_an_effect() -> None:
    desk = Desk(ID)
    taken: list[object] = []

    async def wait() -> None:
        taken.append(await desk.take())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert not taken
        desk.put(PASS)
    assert taken == [PASS]


async def test_a_cancelled_take_leaves_the_desk_usable() -> None:
    desk = Desk(ID)
    with trio.CancelScope() as scope:
        scope.cancel()
        await desk.take()
    desk.put(PASS)
    assert await desk.take() == PASS


async def test_one_task_at_a_desk() -> None:
    desk = Desk(ID)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.take)
        await wait_all_tasks_blocked()
        with pytest.raises(LocalError):
            await desk.take()
        nursery.cancel_scope.cancel()


class Attempt:
    """Remembers why it was given up."""

    def __init__(self) -> None:
        self.why: list[str] = []
        self.unload: tuple[str, ...] = ()

    def give_up(self, why: str, unload: tuple[str, ...]) -> None:
        self.why.append(why)
        self.unload = unload


def test_a_cut_ends_the_running_attempt_and_says_why() -> None:
    desk, attempt = Desk(ID), Attempt()
    desk.begin(attempt)
    desk.put(Cut(request_id=ID, reason="its node is offline", unload=("m",)))
    assert attempt.why == ["its node is offline"]
    assert attempt.unload == ("m",)
    assert desk.take_nowait() is None


def test_a_cut_after_the_attempt_means_nothing() -> None:
    desk, attempt = Desk(ID), Attempt()
    desk.begin(attempt)
    desk.end()
    desk.put(Cut(request_id=ID, reason="late"))
    assert attempt.why == []


def test_a_cut_never_ends_the_attempt_before() -> None:
    desk, first, second = Desk(ID), Attempt(), Attempt()
    desk.begin(first)
    desk.end()
    desk.begin(second)
    desk.put(Cut(request_id=ID, reason="gone"))
    assert (first.why, second.why) == ([], ["gone"])
    desk.put(Refuse(request_id=ID, status=503, text="busy"))
    assert desk.take_nowait() is not None


FORWARD = Forward(
    request_id=ID,
    lease=Lease(id=LeaseId("r/1"), request_id=ID, agent_id=AgentId("a"), agent_name="n", upstream=Upstream(host="h", port=1), attempt=1),
)


@pytest.mark.parametrize("taken", [True, False])
def test_a_cut_between_the_order_and_the_beginning_ends_the_attempt_as_it_begins(taken: bool) -> None:
    desk, first, second = Desk(ID), Attempt(), Attempt()
    desk.put(FORWARD)
    if taken:
        assert desk.take_nowait() == FORWARD
    desk.put(Cut(request_id=ID, reason="gone", unload=("m",)))
    desk.begin(first)
    assert (first.why, first.unload) == (["gone"], ("m",))
    desk.end()
    desk.put(FORWARD)
    desk.begin(second)
    assert second.why == []
