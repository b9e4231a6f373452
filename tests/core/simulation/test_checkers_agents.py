"""What anyone could know about the agents: who may certainly not, and who certainly may, be given requests."""

from typing import Any

import pytest

from core.events import (
    Accepted,
    AgentCommanded,
    AgentRegistered,
    BackendAdded,
    Command,
    Declined,
    HeartbeatCame,
    MetricsCame,
    NodePolled,
    NodeSilent,
    Pulse,
    Registered,
    RequestCame,
    Route,
    SettingsChanged,
    Upstream,
)
from core.messages import AgentSettings, GpuDevice, Heartbeat, Metrics, Registration
from core.names import normalise
from core.simulation.checkers_agents import SETTLING_S, AgentBook
from core.simulation.prng import Prng
from core.units import AgentId, Instant, RequestId, UnixMs
from tests.core.simulation.worlds import drawn

A = AgentId("a")
MODEL = normalise("m")
NOW = Instant(100.0)
ROWS: list[Any] = [{"name": "m:latest"}, "other", {"name": 5}, {"name": "not a name"}]


def beat(*, boot: int = 1, sequence: int = 1, installed: list[Any] | None = None, **fields: Any) -> HeartbeatCame:
    message = Heartbeat(
        agent_id="a", cpu_usage=0, memory_usage=0, boot=boot, sequence=sequence, installed_models=installed, loaded_models=[], **fields
    )
    return HeartbeatCame(heartbeat=message, now_unix=UnixMs(0))


def registration(boot: int = 1) -> AgentRegistered:
    message = Registration(
        machine_name="n", ip_address="192.0.2.1", ollama_version="0", ollama_port=1, gpu_available=True, gpu_devices=[GpuDevice(model="g")],
        boot=boot,
    )  # fmt: skip
    return AgentRegistered(
        registration=message, new_id=A, code="c", trusted=True, gpu_exempt=False, upstream=Upstream(host="h", port=1), now_unix=UnixMs(0)
    )


OK = [Accepted(agent_id=A)]


def book(*, well: bool = True) -> AgentBook:
    made = AgentBook(timeout_s=60.0, calm_s=10.0)
    made.take(registration(), [Registered(agent_id=A, status="registered")], now=Instant(NOW - 50))
    if well:
        made.take(beat(installed=ROWS), OK, now=Instant(NOW - 29))
        made.take(beat(sequence=2), OK, now=NOW)
    return made


def test_one_that_reported_well_may() -> None:
    made = book()
    assert made.forbids(A, MODEL, now=NOW) == ""
    assert made.certain(made.agents[A], MODEL, now=NOW)
    assert [agent.id for agent in made.holders(MODEL)] == [A]
    assert made.holders(normalise("unheard-of")) == []


def test_one_that_did_not_report_may_not() -> None:
    made = book(well=False)
    assert "cannot serve" in made.forbids(A, MODEL, now=NOW)
    assert "not known" in made.forbids(AgentId("b"), MODEL, now=NOW)
    made.take(beat(ollama_ok=True), OK, now=NOW)  # it says that it is well, but not what it holds
    assert made.forbids(A, MODEL, now=NOW)
    made.agents[A].well = True
    assert "hold the model" in made.forbids(A, None, now=NOW)


@pytest.mark.parametrize("command", [Command.DRAIN, Command.DISCONNECT, Command.DISCONNECT_NOW])
def test_one_that_was_ordered_out_may_not_until_it_is_connected_or_boots(command: Command) -> None:
    made = book()
    made.take(AgentCommanded(agent_id=A, command=command), [Declined(status=409, text="")], now=NOW)
    assert not made.forbids(A, MODEL, now=NOW)
    made.take(AgentCommanded(agent_id=A, command=command), OK, now=NOW)
    assert "ordered" in made.forbids(A, MODEL, now=NOW)
    made.take(AgentCommanded(agent_id=A, command=Command.CONNECT), OK, now=NOW)
    assert not made.forbids(A, MODEL, now=NOW)
    made.take(AgentCommanded(agent_id=A, command=command), OK, now=NOW)
    made.take(registration(boot=1), [Registered(agent_id=A, status="updated")], now=NOW)
    assert "ordered" in made.forbids(A, MODEL, now=NOW)
    made.take(registration(boot=2), [Registered(agent_id=A, status="updated")], now=NOW)
    made.take(beat(boot=2), OK, now=NOW)
    assert not made.forbids(A, MODEL, now=NOW)


def test_one_that_leaves_or_waits_for_approval_or_was_deleted_may_not() -> None:
    made = book()
    made.take(beat(sequence=3, draining=True), OK, now=NOW)
    assert "ordered" in made.forbids(A, MODEL, now=NOW)
    made.take(beat(sequence=4), OK, now=NOW)
    assert not made.forbids(A, MODEL, now=NOW)
    made.take(registration(), [Registered(agent_id=A, status="pending")], now=NOW)
    made.take(beat(sequence=9), OK, now=NOW)
    assert "approval" in made.forbids(A, MODEL, now=NOW)
    assert made.agents[A].sequence == 4
    made.take(AgentCommanded(agent_id=A, command=Command.APPROVE), OK, now=NOW)
    assert not made.forbids(A, MODEL, now=NOW)
    made.take(AgentCommanded(agent_id=A, command=Command.DELETE), OK, now=NOW)
    made.take(AgentCommanded(agent_id=A, command=Command.DELETE), OK, now=NOW)
    assert "not known" in made.forbids(A, MODEL, now=NOW)


