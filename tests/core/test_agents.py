"""One node: what messages change of it, what stays, and how it is shown."""

import msgspec
import pytest

from core.agents import SHOWN_AS, Agent
from core.errors import IllegalTransition
from core.events import Upstream
from core.lifecycle import AgentInput, AgentState
from core.messages import AgentSettings, GpuDevice, Heartbeat
from core.names import normalise
from core.units import AgentId, Instant, UnixMs
from core.views import EjectionView
from tests.core.routing import registration, row

UPSTREAM = Upstream(host="10.0.0.9", port=9, gateway=True)


def agent(state: AgentState = AgentState.OFFLINE) -> Agent:
    return Agent(AgentId("id"), UPSTREAM, state=state, now_unix=UnixMs(5))


def test_an_introduction_sets_what_the_agent_says_and_leaves_what_an_admin_set() -> None:
    one = agent()
    one.take_settings(AgentSettings(custom_name="mine", tags=["t"], notes="n", weight=2.0, max_concurrent=3))
    devices = [GpuDevice(model="A", count=2), GpuDevice(model="B", count=1)]
    moved = Upstream(host="10.0.0.8", port=1)
    one.introduce(registration("box", gpu_devices=devices, slots=4, instance_id="i", agent_version="1.0", simulated=True), moved)
    assert (one.machine_name, one.upstream, one.gpu_count, one.gpu_model, one.slots) == ("box", moved, 3, "A", 4)
    assert (one.custom_name, one.tags, one.notes, one.weight, one.max_concurrent) == ("mine", ["t"], "n", 2.0, 3)
    one.introduce(registration("box", gpu_devices=[], gpu_count=7, gpu_model="told"), moved)
    assert (one.gpu_count, one.gpu_model, one.slots) == (7, "told", 4)
    one.introduce(registration("box", gpu_devices=[]), moved)
    assert (one.gpu_count, one.gpu_model) == (None, None)


def test_settings_null_clears_and_absent_leaves() -> None:
    one = agent()
    one.take_settings(AgentSettings(custom_name="mine", tags=["t"], weight=2.0))
    one.take_settings(AgentSettings(custom_name=None, tags=None))
    assert (one.custom_name, one.tags, one.weight) == (None, [], 2.0)
    one.take_settings(AgentSettings(weight=None, tags=msgspec.UNSET))
    assert one.weight is None


def test_another_takes_over_what_an_admin_set() -> None:
    former, one = agent(), agent()
    former.take_settings(AgentSettings(custom_name="mine", notes="n"))
    one.inherit(former)
    assert (one.custom_name, one.notes) == ("mine", "n")


def test_numbers_that_are_not_told_stay() -> None:
    one = agent()
    one.take_numbers(Heartbeat(agent_id="id", cpu_usage=5, memory_usage=6, gpu_usage=7, ollama_version="0.20.0"), now=Instant(1.0))
    one.take_numbers(Heartbeat(agent_id="id", cpu_usage=8, memory_usage=9, ollama_ok=False), now=Instant(2.0))
    assert (one.cpu_usage, one.memory_usage, one.gpu_usage, one.ollama_version, one.metrics_at) == (8, 9, 7, "0.20.0", 2.0)
    assert not one.ollama_ok


def test_it_is_well_when_its_ollama_answers_and_its_models_are_known() -> None:
    one = agent()
    assert not one.well
    one.inventory.report_installed([row("m")])
    assert one.well
    assert one.holds(normalise("m"))
    assert not one.holds(normalise("x"))
    one.ollama_ok = False
    assert not one.well


def test_steps_tell_whether_something_changed() -> None:
    one = agent()
    assert one.step(AgentInput.HEARD_ILL)
    assert not one.step(AgentInput.HEARD_ILL)
    assert one.state is AgentState.INITIALIZING
    with pytest.raises(IllegalTransition):
        one.step(AgentInput.APPROVE)
    assert one.state is AgentState.INITIALIZING
    assert "initializing" in repr(one)


@pytest.mark.parametrize("state", AgentState)
def test_every_state_is_shown_with_a_reason(state: AgentState) -> None:
    one = agent(state)
    one.why = "was not heard"
    view = one.view(in_flight=2, ejections=[])
    assert (view.status, view.state) == (SHOWN_AS[state], state.value)
    assert view.detail


def test_details_say_what_is_missing() -> None:
    one = agent(AgentState.INITIALIZING)
    assert one.detail(0) == "its models are not known yet"
    one.ollama_ok = False
    assert one.detail(0) == "its Ollama does not answer"
    drains = agent(AgentState.DRAINING)
    drains.why = "drained for maintenance"
    assert drains.detail(1) == "drained for maintenance; 1 of its requests is still running"
    assert drains.detail(2) == "drained for maintenance; 2 of its requests are still running"


def test_a_view_shows_all_and_no_number_that_was_never_told() -> None:
    one = agent(AgentState.READY)
    one.introduce(registration("box"), UPSTREAM)
    one.name, one.beyond = "box", 3
    one.inventory.report_installed([row("m")])
    ejection = EjectionView(model=None, until_s=1.0, why="w")
    view = one.view(in_flight=2, ejections=[ejection])
    assert (view.cpu_usage, view.memory_usage) == (None, None)
    assert (view.in_flight, view.active_requests, view.installed, view.ejections) == (2, 5, [row("m")], [ejection])
    one.take_numbers(Heartbeat(agent_id="id", cpu_usage=0, memory_usage=1), now=Instant(1.0))
    assert one.view(in_flight=0, ejections=[]).cpu_usage == 0


def test_slots_are_what_was_told_or_what_was_learned_of_a_model() -> None:
    one, key = agent(), normalise("m")
    assert (one.slots, one.slots_told, one.slots_for(key)) == (1, False, 1)
    one.limits[key], one.probes[key] = 3, None
    assert one.slots_for(key) == 3
    view = one.view(in_flight=0, ejections=[])
    assert (view.slots_learned, view.model_slots) == (True, {"m:latest": 3})
    one.told_slots(1)
    assert (one.slots_for(key), one.limits, one.probes) == (1, {}, {}), "what it tells is another thing than what was assumed"
    one.limits[key] = 2
    one.told_slots(1)
    assert one.slots_for(key) == 2, "told again"
    one.told_slots(4)
    assert one.slots_for(key) == 4
