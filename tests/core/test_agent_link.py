"""The agent's side of the conversation: stories, then a world that loses, delays and refuses what it likes."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core import agent_link, messages
from core.agent_link import (
    BACKOFF_MAX_S,
    CALL_TIMEOUT_S,
    GAP_S,
    Admitted,
    AgentLink,
    CallFailed,
    CallRefused,
    Effect,
    HeartbeatAnswered,
    Left,
    LinkState,
    Load,
    LoadSampled,
    OllamaPolled,
    RegistrationAnswered,
    SendHeartbeat,
    SendRegistration,
    StopAsked,
    WorkSeen,
)
from core.errors import LocalError
from core.events import Note
from core.messages import Heartbeat, HeartbeatAnswer, Registration, RegistrationAnswer
from core.units import Instant

INTERVAL_S = 10.0
REGISTRATION = Registration(
    machine_name="gpu-1", ip_address="10.0.0.5", ollama_version="", ollama_port=11434, gpu_available=True, instance_id="i", boot=7, slots=2
)
LOADED = [{"name": "llama3:latest", "digest": "d1", "size_vram": 5, "context_length": 4096, "expires_at": "soon"}]
INSTALLED = [{"name": "llama3:latest", "digest": "d1"}]


class Agent:
    """An `AgentLink` with a clock and short words for what happens to it."""

    def __init__(self, *, interval_s: float = INTERVAL_S, dice: Any = lambda n: 0) -> None:
        self.now = Instant(1000.0)
        self.link = AgentLink(REGISTRATION, interval_s=interval_s, dice=dice, now=self.now)

    def at(self, seconds: float) -> "Agent":
        self.now = Instant(self.now + seconds)
        return self

    def tell(self, event: agent_link.Event) -> list[Effect]:
        return self.link.handle(event, now=self.now)

    def tick(self) -> list[Effect]:
        effects = self.link.tick(now=self.now)
        deadline = self.link.next_deadline()
        assert deadline is None or deadline > self.now
        assert self.link.tick(now=self.now) == []
        return effects

    def wait(self) -> list[Effect]:
        """Sleep until the link wants to be woken."""
        deadline = self.link.next_deadline()
        assert deadline is not None
        self.now = max(self.now, deadline)
        return self.tick()

    def registering(self) -> SendRegistration:
        (sent,) = (effect for effect in self.wait() if isinstance(effect, SendRegistration))
        return sent

    def beat(self) -> SendHeartbeat:
        (sent,) = (effect for effect in self.wait() if isinstance(effect, SendHeartbeat))
        return sent

    def register(self, status: str = "registered", **more: Any) -> list[Effect]:
        more.setdefault("agent_token", "t")
        call = self.registering().call
        return self.tell(RegistrationAnswered(call=call, answer=RegistrationAnswer(agent_id="a", status=status, **more)))

    def ok(self, sent: SendHeartbeat, **more: Any) -> list[Effect]:
        return self.tell(HeartbeatAnswered(call=sent.call, answer=HeartbeatAnswer(**more)))

    def serving(self) -> "Agent":
        self.register()
        self.ok(self.beat())
        return self


def notes(effects: list[Effect]) -> list[str]:
    return [effect.event for effect in effects if isinstance(effect, Note)]


# ---------------------------------------------------------------- stories


def test_it_registers_at_once_and_then_says_everything_it_knows() -> None:
    agent = Agent()
    agent.tell(OllamaPolled(ok=True, version="0.33.0", installed=INSTALLED, loaded=LOADED))
    agent.tell(LoadSampled(load=Load(cpu_usage=12.5, memory_usage=50, gpu_usage=3)))
    agent.tell(WorkSeen(in_flight=("r1", "r2"), average_response_time_ms=120))
    sent = agent.registering()
    assert agent.now == 1000.0
    assert (sent.registration.ollama_version, sent.registration.instance_id, sent.registration.boot) == ("0.33.0", "i", 7)
    effects = agent.tell(
        RegistrationAnswered(
            call=sent.call, answer=RegistrationAnswer(agent_id="a", status="registered", agent_token="t", gateway_credential="c")
        )
    )
    assert effects[0] == Admitted(agent_id="a", agent_token="t", gateway_credential="c")
    assert agent.link.state is LinkState.REGISTERED
    heartbeat = agent.beat().heartbeat
    assert agent.now == 1000.0
    assert heartbeat == Heartbeat(
        agent_id="a", cpu_usage=12.5, memory_usage=50, active_requests=2, gpu_usage=3, average_response_time_ms=120, loaded_models=LOADED,
        installed_models=INSTALLED, in_flight=["r1", "r2"], ollama_ok=True, ollama_version="0.33.0", slots=2, boot=7, sequence=1,
    )  # fmt: skip


def test_heartbeats_keep_their_rhythm_however_slow_the_answers() -> None:
    agent = Agent()
    agent.register()
    at = []
    for _ in range(3):
        sent = agent.beat()
        at.append(agent.now)
        agent.at(3)
        agent.ok(sent)
    assert at == [1000.0, 1010.0, 1020.0]


def test_lists_are_sent_once_and_again_only_when_changed_or_asked_for() -> None:
    agent = Agent()
    agent.tell(OllamaPolled(ok=True, installed=INSTALLED, loaded=[]))
    agent.register()
    first = agent.beat()
    assert (first.heartbeat.installed_models, first.heartbeat.loaded_models) == (INSTALLED, [])
    agent.ok(first)
    second = agent.beat()
    assert (second.heartbeat.installed_models, second.heartbeat.loaded_models) == (None, None)
    agent.ok(second, send_inventory=True)
    third = agent.beat()
    assert third.heartbeat.installed_models == INSTALLED
    assert agent.now == 1010 + GAP_S


def test_a_list_that_got_lost_is_sent_again() -> None:
    agent = Agent()
    agent.tell(OllamaPolled(ok=True, installed=INSTALLED))
    agent.register()
    agent.tell(CallFailed(call=agent.beat().call, text="cable"))
    assert agent.beat().heartbeat.installed_models == INSTALLED


def test_an_inventory_that_nobody_knows_yet_is_not_hurried() -> None:
    agent = Agent()
    agent.register()
    agent.ok(agent.beat(), send_inventory=True)
    agent.beat()
    assert agent.now == 1000 + INTERVAL_S


def test_what_is_loaded_is_told_at_once_but_not_its_expiry() -> None:
    agent = Agent().serving()
    agent.at(5).tell(OllamaPolled(loaded=LOADED))
    sent = agent.beat()
    assert agent.now == 1005.0
    assert sent.heartbeat.loaded_models == LOADED
    agent.ok(sent)
    later = [LOADED[0] | {"expires_at": "later"}]
    agent.at(1).tell(OllamaPolled(loaded=later))
    sent = agent.beat()
    assert agent.now == 1015.0
    assert sent.heartbeat.loaded_models == later


def test_the_order_of_rows_is_no_change() -> None:
    agent = Agent().serving()
    agent.tell(OllamaPolled(loaded=["b", {"name": "a"}]))
    agent.ok(agent.beat())
    agent.at(1).tell(OllamaPolled(loaded=[{"name": "a"}, "b"]))
    agent.beat()
    assert agent.now == 1000 + GAP_S + INTERVAL_S


def test_a_change_while_a_heartbeat_is_under_way_follows_it() -> None:
    agent = Agent().serving()
    sent = agent.beat()
    agent.at(1).tell(OllamaPolled(loaded=LOADED))
    assert agent.tick() == []
    agent.ok(sent)
    assert agent.beat().heartbeat.loaded_models == LOADED
    assert agent.now == 1011.0


def test_changes_in_a_row_keep_the_gap() -> None:
    agent = Agent().serving()
    agent.at(5).tell(OllamaPolled(ok=True))
    agent.ok(agent.beat())
    agent.tell(OllamaPolled(ok=False))
    agent.ok(agent.beat())
    assert agent.now == 1005 + GAP_S


def test_the_health_of_ollama_is_said_and_sent() -> None:
    agent = Agent()
    assert notes(agent.tell(OllamaPolled(ok=False))) == ["Ollama does not answer"]
    agent.register()
    sent = agent.beat()
    assert not sent.heartbeat.ollama_ok
    agent.ok(sent)
    assert notes(agent.at(2).tell(OllamaPolled(ok=True, version="0.33.0"))) == ["Ollama answers"]
    assert agent.beat().heartbeat.ollama_ok
    assert agent.now == 1002.0


def test_waiting_for_approval() -> None:
    agent = Agent()
    effects = agent.register("pending", code="ABCD-1234", agent_token=None)
    assert agent.link.state is LinkState.PENDING
    (note,) = (effect for effect in effects if isinstance(effect, Note))
    assert note.fields == {"code": "ABCD-1234", "approve_with": "ollama-router agents approve ABCD-1234"}
    assert notes(agent.ok(agent.beat(), status="pending")) == [], "said once"
    effects = agent.ok(agent.beat(), agent_token="t", gateway_credential="c")
    assert Admitted(agent_id="a", agent_token="t", gateway_credential="c") in effects
    assert agent.link.state is LinkState.REGISTERED
    assert any("approved" in said for said in notes(effects))


def test_forgotten_it_registers_again_at_once_and_tells_everything_anew() -> None:
    agent = Agent()
    agent.tell(OllamaPolled(ok=True, installed=INSTALLED))
    agent.serving()
    effects = agent.tell(CallRefused(call=agent.beat().call, status=404, text="unknown agent"))
    assert any("registering again" in said for said in notes(effects))
    before = agent.now
    agent.register("updated")
    sent = agent.beat()
    assert agent.now == before
    assert sent.heartbeat.installed_models == INSTALLED


def test_forgotten_after_a_long_absence_it_still_registers_again_at_once() -> None:
    agent = Agent().serving()
    for _ in range(20):
        agent.tell(CallFailed(call=agent.beat().call, text="it cannot be reached"))
    agent.tell(CallRefused(call=agent.beat().call, status=404, text="unknown agent"))
    before = agent.now
    agent.register("registered")
    assert agent.now == before
    agent.ok(agent.beat())
    assert agent.link.state is LinkState.REGISTERED


@pytest.mark.parametrize("status", [401, 404])
def test_a_coordinator_that_always_forgets_is_not_flooded(status: int) -> None:
    agent = Agent().serving()
    agent.tell(CallRefused(call=agent.beat().call, status=status, text="?"))
    begin = agent.now
    for _ in range(12):
        agent.register()
        agent.tell(CallRefused(call=agent.beat().call, status=status, text="?"))
    assert agent.now - begin >= 100


def test_backoff_doubles_up_to_its_limit_and_half_of_it_is_chance() -> None:
    for dice, share in ((lambda n: 0, 0.5), (lambda n: n - 1, 1.0)):
        agent = Agent(dice=dice)
        pauses = []
        for _ in range(8):
            sent = agent.registering()
            agent.tell(CallFailed(call=sent.call, text="refused"))
            deadline = agent.link.next_deadline()
            assert deadline is not None
            pauses.append(deadline - agent.now)
        assert pauses == pytest.approx([share * min(2**n, BACKOFF_MAX_S) for n in range(8)])


def test_a_restarted_coordinator_hears_a_registered_agent_within_one_interval() -> None:
    agent = Agent(dice=lambda n: n - 1).serving()
    for _ in range(10):
        agent.tell(CallFailed(call=agent.beat().call, text="refused"))
        deadline = agent.link.next_deadline()
        assert deadline is not None
        assert deadline - agent.now <= INTERVAL_S
    assert "the coordinator answers again" in notes(agent.ok(agent.beat()))


def test_the_same_trouble_is_said_once() -> None:
    agent = Agent()
    said = []
    for text in ("refused", "refused", "no route", "refused"):
        said.append(len(notes(agent.tell(CallFailed(call=agent.registering().call, text=text)))))
    assert said == [1, 0, 1, 1]


def test_retry_after_is_obeyed_up_to_a_limit() -> None:
    agent = Agent()
    agent.tell(CallRefused(call=agent.registering().call, status=503, text="full", retry_after_s=60))
    assert agent.link.next_deadline() == 1060
    agent.tell(CallRefused(call=agent.registering().call, status=503, text="full", retry_after_s=1e9))
    assert agent.link.next_deadline() == 1060 + agent_link.RETRY_AFTER_MAX_S


def test_a_refused_registration_is_tried_again_with_its_reason_told() -> None:
    agent = Agent()
    effects = agent.tell(CallRefused(call=agent.registering().call, status=403, text="GPU hardware is required"))
    (note,) = (effect for effect in effects if isinstance(effect, Note))
    assert "403: GPU hardware is required" in note.fields["error"]
    agent.register()
    assert agent.link.state is LinkState.REGISTERED


def test_a_call_without_an_answer_is_lost_and_a_late_answer_ignored() -> None:
    agent = Agent()
    lost = agent.registering()
    assert notes(agent.wait()) == ["registration failed; trying again"]
    assert agent.now == 1000 + CALL_TIMEOUT_S
    late = RegistrationAnswered(call=lost.call, answer=RegistrationAnswer(agent_id="late", status="registered"))
    assert agent.tell(late) == []
    assert agent.link.state is LinkState.UNREGISTERED
    agent.register()
    assert agent.link.agent_id == "a"


def test_a_coordinator_may_ask_for_more_heartbeats_never_for_fewer() -> None:
    for asked, expected in ((3.0, 3.0), (60.0, INTERVAL_S), (0.001, 1.0), (None, INTERVAL_S)):
        agent = Agent()
        agent.register(heartbeat_interval_s=asked)
        agent.ok(agent.beat())
        agent.beat()
        assert agent.now == 1000 + expected


def test_an_interval_that_would_flood_is_a_mistake_of_the_shell() -> None:
    with pytest.raises(LocalError, match="at least"):
        Agent(interval_s=0.5)


# ---------------------------------------------------------------- leaving


def test_it_leaves_once_the_coordinator_knows_and_nothing_is_in_flight() -> None:
    agent = Agent().serving()
    agent.tell(WorkSeen(in_flight=("r",)))
    agent.at(1).tell(StopAsked())
    assert agent.tell(StopAsked()) == []
    assert agent.link.draining
    sent = agent.beat()
    assert agent.now == 1001.0
    assert sent.heartbeat.draining
    assert agent.ok(sent) == []
    agent.at(2).tell(WorkSeen(in_flight=()))
    sent = agent.beat()
    assert agent.now == 1003.0
    assert sent.heartbeat.in_flight == []
    assert agent.ok(sent) == [Left()]
    assert agent.link.next_deadline() is None
    agent.tell(OllamaPolled(ok=False))
    assert agent.at(100).tick() == []


def test_work_that_ends_while_a_heartbeat_is_under_way_is_told_before_leaving() -> None:
    agent = Agent().serving()
    agent.tell(WorkSeen(in_flight=("r",)))
    agent.at(1).tell(StopAsked())
    sent = agent.beat()
    agent.at(1).tell(WorkSeen(in_flight=()))
    assert agent.ok(sent) == []
    assert agent.ok(agent.beat()) == [Left()]


def test_a_stranger_just_leaves() -> None:
    assert Agent().tell(StopAsked()) == [Left()]


def test_leaving_while_the_registration_is_under_way() -> None:
    agent = Agent()
    sent = agent.registering()
    assert agent.tell(StopAsked()) == []
    assert agent.tell(CallFailed(call=sent.call, text="x")) == [Left()]
    agent = Agent()
    sent = agent.registering()
    agent.tell(StopAsked())
    agent.tell(RegistrationAnswered(call=sent.call, answer=RegistrationAnswer(agent_id="a", status="registered")))
    last = agent.beat()
    assert last.heartbeat.draining
    assert agent.ok(last)[-1] == Left()


@pytest.mark.parametrize("answer", ["forgotten", "gone"])
def test_a_coordinator_that_is_gone_holds_nobody_back(answer: str) -> None:
    agent = Agent().serving()
    agent.tell(StopAsked())
    call = agent.beat().call
    event = CallRefused(call=call, status=404, text="?") if answer == "forgotten" else CallFailed(call=call, text="?")
    assert agent.tell(event) == [Left()]


def test_while_requests_are_in_flight_a_leaving_agent_keeps_trying() -> None:
    agent = Agent().serving()
    agent.tell(WorkSeen(in_flight=("r",)))
    agent.tell(StopAsked())
    assert Left() not in agent.tell(CallFailed(call=agent.beat().call, text="?"))
    assert agent.beat().heartbeat.draining


# ---------------------------------------------------------------- a world without mercy


class World(RuleBasedStateMachine):
    """Events of any kind at any time; the invariants of the module's page."""

    @initialize(seed=st.integers(0, 1000))
    def start(self, seed: int) -> None:
        self.agent = Agent(dice=lambda n: (seed * 7919) % n)
        self.open: SendRegistration | SendHeartbeat | None = None
        self.beats: list[tuple[float, Heartbeat]] = []
        self.left = False
        self.known: tuple[Any, Any] = (None, None)

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendRegistration() | SendHeartbeat():
                    assert self.open is None, "A1"
                    assert not self.left
                    self.open = effect
                    if isinstance(effect, SendHeartbeat):
                        messages.decode(messages.encode(effect.heartbeat), Heartbeat)
                        self.beats.append((self.agent.now, effect.heartbeat))
                case Left():
                    assert not self.left
                    self.left = True

    def answer(self, event: Any) -> None:
        self.open = None
        self.take(self.agent.tell(event))

    @rule(seconds=st.sampled_from([0.0, 0.05, 0.3, 2.0, 9.9, 40.0]))
    def time_passes(self, seconds: float) -> None:
        """In steps, as a driver sleeps."""
        end = Instant(self.agent.now + seconds)
        while (deadline := self.agent.link.next_deadline()) is not None and deadline <= end:
            self.agent.now = max(self.agent.now, deadline)
            if self.open is not None:
                self.open = None  # its time is over: the link gives it up
            self.take(self.agent.tick())
        self.agent.now = end

    @rule(
        ok=st.sampled_from([None, True, False]),
        loaded=st.sampled_from([None, [], LOADED, ["x"]]),
        installed=st.sampled_from([None, [], INSTALLED]),
    )
    def polled(self, ok: bool | None, loaded: Any, installed: Any) -> None:
        self.take(self.agent.tell(OllamaPolled(ok=ok, loaded=loaded, installed=installed)))

    @rule(in_flight=st.sampled_from([(), ("r",), ("r", "s")]))
    def worked(self, in_flight: tuple[str, ...]) -> None:
        self.take(self.agent.tell(WorkSeen(in_flight=in_flight)))

    @rule()
    def stopped(self) -> None:
        self.take(self.agent.tell(StopAsked()))

    @precondition(lambda self: self.open is not None)
    @rule(status=st.sampled_from(["ok", "pending"]), ask=st.booleans())
    def accepted(self, status: str, ask: bool) -> None:
        sent = self.open
        assert sent is not None
        if isinstance(sent, SendRegistration):
            word = "registered" if status == "ok" else "pending"
            answer = RegistrationAnswer(agent_id="a", status=word, code="C" if word == "pending" else None)
            self.known = (None, None)
            self.answer(RegistrationAnswered(call=sent.call, answer=answer))
            return
        installed, loaded = sent.heartbeat.installed_models, sent.heartbeat.loaded_models
        self.known = (installed if installed is not None else self.known[0], loaded if loaded is not None else self.known[1])
        if ask:
            self.known = (None, None)
        self.answer(HeartbeatAnswered(call=sent.call, answer=HeartbeatAnswer(status=status, send_inventory=ask)))

    @precondition(lambda self: self.open is not None)
    @rule(status=st.sampled_from([401, 403, 404, 429, 500, 503]), retry_after_s=st.sampled_from([None, 1.0, 20.0]))
    def refused(self, status: int, retry_after_s: float | None) -> None:
        assert self.open is not None
        self.answer(CallRefused(call=self.open.call, status=status, text="no", retry_after_s=retry_after_s))

    @precondition(lambda self: self.open is not None)
    @rule()
    def failed(self) -> None:
        assert self.open is not None
        self.answer(CallFailed(call=self.open.call, text="cable"))

    @rule(call=st.integers(-1, 0))
    def stale(self, call: int) -> None:
        assert self.agent.tell(CallFailed(call=call, text="late")) == []

    @invariant()
    def sequences_grow_and_boots_stay(self) -> None:
        assert [beat.sequence for _, beat in self.beats] == list(range(1, len(self.beats) + 1)), "A2"
        assert {beat.boot for _, beat in self.beats} <= {7}

    @invariant()
    def the_last_heartbeat_told_what_was_not_known(self) -> None:
        if self.open is not None and isinstance(self.open, SendHeartbeat):
            beat = self.open.heartbeat
            for told, known in ((beat.installed_models, self.known[0]), (beat.loaded_models, self.known[1])):
                assert told is None or told != known, "A3"

    @invariant()
    def heartbeats_keep_their_gap(self) -> None:
        times = [at for at, _ in self.beats]
        assert all(later - earlier >= GAP_S - 1e-9 for earlier, later in pairwise(times)), "A5"

    @invariant()
    def it_is_never_stuck(self) -> None:
        assert (self.agent.link.next_deadline() is None) == self.left


World.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestWorld = World.TestCase


@given(st.lists(st.sampled_from(["ok", "fail", "lost"]), min_size=1, max_size=30))
def test_however_calls_end_a_later_heartbeat_says_the_whole_truth(ends: list[str]) -> None:
    """A coordinator that only ever applies what it confirmed knows what the agent knows, once a heartbeat gets through."""
    agent = Agent()
    agent.register()
    coordinator: Any = None
    for number, end in enumerate([*ends, "ok", "ok"]):
        agent.tell(OllamaPolled(loaded=[{"name": f"m{number if number < len(ends) else len(ends)}"}]))
        sent = agent.beat()
        if end == "ok":
            coordinator = sent.heartbeat.loaded_models if sent.heartbeat.loaded_models is not None else coordinator
            agent.ok(sent)
        elif end == "fail":
            agent.tell(CallFailed(call=sent.call, text="x"))
        else:
            agent.wait()
    assert coordinator == [{"name": f"m{len(ends)}"}]