def test_silence_lack_and_caps() -> None:
    made = book()
    assert "not heard" in made.forbids(A, MODEL, now=Instant(NOW + 60.1))
    assert not made.forbids(A, MODEL, now=Instant(NOW + 60.0))
    assert "hold the model" in made.forbids(A, normalise("unheard-of"), now=NOW)
    made.take(SettingsChanged(agent_id=A, settings=AgentSettings(max_concurrent=1)), OK, now=NOW)
    made.take(SettingsChanged(agent_id=A, settings=AgentSettings(notes="x")), OK, now=NOW)
    made.agents[A].leases = 1
    assert "at most" in made.forbids(A, MODEL, now=NOW)
    assert not made.forbids(A, MODEL, capped=False, now=NOW)
    made.take(SettingsChanged(agent_id=A, settings=AgentSettings(max_concurrent=None)), OK, now=NOW)
    made.take(SettingsChanged(agent_id=AgentId("b"), settings=AgentSettings()), OK, now=NOW)
    made.take(SettingsChanged(agent_id=A, settings=AgentSettings(max_concurrent=1)), [Declined(status=404, text="")], now=NOW)
    assert not made.forbids(A, MODEL, now=NOW)


def test_what_is_old_is_known_as_such_and_teaches_nothing() -> None:
    made = book()
    assert made.stale(beat(sequence=2)) == A
    assert made.stale(beat(boot=0, sequence=99)) == A
    assert made.stale(beat(sequence=3)) is None
    assert made.stale(Pulse()) is None
    made.take(beat(sequence=1, installed=[]), OK, now=NOW)
    assert not made.forbids(A, MODEL, now=NOW)
    made.take(beat(sequence=3), [Declined(status=404, text="")], now=NOW)
    assert made.agents[A].sequence == 2


def test_every_sign_of_life_counts_and_every_trouble() -> None:
    made = book()
    later = Instant(NOW + 50)
    for event in (
        Pulse(heard=(A, AgentId("b"))),
        MetricsCame(agent_id=A, metrics=Metrics(cpu_usage=0, memory_usage=0), now_unix=UnixMs(0)),
    ):
        made.agents[A].heard_at = NOW
        made.take(event, OK, now=later)
        assert made.agents[A].heard_at == later
    assert made.certain(made.agents[A], MODEL, now=later)
    made.trouble(A, now=later)
    made.trouble(AgentId("b"), now=later)
    assert not made.certain(made.agents[A], MODEL, now=later)
    made.take(beat(sequence=3), OK, now=Instant(later + 31))  # late: that is a trouble too
    assert made.agents[A].excused_until == later + 31 + SETTLING_S


def test_polled_nodes() -> None:
    made = AgentBook(timeout_s=60.0, calm_s=10.0)
    made.take(NodePolled(agent_id=A, installed=ROWS, now_unix=UnixMs(0)), [], now=NOW)
    made.take(NodeSilent(agent_id=A, refused=True), [], now=NOW)
    assert not made.agents
    made.take(BackendAdded(agent_id=A, name="n", upstream=Upstream(host="h", port=1), now_unix=UnixMs(0)), OK, now=NOW)
    assert made.stale(beat()) is None
    made.take(NodePolled(agent_id=A, loaded=ROWS, alive=False, now_unix=UnixMs(0)), [], now=NOW)
    assert "cannot serve" in made.forbids(A, MODEL, now=NOW)
    for _ in range(2):
        made.take(NodePolled(agent_id=A, installed=ROWS, now_unix=UnixMs(0)), [], now=NOW)
    assert not made.forbids(A, MODEL, now=NOW)
    made.take(NodeSilent(agent_id=A, refused=False), [], now=NOW)
    assert not made.forbids(A, MODEL, now=NOW)
    made.take(NodeSilent(agent_id=A, refused=True), [], now=NOW)
    assert "cannot serve" in made.forbids(A, MODEL, now=NOW)


def test_what_was_declined_or_concerns_nobody_teaches_nothing() -> None:
    made = AgentBook(timeout_s=60.0, calm_s=10.0)
    made.take(registration(), [Declined(status=403, text="")], now=NOW)
    made.take(beat(), OK, now=NOW)
    made.take(AgentCommanded(agent_id=A, command=Command.DRAIN), OK, now=NOW)
    made.take(RequestCame(request_id=RequestId("r"), route=Route.CHAT, model="m"), [], now=NOW)
    assert not made.agents


@pytest.mark.parametrize("seed", range(5))
def test_in_all_weathers(seed: int) -> None:
    assert drawn(seed + Prng(seed).below(1000)).run(300).passed
