"""A router that was put back does what the one that was taken does."""

from typing import Any

import msgspec
import pytest

from core.errors import LocalError, RemoteError
from core.events import AttemptEnded, Event, Failure
from core.invariants import check
from core.router import Router
from core.snapshot import Ref, Snapshot, names_of, pack, plain, take, unpack, value_of
from core.units import Instant, RequestId
from tests.core.routing import World
from tests.core.simulation.worlds import drawn


def flat(snapshot: Snapshot) -> list[Any]:
    """All nodes of a snapshot, in plain form."""
    return [node for part in pack(snapshot) for node in part]


def again(router: Router) -> Router:
    """`router`, taken, packed, written, read and put back."""
    snapshot = take(router)
    written = msgspec.msgpack.encode(flat(snapshot))
    return unpack(msgspec.msgpack.decode(written))


class Twins:
    """A router, and from its `turn`-th input on one that was put back, which must do the same."""

    def __init__(self, config: Any, *, now: Instant, turn: int) -> None:
        self.first = Router(config, now=now)
        self.second: Router | None = None
        self.turn, self.inputs = turn, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.first, name)

    def handle(self, event: Event, *, now: Instant) -> Any:
        self._count()
        effects = self.first.handle(event, now=now)
        if self.second is not None:
            assert self.second.handle(event, now=now) == effects
            self._check(now)
        return effects

    def tick(self, *, now: Instant) -> Any:
        self._count()
        effects = self.first.tick(now=now)
        if self.second is not None:
            assert self.second.tick(now=now) == effects
            assert self.second.next_deadline() == self.first.next_deadline()
            self._check(now)
        return effects

    def _check(self, now: Instant) -> None:
        """Now and then, for it looks at everything."""
        if self.second is not None and self.inputs % 10 == 0:
            check(self.second, now=now)

    def _count(self) -> None:
        self.inputs += 1
        if self.inputs % self.turn == 0:
            self.second = again(self.first)


@pytest.mark.parametrize("seed", range(12))
def test_in_any_world_it_goes_on_as_before(seed: int) -> None:
    verdict = drawn(seed, make_router=lambda config, *, now: Twins(config, now=now, turn=97 + 10 * seed)).run(2500)
    assert verdict.passed, verdict.text


def test_a_snapshot_stays_what_it_was_while_its_router_goes_on() -> None:
    world = World()
    world.backend("n", "m", loaded=("m",), slots=2)
    world.ask("r1")
    snapshot = take(world.router)
    before = flat(take(world.router))
    world.fail("r1", Failure.DIED)
    world.ask("r2")
    world.wait(5)
    assert flat(snapshot) == before
    assert flat(take(world.router)) != before


def test_what_is_one_thing_in_two_places_stays_one() -> None:
    world = World()
    agent_id = world.backend("n", "m", loaded=("m",))
    world.ask("r1")
    router = again(world.router)
    request = router._requests["r1"]  # type: ignore[index]
    assert request.agent is router._registry.get(agent_id)
    assert router._requests is router._dispatcher.requests
    assert router._barriers is router._dispatcher.obstacles.barriers


def test_explanations_are_left_out_but_their_requests_are_known() -> None:
    world = World()
    world.backend("n", "m", loaded=("m",))
    world.ask("r1")
    router = again(world.router)
    found = router.why(RequestId("r1"))
    assert found is not None
    assert found.decisions == []
    router.handle(AttemptEnded(request_id=RequestId("r1"), failure=Failure.DIED), Instant(world.now))
    found = router.why(RequestId("r1"))
    assert found is not None
    assert [decision.outcome.partition(":")[0] for decision in found.decisions] == ["refused"], "what is decided from now on is known"


def test_plain_values_come_back_as_they_were() -> None:
    value = (1, [2.5, None], {("a", True): frozenset(("x", "y"))}, Failure.DIED, msgspec.UNSET, b"raw", ["r", 3])
    assert value_of(plain(value)) == value


def test_what_cannot_be_held_is_said() -> None:
    with pytest.raises(LocalError, match="cannot hold a object"):
        plain(object())


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [["core.router.Router", ["d", []]]],
        [["core.router.Router", ["d", [["_config", ["s", "core.config.RouterConfig", []]]]]]],
        [["core.router.Router", ["d", [["_config", ["s", "pathlib.Path", []]]]]]],
        [["core.router.Router", ["d", [["_config", ["e", "core.units.inf", "A"]]]]]],
        [["core.router.Router", ["d", [["_config", ["nonsense"]]]]]],
        ["text"],
    ],
)
def test_damaged_nodes_are_one_sentence(nodes: list[Any]) -> None:
    with pytest.raises(RemoteError, match="not of this version of the router, or it is damaged"):
        unpack(nodes)


def test_a_reference_is_a_number() -> None:
    assert plain(Ref(7)) == ["r", 7]


class _Slotted(float):
    """Its base is not written in Python, and names no slots."""

    __slots__ = ("first", "second")


class _Open(_Slotted):
    """Takes any attribute."""


def test_slots_are_found_whatever_the_bases_say_of_theirs() -> None:
    assert names_of(_Slotted) == ("first", "second")
    assert names_of(_Open) == ()


class _Plain:
    """An object with a dict, which a router has no need of."""

    def __init__(self) -> None:
        self.number, self.table = 1, {"a": 2}


def test_an_object_with_a_dict_is_held_by_what_is_in_it() -> None:
    snapshot = Snapshot(_Plain())  # type: ignore[arg-type]
    assert snapshot.nodes == [(_Plain, {"number": 1, "table": Ref(1)}), (dict, {"a": 2})]
