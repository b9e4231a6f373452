"""Machines: what a connection meets, how each fault shows, and what boots, pauses and deaths do to what is under way."""

from typing import Any

import pytest

from core.events import Failure, Route
from core.simulation import script
from core.simulation.actors import Answer, Connection
from core.simulation.actors_machine import FAULTS, KEEPALIVE_S, Machine
from core.simulation.script import Ask
from tests.core.simulation.worlds import CALM, asks, drawn, played


class Ear:
    """The coordinator's end: remembers what it hears."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.calls: list[str] = []

    def heard(self, connection: Connection, answer: Answer) -> None:
        self.answers.append(answer)

    def called(self, machine: Machine, boot: int, call: int, kind: str, data: bytes) -> None:
        self.calls.append(kind)


def machine_of(world: Any, ear: Ear, node: int = 0) -> Machine:
    machine: Machine = world.machines[node]
    machine._coordinator = ear
    return machine


def connect(world: Any, machine: Machine, model: str | None = None, *, gateway: bool = False, **fields: Any) -> Connection:
    from core.events import RequestCame
    from core.units import RequestId

    name = world._model_names()[0] if model is None else model
    came = RequestCame(request_id=RequestId("r"), route=Route.CHAT, model=name)
    connection = Connection("r/1", machine.index, Ask(request=0, **fields), came, via_gateway=gateway)
    machine.taken(connection)
    return connection


def pass_time(world: Any, seconds: float) -> None:
    until = world.now + seconds
    while world._heap and world._heap[0][0] <= until:
        world.step()
    world.now = until


def fresh() -> tuple[Any, Ear, Machine]:
    world = played([(1e6, script.Leave(request=0))])  # it lives long enough
    ear = Ear()
    return world, ear, machine_of(world, ear)


def test_a_good_answer_begins_and_ends() -> None:
    world, ear, machine = fresh()
    connect(world, machine)
    pass_time(world, 60)
    assert [(answer.first, answer.end) for answer in ear.answers] == [(True, False), (True, True)]
    usage = ear.answers[1].usage
    assert usage is not None
    assert usage.output_tokens == 20
    assert usage.total_ns >= usage.load_ns > 0
    assert machine.in_flight == 0


@pytest.mark.parametrize("how", FAULTS)
def test_each_fault_shows_as_itself(how: str) -> None:
    world, ear, machine = fresh()
    machine.fail(how, world.now + 100)
    connect(world, machine)
    pass_time(world, 60)
    failed = ear.answers[-1]
    expected = {"refuse_500": 500, "refuse_503": 503, "load_error": 500, "empty": 200}
    kinds = {"empty": Failure.EMPTY, "cut": Failure.DIED, "died": Failure.DIED}
    assert failed.failure is kinds.get(how, Failure.ANSWERED)
    assert failed.status == expected.get(how, 0)
    assert len(ear.answers) == (2 if how == "cut" else 1)
    world.healed = True
    ear.answers.clear()
    connect(world, machine)
    pass_time(world, 60)
    assert ear.answers[-1].end


def test_what_it_does_not_hold_is_404_and_what_cannot_be_read_400() -> None:
    world, ear, machine = fresh()
    connect(world, machine, "unheard-of")
    connect(world, machine, "")
    connect(world, machine, "a b c")
    pass_time(world, 1)
    assert [answer.status for answer in ear.answers] == [404, 400, 404]


def test_show_and_unload_take_no_time() -> None:
    world, ear, machine = fresh()
    connect(world, machine, kind="show")
    pass_time(world, 1)
    assert ear.answers[0].end


def test_dialling() -> None:
    _, _, machine = fresh()
    assert machine.dial(via_gateway=True) == machine.dial(via_gateway=False) == "open"
    machine.kill_ollama()
    machine.kill_ollama()
    assert machine.dial(via_gateway=True) == "open"
    assert machine.dial(via_gateway=False) == "refused"
    machine.crash(silent=False)
    machine.crash(silent=True)
    assert machine.dial(via_gateway=True) == "refused"
    machine.start()
    machine.crash(silent=True)
    assert machine.dial(via_gateway=True) == "silence"
    machine.slow(50)
    machine.pause()
    machine.start_ollama()
    machine.start()
    machine.start()
    assert machine.boot == 3


def test_a_crash_resets_and_a_power_failure_says_so_only_after_the_next_boot() -> None:
    world, ear, machine = fresh()
    connect(world, machine)
    machine.crash(silent=False)
    connect(world, machine)
    pass_time(world, 1)
    assert [answer.failure for answer in ear.answers] == [Failure.DIED, Failure.DIED]
    ear.answers.clear()
    machine.start()
    connect(world, machine)
    machine.crash(silent=True)
    connect(world, machine)
    pass_time(world, 1)
    assert not ear.answers
    machine.start()
    pass_time(world, KEEPALIVE_S + 1)
    assert [answer.failure for answer in ear.answers] == [Failure.DIED, Failure.DIED]


def test_the_death_of_its_ollama_ends_what_runs() -> None:
    world, ear, machine = fresh()
    connect(world, machine)
    machine.kill_ollama()
    connect(world, machine)
    pass_time(world, 1)
    assert [answer.failure for answer in ear.answers] == [Failure.DIED, Failure.REFUSED]
    assert machine.loaded_rows() == []


def test_one_that_stands_still_answers_when_it_goes_on() -> None:
    world, ear, machine = fresh()
    machine.resume()
    machine.pause()
    connection = connect(world, machine)
    asked: list[Machine] = []
    machine.asked(asked.append)
    machine.answered(machine.boot, 1, "heartbeat", 0, b"")
    machine.stop_agent()
    pass_time(world, 100)
    assert not ear.answers
    assert not asked
    assert not machine.streaming(connection)
    machine.resume()
    pass_time(world, 60)
    assert ear.answers[-1].end
    assert asked == [machine]
    machine.pause()
    connection = connect(world, machine)
    machine.closed(connection)
    machine.crash(silent=False)
    pass_time(world, 1)
    assert ear.answers[-1].failure is Failure.DIED


def test_a_client_that_left_is_forgotten() -> None:
    world, ear, machine = fresh()
    connection = connect(world, machine)
    machine.closed(connection)
    machine.closed(connection)
    connection.client_closed = True
    machine.taken(connection)
    pass_time(world, 60)
    assert not ear.answers
    assert machine.in_flight == 0


def test_a_slow_one_says_how_long_it_really_took() -> None:
    world, ear, machine = fresh()
    machine.slow(10)
    began = world.now
    connect(world, machine)
    while not (ear.answers and ear.answers[-1].end):
        world.step()
    usage = ear.answers[-1].usage
    assert usage is not None
    assert abs(usage.total_ns / 1e9 - (world.now - began)) < 0.5


def test_an_agent_that_leaves_takes_its_gateway_along() -> None:
    world, ear, machine = fresh()
    connect(world, machine, gateway=True)
    machine.stop_agent()  # it has not registered yet with this ear, but its call is under way
    pass_time(world, 30)
    assert machine.link is None
    assert ear.answers
    machine.stop_agent()
    machine.drift(50)
    assert machine.dial(via_gateway=True) == "refused"


def test_models_come_and_go() -> None:
    _, _, machine = fresh()
    name = machine.could_hold[0]
    machine.hold(name, False)
    machine.hold(name, False)
    assert name not in [row["name"] for row in machine.rows()]
    machine.hold(name, True)
    assert name in [row["name"] for row in machine.rows()]


def test_an_answer_that_cannot_be_read_is_a_violation() -> None:
    _, _, machine = fresh()
    with pytest.raises(AssertionError, match="R17"):
        machine.answered(machine.boot, 1, "register", 200, b"{")


@pytest.mark.parametrize("seed", range(20))
def test_in_all_weathers(seed: int) -> None:
    verdict = drawn(seed).run(500)
    assert verdict.passed, verdict


def test_answers_of_the_coordinator_reach_its_agent() -> None:
    world = played([*asks(5), (20.0, script.Order(node=0, command="delete")), (40.0, script.Heal(survivors=(0, 1)))], CALM)
    assert world.run(100_000).passed
    assert all(machine.agent_id for machine in world.machines)
