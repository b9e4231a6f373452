"""The world: the same seed is the same run, rest is found or its lack is named, and everything can befall it."""

import sys
from typing import Any

import msgspec
import pytest

from core.events import Cut, Effect, Ending, Event, RequestCame, Route
from core.router import Router
from core.simulation import script
from core.simulation.actors import Connection
from core.simulation.options import Options, lite
from core.simulation.prng import Prng, Ratio
from core.simulation.script import Heal, Leave, Timed
from core.simulation.world import Outcome, World, run
from core.units import Instant, RequestId
from tests.core.simulation import digests as command
from tests.core.simulation.digests import COUNT, digests
from tests.core.simulation.mutants import breaks_ties_by_the_first, maker
from tests.core.simulation.worlds import CALM, asks, drawn, played, with_config


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not rest need not be waited for so long."""
    monkeypatch.setattr("core.simulation.world.REST_S", 200.0)


@pytest.mark.slow
def test_the_same_twice_and_under_every_hash_seed() -> None:
    """D1. For another Python there is a command: `python -m tests.core.simulation.digests PYTHON`."""
    first = digests(sys.executable, "1")
    assert len(set(first)) == COUNT
    assert digests(sys.executable, "1") == digests(sys.executable, "2") == first


def test_another_digest_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "digests", lambda python, hash_seed: ["a" if python == sys.executable else "b"])
    assert command.main([]) == 0
    assert command.main(["another"]) == 1
    assert "another, hash seed 3: ANOTHER DIGEST" in capsys.readouterr().out


def test_seeds_differ_and_steps_count() -> None:
    one, two = drawn(1).run(300), drawn(2).run(300)
    assert one.digest != two.digest
    assert one.steps >= 300


@pytest.mark.parametrize("seed", range(30, 60))
def test_nothing_goes_wrong_in_all_weathers(seed: int) -> None:
    verdict = drawn(seed).run(400)
    assert verdict.passed, verdict


@pytest.mark.parametrize("seed", range(5))
def test_crashes_alone(seed: int) -> None:
    verdict = run(seed, lite(Prng(seed)), 500)
    assert verdict.passed, verdict
    assert verdict.settled > 0


def test_a_crash_of_the_router_is_one_of_the_run() -> None:
    class Broken(Router):
        def handle(self, event: Event, *, now: Instant) -> list[Effect]:
            if type(event).__name__ == "FirstByte":
                raise KeyError("lost")
            return super().handle(event, now=now)

    world = played(asks(1), make_router=Broken)
    verdict = world.run(10_000)
    assert (verdict.outcome, verdict.invariant) == (Outcome.CRASH, "KeyError")
    assert isinstance(world.failure, KeyError)
    assert Outcome.CRASH.value == 127


def deaf(kind: type) -> Any:
    """A router that never says one kind of effect."""

    class Deaf(Router):
        def handle(self, event: Event, *, now: Instant) -> list[Effect]:
            return [effect for effect in super().handle(event, now=now) if not isinstance(effect, kind)]

        def tick(self, *, now: Instant) -> list[Effect]:
            return [effect for effect in super().tick(now=now) if not isinstance(effect, kind)]

    return Deaf


def test_what_never_rests_is_named(brief: None) -> None:
    world = played([*asks(1, output_tokens=9000), (6.0, Heal(survivors=(1,)))], make_router=deaf(Cut))
    verdict = world.run(10_000)
    if verdict.passed:  # the request was on the survivor
        world = played([*asks(1, output_tokens=9000), (6.0, Heal(survivors=(0,)))], make_router=deaf(Cut))
        verdict = world.run(10_000)
    assert (verdict.outcome, verdict.invariant) == (Outcome.LIVENESS, "L1")


class Shown(Router):
    """Shows something that is not so, once the world is at rest."""

    lie: str = ""

    def statistics(self) -> Any:
        real = super().statistics()
        return msgspec.structs.replace(real, **{self.lie: 1}) if self.lie else real


@pytest.mark.parametrize(("lie", "number"), [("waiting", "L5"), ("in_flight", "L2")])
def test_what_is_still_shown_is_named(lie: str, number: str, brief: None) -> None:
    world = World(1, CALM, actions=[Timed(5.0, Heal(survivors=(0, 1)))], make_router=Shown, every=10**9)
    Shown.lie = lie
    try:
        verdict = world.run(100_000)
    finally:
        Shown.lie = ""
    assert verdict.invariant == number


def test_agents_that_are_not_what_they_should_be_are_named(brief: None) -> None:
    class Fixed(Router):
        state = ""

        def agent(self, agent_id: Any) -> Any:
            view = super().agent(agent_id)
            return None if view is None else msgspec.structs.replace(view, state=self.state)

    for Fixed.state, survivors, text in (("held", (0, 1), "lives and is held"), ("ready", (0,), "dead and ready")):
        verdict = World(1, CALM, actions=[Timed(5.0, Heal(survivors=survivors))], make_router=Fixed, every=10**9).run(100_000)
        assert verdict.invariant == "L3"
        assert text in verdict.text


def test_a_node_that_never_lets_go_is_named(brief: None) -> None:
    world = played([(5.0, Heal(survivors=(0, 1)))])
    came = RequestCame(request_id=RequestId("stuck"), route=Route.CHAT, model=None)
    world.machines[0]._connections["stuck"] = Connection("stuck", 0, script.Ask(request=0), came, via_gateway=True)
    verdict = world.run(100_000)
    assert (verdict.outcome, verdict.invariant) == (Outcome.LIVENESS, "L2")
    assert "nodes [0]" in verdict.text


@pytest.mark.parametrize("strategy", ["least-busy", "round-robin", "metrics"])
def test_equal_nodes_get_equal_shares_and_a_starved_one_is_named(strategy: str) -> None:
    options = with_config(CALM, strategy=strategy, eject_s=1.0, eject_max_s=2.0)
    heal = [(5.0, Heal(survivors=(0, 1)))]
    assert played(heal, options).run(100_000).passed
    if strategy != "round-robin":
        verdict = played(heal, options, make_router=maker(breaks_ties_by_the_first)).run(100_000)
        assert (verdict.outcome, verdict.invariant) == (Outcome.LIVENESS, "L4")


EVERYTHING: list[tuple[float, script.Action]] = [
    (1.0, script.Order(node=0, command="drain")),
    (2.0, script.Order(node=0, command="connect")),
    (3.0, script.Configure(node=0, weight=2.0, max_concurrent=1)),
    (4.0, script.Pause(node=0, for_s=2.0)),
    (5.0, script.Slow(node=1, percent=10, for_s=2.0)),
    (6.0, script.Drift(node=1, percent=120)),
    (7.0, script.Failing(node=0, how="empty", for_s=1.0)),
    (8.0, script.Clog(node=1, for_s=1.0)),
    (9.0, script.StopAgent(node=0, for_s=5.0)),
    (16.0, script.Echo(node=0, back=3)),
    (17.0, script.Inventory(node=0, model=1, held=False)),
    (18.0, script.Inventory(node=0, model=9, held=False)),
    (19.0, script.Measured(node=0, cpu=95, memory=10)),
    (20.0, script.Partition(nodes=(0, 1, 7), for_s=1.0)),
    (21.0, script.OllamaDeath(node=1, for_s=1.0)),
    (22.0, script.Crash(node=1, for_s=3.0)),
    (23.0, script.Restart(for_s=1.0)),
    (23.5, script.Configure(node=0, weight=1.0)),
    (30.0, script.Crash(node=0, for_s=100.0)),
    (31.0, script.StopAgent(node=1, for_s=500.0)),
]


@pytest.mark.parametrize("survivors", [(0, 1), (0,), (1,)])
def test_everything_can_befall_it_and_it_heals(survivors: tuple[int, ...]) -> None:
    actions = [*EVERYTHING, *asks(60), (40.0, Heal(survivors=survivors)), (41.0, Leave(request=0))]
    world = played(actions)
    verdict = world.run(100_000)
    assert verdict.passed, verdict
    assert verdict.settled > 20


def test_strangers_are_approved_and_small_ones_run_what_they_can() -> None:
    options = Options(nodes=3, strangers=Ratio(1, 1), models=1)
    world = World(3, options, actions=[Timed(5.0, Heal(survivors=(0, 1, 2)))])
    assert world.run(100_000).passed
    assert all(not agent.pending for agent in world.checkers.book.agents.values())


def test_what_is_no_action_is_a_bug() -> None:
    world = played([])
    with pytest.raises(AssertionError, match="no such action"):
        world._do_to_node(Leave(request=0), world.machines[0])


def test_a_world_that_is_over_stays_over() -> None:
    world = played(asks(1))
    assert world.run(10_000).passed
    assert not world.step()
    assert world.script("s").header.story == "s"


def leaky(**fields: Any) -> Options:
    """One node with one slot."""
    return msgspec.structs.replace(CALM, nodes=1, slots=1, **fields)


def test_a_request_that_hangs_on_a_leaked_slot_is_served_after_the_model_was_unloaded() -> None:
    """All that the router, the shell and the node do about it, in the world."""
    actions = [*asks(2, gap_s=20.0, output_tokens=2000), (10.0, Leave(request=0))]
    world = played(actions, leaky(leak=Ratio(1, 1)))
    assert world.run(100_000).passed
    assert [record.ending for record in world.checkers.records] == [Ending.CANCELLED, Ending.SUCCESS]
    (late,) = [record for record in world.checkers.records if record.ending is Ending.SUCCESS]
    assert len(late.attempts) == 2
    assert world.machines[0].loads == 2


def test_after_healing_nothing_leaks_and_nothing_is_kept_for_ever() -> None:
    actions = [*asks(3, gap_s=20.0, output_tokens=2000, keep_alive_s=-1.0), (10.0, Leave(request=0)), (26.0, Heal(survivors=(0,)))]
    world = played(actions, leaky(leak=Ratio(1, 1)))
    assert world.run(100_000).passed
    assert all(row.expires_at < 1e6 for row in world.machines[0]._node.loaded(now=world.now))


def test_what_is_to_be_unloaded_goes_at_once_or_when_the_machine_goes_on() -> None:
    world = played([*asks(1, output_tokens=1), (20.0, script.Pause(node=0, for_s=5.0))], leaky(models=1))
    machine = world.machines[0]
    world.at(21.0, machine.unload, "nobody-holds-this")
    world.at(21.0, machine.unload, world._model_names()[0])
    world.at(24.0, lambda: seen.append(len(machine._node.loaded(now=world.now))))
    world.at(26.0, lambda: seen.append(len(machine._node.loaded(now=world.now))))
    seen: list[int] = []
    assert world.run(100_000).passed
    assert seen == [1, 0]
