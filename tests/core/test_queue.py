"""The fair queue: limits, order, and that no client starves another."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import RouterConfig
from core.errors import LocalError
from core.queue import FairQueue, Place
from core.units import Instant, Micros, RequestId

LATER = Instant(1000.0)


class Line:
    """A queue and a number for each who comes."""

    def __init__(self, **config: int) -> None:
        self.queue = FairQueue(RouterConfig(**config))  # type: ignore[arg-type]
        self.number = 0

    def add(self, client: str, *, cost: int = 10, deadline: float = LATER, burst: int = 0) -> RequestId:
        self.number += 1
        request_id = RequestId(f"{client}{self.number}")
        place = self.queue.new_place(client, cost=Micros(cost), number=self.number, burst=burst)
        self.queue.push(request_id, client, place, deadline=Instant(deadline))
        self.queue.check()
        return request_id

    def order(self) -> list[str]:
        return list(self.queue.in_order())


def test_clients_take_turns() -> None:
    line = Line()
    for client in "aaaabb":
        line.add(client)
    line.add("c")
    assert line.order() == ["a1", "b5", "c7", "a2", "b6", "a3", "a4"]


def test_dear_requests_take_more_of_a_turn() -> None:
    line = Line()
    for client, cost in (("a", 30), ("a", 30), ("b", 10), ("b", 10), ("b", 10), ("b", 10)):
        line.add(client, cost=cost)
    assert line.order() == ["a1", "b3", "b4", "b5", "a2", "b6"]


def test_a_burst_is_not_held_against_a_client() -> None:
    line = Line()
    for client in "aaaaaab":
        line.add(client, burst=20)
    assert line.order() == ["a1", "a2", "a3", "b7", "a4", "a5", "a6"]
    line.queue.remove(RequestId("b7"))
    line.add("a", burst=1000)
    assert line.order()[-2:] == ["a6", "a8"], "nobody overtakes one of the same client, however the burst grows"


def test_a_new_client_stands_beside_the_first_in_line() -> None:
    line = Line()
    for _ in range(10):
        line.add("a")
    for _ in range(5):
        line.queue.remove(RequestId(line.order()[0]))
    line.add("b")
    assert line.order()[:3] == ["a6", "b11", "a7"]


def test_who_comes_back_stands_first() -> None:
    line = Line()
    first = line.add("a")
    for client in "aabb":
        line.add(client)
    line.queue.remove(first)
    line.queue.push(first, "a", line.queue.first_place(1), deadline=LATER)
    line.queue.check()
    assert line.order()[0] == first
    line.queue.push(RequestId("fresh client"), "z", line.queue.first_place(0), deadline=LATER)
    line.queue.check()
    assert line.order()[0] == "fresh client"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50), st.booleans()), max_size=60))
def test_nobody_of_one_client_is_overtaken_and_no_client_starves(steps: list[tuple[str, int, bool]]) -> None:
    line = Line()
    for client, cost, leaves in steps:
        line.add(client, cost=cost)
        if leaves:
            head = line.order()[0]
            assert line.queue.position(RequestId(head)) == 1
            line.queue.remove(RequestId(head))
            line.queue.check()
    order = line.order()
    for client in "abc":
        numbers = [int(name[1:]) for name in order if name[0] == client]
        assert numbers == sorted(numbers)
    if order:
        newcomer = line.add("new")
        others_first = line.order()[: line.queue.position(newcomer) - 1]
        assert all(line.queue.waiters[RequestId(name)].place.tag == line.queue._order[0][0].tag for name in others_first)


@given(st.integers(1, 8), st.integers(1, 60))
def test_a_flood_moves_another_client_by_one_request_of_each(clients: int, flood: int) -> None:
    line = Line()
    for number in range(clients):
        for _ in range(flood):
            line.add(f"c{number} ")
    line.add("late")
    assert line.order().index(f"late{clients * flood + 1}") <= clients


def test_limits_are_told_and_those_who_come_back_are_let_in() -> None:
    line = Line(queue_max=3, queue_per_client=2)
    line.add("a")
    assert not line.queue.client_full("a")
    line.add("a")
    assert line.queue.client_full("a")
    assert not line.queue.full
    line.add("b")
    assert line.queue.full
    line.queue.push(RequestId("again"), "c", line.queue.first_place(0), deadline=LATER)
    assert len(line.queue) == 4


def test_nobody_waits_twice() -> None:
    line = Line()
    request_id = line.add("a")
    with pytest.raises(LocalError, match="waits already"):
        line.queue.push(request_id, "a", Place(0, 9), deadline=LATER)
    assert request_id in line.queue
    assert line.queue.remove(RequestId("nobody")) is None


def test_deadlines_come_in_order_and_stay_until_removed() -> None:
    line = Line()
    assert line.queue.next_deadline() is None
    late, soon = line.add("a", deadline=9.0), line.add("a", deadline=5.0)
    assert line.queue.next_deadline() == 5.0
    assert line.queue.due(now=Instant(4.999)) == []
    assert line.queue.due(now=Instant(5.0)) == [soon]
    assert line.queue.due(now=Instant(20.0)) == [soon, late]
    line.queue.remove(soon)
    assert line.queue.next_deadline() == 9.0


def test_the_order_may_be_walked_while_it_changes() -> None:
    line = Line()
    for _ in range(3):
        line.add("a")
    seen = []
    for request_id in line.queue.in_order():
        seen.append(request_id)
        line.queue.remove(request_id)
    assert seen == ["a1", "a2", "a3"]


@pytest.mark.parametrize("part", ["_order", "_deadlines", "_clients", "_last_tag"])
def test_the_check_finds_what_differs(part: str) -> None:
    line = Line()
    line.add("a")
    getattr(line.queue, part).clear()
    with pytest.raises(AssertionError, match="R11"):
        line.queue.check()
