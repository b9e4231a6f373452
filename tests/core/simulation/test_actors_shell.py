"""The shell of the world: it settles each request once, and reports what its nodes did as the real one does."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from core.events import (
    AgentCommanded,
    AttemptEnded,
    Command,
    Cut,
    Declined,
    Effect,
    Ending,
    Event,
    Failure,
    FirstByte,
    Forward,
    Refuse,
    RequestCame,
    Settled,
)
from core.router import Router
from core.simulation import script
from core.simulation.actors import Answer, Connection
from core.simulation.prng import Ratio
from core.simulation.script import Ask, Heal, Leave
from core.simulation.world import World
from tests.core.simulation.worlds import CALM, asks, drawn, played


def watched(world: World) -> list[tuple[Event | None, Sequence[Effect]]]:
    """All calls of the router from now on."""
    seen: list[tuple[Event | None, Sequence[Effect]]] = []
    real = world.after

    def after(event: Event | None, effects: Sequence[Effect], *, now: Any) -> None:
        seen.append((event, effects))
        real(event, effects, now=now)

    world.after = after  # type: ignore[method-assign]
    return seen


def of(kind: type, seen: list[tuple[Event | None, Sequence[Effect]]]) -> list[Any]:
    return [event for event, _ in seen if isinstance(event, kind)]


def run(actions: Any, **given: Any) -> tuple[World, list[tuple[Event | None, Sequence[Effect]]]]:
    world = played(actions, **given)
    seen = watched(world)
    verdict = world.run(100_000)
    assert verdict.passed, verdict
    return world, seen


def test_a_good_request_is_three_calls() -> None:
    _, seen = run(asks(1))
    mine = [event for event, _ in seen if getattr(event, "request_id", None)]
    assert [type(event) for event in mine] == [RequestCame, FirstByte, Settled]
    assert mine[2].ending is Ending.SUCCESS
    assert mine[2].usage.output_tokens == 20


@pytest.mark.parametrize("stream", [True, False])
def test_a_broken_answer_is_an_error_if_seen_and_tried_elsewhere_if_not(stream: bool) -> None:
    actions = [(1.0, script.Failing(node=node, how="cut", for_s=50.0)) for node in (0, 1)]
    _, seen = run([*actions, *asks(1, stream=stream)])
    (settled,) = of(Settled, seen)
    if stream:
        assert settled.node_fault is Failure.DIED
    else:
        assert [ended.failure for ended in of(AttemptEnded, seen)] == [Failure.DIED, Failure.DIED]
        assert settled.status == 502


def test_the_last_nodes_answer_is_passed_on() -> None:
    actions = [(1.0, script.Failing(node=node, how="refuse_500", for_s=50.0)) for node in (0, 1)]
    _, seen = run([*actions, *asks(1)])
    (settled,) = of(Settled, seen)
    assert (settled.ending, settled.status) == (Ending.ERROR, 500)


def test_clients_leave_one_by_one_or_at_once() -> None:
    _, seen = run([*asks(6, gap_s=0.01, output_tokens=5000), (6.0, script.Leave(request=0)), (6.1, script.Storm(one_in=2))])
    endings = [settled.ending for settled in of(Settled, seen)]
    assert endings.count(Ending.CANCELLED) == 4


def test_impatient_clients_leave_until_the_world_is_healed() -> None:
    _, seen = run(asks(1, output_tokens=5000, patience_s=3.0))
    assert [settled.status for settled in of(Settled, seen)] == [499]
    _, seen = run([*asks(1, output_tokens=5000, patience_s=3.0), (6.0, Heal(survivors=(0, 1)))])
    assert [settled.status for settled in of(Settled, seen)] == [200]
    _, seen = run(asks(1, patience_s=40.0))
    assert [settled.status for settled in of(Settled, seen)] == [200]


def test_a_cut_before_the_first_byte_is_tried_elsewhere_and_after_it_an_error() -> None:
    at_once = [*asks(1, output_tokens=9000), (5.05, script.Order(node=0, command="disconnect_now"))]
    at_once += [(5.05, script.Order(node=1, command="disconnect_now"))]
    _, seen = run(at_once)
    assert [ended.failure for ended in of(AttemptEnded, seen)] == [Failure.VANISHED]
    late = [*asks(1, output_tokens=9000)] + [(30.0, script.Order(node=node, command="disconnect_now")) for node in (0, 1)]
    _, seen = run(late)
    assert [settled.node_fault for settled in of(Settled, seen)] == [Failure.VANISHED]


def test_an_edge_that_died_says_nothing() -> None:
    world, seen = run([*asks(1, output_tokens=9000), (6.0, script.Forget(request=0))])
    assert not of(Settled, seen)
    assert [record.ending for record in world.checkers.records] == [Ending.UNKNOWN]


def test_a_coordinator_that_restarts_knows_nobody_and_agents_come_back() -> None:
    actions = [*asks(20, gap_s=1.0), (10.0, script.Restart(for_s=3.0)), (10.5, script.Restart(for_s=3.0))]
    world, seen = run([*actions, (40.0, Heal(survivors=(0, 1)))])
    assert world.shell.generation == 2
    assert len(of(RequestCame, seen)) < 20
    assert of(Settled, seen)


def test_what_is_dead_or_cut_off_is_not_reached() -> None:
    crashed = [(4.9, script.Crash(node=node, for_s=5.0)) for node in (0, 1)]
    _, seen = run([*crashed, *asks(1)])
    assert Failure.REFUSED in [ended.failure for ended in of(AttemptEnded, seen)]
    _, seen = run([(4.9, script.Partition(nodes=(0, 1), for_s=5.0)), *asks(1)])
    ended = [event for event, _ in seen if isinstance(event, AttemptEnded)]
    assert ended[0].failure is Failure.REFUSED


def test_waiting_requests_are_woken() -> None:
    _, seen = run(asks(12, gap_s=0.01))
    assert sum(isinstance(effect, Forward) for _, effects in seen for effect in effects) == 12
    assert [settled.status for settled in of(Settled, seen)] == [200] * 12


def test_a_request_that_comes_twice_comes_once() -> None:
    _, seen = run([*asks(1), (5.0, Ask(request=0)), (5.0, Ask(request=1, model=77))])
    assert len(of(RequestCame, seen)) == 2
    assert any(isinstance(effect, Refuse) and effect.status == 404 for _, effects in seen for effect in effects)


def test_it_notes_nothing_of_an_answer_that_has_no_lease() -> None:
    world = played([*asks(1, output_tokens=9000), (1e5, script.Leave(request=0))])
    while not world.shell.servings or next(iter(world.shell.servings.values())).connection is None:
        world.step()
    serving = world.shell.servings[0]
    assert serving.connection is not None
    serving.lease = None
    world.shell.heard(serving.connection, Answer(first=True))
    assert not world.shell._heard


def test_late_answers_of_a_closed_connection_are_not_heard() -> None:
    world = played([*asks(1, output_tokens=9000), (1e5, script.Leave(request=0))])
    while world.now < 8.0:
        world.step()
    serving = world.shell.servings[0]
    other = Connection("x", 0, serving.ask, serving.came, via_gateway=True)
    world.shell.heard(other, Answer(first=True, end=True))
    assert not serving.over
    world.shell.leave(0)
    world.shell.heard(other, Answer(first=True, end=True))
    world.shell._woken(serving)
    assert serving.over


def test_a_declined_registration_is_told_to_the_agent() -> None:
    class Strict(Router):
        def handle(self, event: Event, *, now: Any) -> list[Effect]:
            if type(event).__name__ == "AgentRegistered":
                return [Declined(status=403, text="no")]
            return super().handle(event, now=now)

    world = played(asks(2), make_router=Strict)
    assert world.run(10_000).passed
    assert not world.shell.ids


def test_bytes_that_are_no_message_are_refused() -> None:
    world = played([])
    world.shell.called(world.machines[0], 1, 1, "heartbeat", b"{")
    replies = [entry for entry in world._heap if entry[2].__name__ == "answered"]
    assert replies[0][3][3] == 400


@pytest.mark.parametrize("seed", range(40, 70))
def test_in_all_weathers(seed: int) -> None:
    verdict = drawn(seed).run(400)
    assert verdict.passed, verdict


def test_a_cut_may_have_the_node_unload_before_the_attempt_is_over() -> None:
    """The request hangs on a leaked slot; another one's client leaves while the node is told."""
    options = msgspec.structs.replace(CALM, nodes=1, slots=1, leak=Ratio(1, 1))
    world, seen = run([*asks(2, gap_s=20.0, output_tokens=2000), (12.0, Leave(request=0))], options=options)
    done = [effect for _, effects in seen for effect in effects]
    (cut,) = (effect for effect in done if isinstance(effect, Cut))
    assert cut.unload
    assert [ended.failure for ended in of(AttemptEnded, seen)] == [Failure.VANISHED]
    assert sum(isinstance(effect, Forward) for effect in done) == 3
    world.shell._unloaded(SimpleNamespace(over=True), "its client left meanwhile")  # type: ignore[arg-type]
    assert len(of(AttemptEnded, seen)) == 1


def test_a_client_that_is_not_served_cannot_leave() -> None:
    _, seen = run([*asks(1), (6.0, Leave(request=99)), (90.0, Leave(request=0))])
    assert [settled.ending for settled in of(Settled, seen)] == [Ending.SUCCESS]


def test_a_cut_that_comes_before_its_attempt_began_ends_it_as_it_begins() -> None:
    options = msgspec.structs.replace(CALM, nodes=1, slots=1)
    world = played([*asks(2, gap_s=0.1, output_tokens=2000), (1e5, Leave(request=0))], options=options)
    seen = watched(world)
    while 1 not in world.shell.servings:
        world.step()
    waiting = world.shell.servings[1]
    world.shell._put(waiting, Cut(request_id=waiting.request_id, reason="nothing of it runs"))
    assert (waiting.cut, waiting.early_cut) == (None, None)
    while not any(isinstance(answer, Forward) for answer in waiting.answers):
        world.step()
    assert waiting.connection is None, "it was told, and did not act yet"
    (agent,) = world.shell.router.agents()
    world.shell.apply(AgentCommanded(agent_id=agent.id, command=Command.DISCONNECT_NOW))
    assert waiting.early_cut is not None
    while not waiting.over and not of(AttemptEnded, seen):
        world.step()
    assert [(ended.request_id, ended.failure) for ended in of(AttemptEnded, seen)] == [(waiting.request_id, Failure.VANISHED)]
