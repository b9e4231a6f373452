"""The agent's side of the conversation with the coordinator.

Decides when to register, when to send a heartbeat, and what a heartbeat says. Never knows sockets, JSON, files or how a machine is
measured: what was observed comes in as events, what must be sent goes out as effects, and each call that is sent is answered by
exactly one event that carries its number (or by none: then it is given up after `CALL_TIMEOUT_S`).

           ┌────────── 401, 404: forgotten ──────────┐
           ▼                                         │
    UNREGISTERED ── answer ──► PENDING ── approved ──► REGISTERED        StopAsked: heartbeats say `draining` until nothing is
           │                      (waits for an admin; sends heartbeats)    in flight and the coordinator knows; then `Left`
           └── answer ──────────────────────────────►

Invariants:
A1  At most one call is under way.
A2  `sequence` grows by one with every heartbeat; `boot` never changes.
A3  A model list that the coordinator did not confirm is sent again; one that it confirmed is sent only when it changed or was asked for.
A4  After `tick(now)`, `next_deadline()` is None or later than `now`.
A5  Two heartbeats are at least `GAP_S` apart; while all calls are answered promptly, at most `interval_s`.
"""

import enum
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import msgspec

from core.errors import LocalError
from core.events import Note
from core.messages import Heartbeat, HeartbeatAnswer, Registration, RegistrationAnswer
from core.units import Instant

CALL_TIMEOUT_S: Final = 10.0
"""A call without an answer for so long is lost."""

GAP_S: Final = 0.2
"""Least time between two heartbeats, so that a node in turmoil does not flood its coordinator."""

BACKOFF_FIRST_S: Final = 1.0
BACKOFF_MAX_S: Final = 30.0
RETRY_AFTER_MAX_S: Final = 300.0
"""Longest pause that a coordinator may ask for."""

INTERVAL_MIN_S: Final = 1.0


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """How busy the machine is; the fields of `Heartbeat`."""

    cpu_usage: float = 0.0
    memory_usage: float = 0.0
    gpu_usage: float | None = None
    gpu_memory_usage: float | None = None
    gpu_memory_total_mb: float | None = None
    gpu_memory_used_mb: float | None = None
    gpu_temperature: float | None = None
    gpu_model_name: str | None = None
    gpu_compute_capability: str | None = None
    disk_free_bytes: int | None = None


# ---------------------------------------------------------------- events


class LoadSampled(msgspec.Struct, frozen=True, kw_only=True):
    load: Load


class OllamaPolled(msgspec.Struct, frozen=True, kw_only=True):
    """The local Ollama was asked; only what was asked is set. `ok` None: this says nothing about its health (`/api/ps`)."""

    ok: bool | None = None
    version: str | None = None
    installed: list[Any] | None = None
    loaded: list[Any] | None = None


class WorkSeen(msgspec.Struct, frozen=True, kw_only=True):
    """Ids of the requests inside the gateway. Told before each `tick`, so that a heartbeat is exact."""

    in_flight: tuple[str, ...]
    average_response_time_ms: float | None = None


class RegistrationAnswered(msgspec.Struct, frozen=True, kw_only=True):
    call: int
    answer: RegistrationAnswer


class HeartbeatAnswered(msgspec.Struct, frozen=True, kw_only=True):
    call: int
    answer: HeartbeatAnswer


class CallRefused(msgspec.Struct, frozen=True, kw_only=True):
    """The coordinator answered with an error status."""

    call: int
    status: int
    text: str
    retry_after_s: float | None = None


class CallFailed(msgspec.Struct, frozen=True, kw_only=True):
    """No answer, or one that makes no sense."""

    call: int
    text: str


class StopAsked(msgspec.Struct, frozen=True, kw_only=True):
    """The agent shall leave in order."""


Event: TypeAlias = LoadSampled | OllamaPolled | WorkSeen | RegistrationAnswered | HeartbeatAnswered | CallRefused | CallFailed | StopAsked


# ---------------------------------------------------------------- effects


class SendRegistration(msgspec.Struct, frozen=True, kw_only=True):
    call: int
    registration: Registration


class SendHeartbeat(msgspec.Struct, frozen=True, kw_only=True):
    call: int
    heartbeat: Heartbeat


class Admitted(msgspec.Struct, frozen=True, kw_only=True):
    """Keep what was handed over; None leaves as it is."""

    agent_id: str
    agent_token: str | None
    gateway_credential: str | None


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """The coordinator knows that this agent goes, or need not know."""


Effect: TypeAlias = SendRegistration | SendHeartbeat | Admitted | Left | Note


class LinkState(enum.Enum):
    """What the coordinator thinks of this agent, as far as the agent knows."""

    UNREGISTERED = "unregistered"
    PENDING = "pending"
    REGISTERED = "registered"


class AgentLink:
    """Driven by: what was observed, what the coordinator answered, time. Returns what must now be sent, kept or said."""

    def __init__(self, registration: Registration, *, interval_s: float, dice: Callable[[int], int], now: Instant) -> None:
        """`dice(n)` gives an integer from 0 to n - 1."""
        if interval_s < INTERVAL_MIN_S:
            raise LocalError(f"the heartbeat interval must be at least {INTERVAL_MIN_S} s, not {interval_s}")
        self.state = LinkState.UNREGISTERED
        self.agent_id = ""
        self._registration = registration
        self._interval_s = self._asked_interval_s = interval_s
        self._dice = dice
        self._due: Instant | None = now
        self._sent_at: Instant | None = None
        self._calls = 0
        self._call: int | None = None
        self._call_until: Instant | None = None
        self._sent: Heartbeat | None = None
        self._failures = 0
        self._forgets = 0
        """How often in a row the coordinator said that it does not know this agent."""
        self._code: str | None = None
        self._complaint = ""
        self._sequence = 0
        self._load = Load()
        self._work = WorkSeen(in_flight=())
        self._ok: bool | None = None
        self._version = registration.ollama_version
        self._installed: list[Any] | None = None
        self._loaded: list[Any] | None = None
        self._known_installed: list[Any] | None = None
        self._known_loaded: list[Any] | None = None
        self._draining = False
        self._left = False

    @property
    def draining(self) -> bool:
        return self._draining

    def next_deadline(self) -> Instant | None:
        """When `tick` has something to do; None: never again."""
        return self._call_until if self._call is not None else self._due

    def handle(self, event: Event, *, now: Instant) -> list[Effect]:
        """Take in what happened."""
        match event:
            case LoadSampled(load=load):
                self._load = load
            case OllamaPolled():
                return self._polled(event, now)
            case WorkSeen():
                self._worked(event, now)
            case StopAsked():
                return self._stop(now)
            case RegistrationAnswered() | HeartbeatAnswered() | CallRefused() | CallFailed():
                if event.call == self._call:
                    return self._answered(event, now)
        return []

    def tick(self, *, now: Instant) -> list[Effect]:
        """Send what is due, give up what was not answered."""
        effects: list[Effect] = []
        if self._call is not None and self._call_until is not None and now >= self._call_until:
            lost = CallFailed(call=self._call, text=f"no answer within {CALL_TIMEOUT_S:g} s")
            effects += self._answered(lost, now)
        if self._call is None and self._due is not None and now >= self._due:
            effects.append(self._send(now))
        return effects

    # ------------------------------------------------------------ observations

    def _polled(self, event: OllamaPolled, now: Instant) -> list[Effect]:
        effects: list[Effect] = []
        before = (self._ok, self._version, _signature(self._installed), _signature(self._loaded))
        if event.ok is not None and event.ok != self._ok:
            self._ok = event.ok
            said = "Ollama answers" if event.ok else "Ollama does not answer"
            effects.append(Note(level="info" if event.ok else "warning", event=said, fields={"version": event.version or self._version}))
        self._version = event.version or self._version
        self._installed = self._installed if event.installed is None else event.installed
        self._loaded = self._loaded if event.loaded is None else event.loaded
        if before != (self._ok, self._version, _signature(self._installed), _signature(self._loaded)):
            self._hurry(now)
        return effects

    def _worked(self, event: WorkSeen, now: Instant) -> None:
        """The end of the last request matters to a coordinator that waits for this node to drain."""
        if self._draining and self._work.in_flight and not event.in_flight:
            self._hurry(now)
        self._work = event

    def _stop(self, now: Instant) -> list[Effect]:
        if self._draining:
            return []
        self._draining = True
        if self.state is LinkState.UNREGISTERED and self._call is None:
            return self._leave()
        self._hurry(now)
        return []

    def _hurry(self, now: Instant) -> None:
        """Have the next heartbeat sent at once. While a coordinator does not answer, the pause before the next try stands."""
        if self.state is LinkState.UNREGISTERED or self._failures or self._left:
            return
        soon = now if self._sent_at is None else Instant(max(now, self._sent_at + GAP_S))
        self._due = soon if self._due is None else min(self._due, soon)

    # ------------------------------------------------------------ calls

    def _send(self, now: Instant) -> Effect:
        self._calls += 1
        self._call, self._call_until, self._due = self._calls, Instant(now + CALL_TIMEOUT_S), None
        if self.state is LinkState.UNREGISTERED:
            registration = msgspec.structs.replace(self._registration, ollama_version=self._version)
            return SendRegistration(call=self._calls, registration=registration)
        self._sent_at = now
        self._sequence += 1
        installed = self._installed if self._installed != self._known_installed else None
        loaded = self._loaded if self._loaded != self._known_loaded else None
        self._sent = Heartbeat(
            agent_id=self.agent_id,
            active_requests=len(self._work.in_flight),
            average_response_time_ms=self._work.average_response_time_ms,
            in_flight=list(self._work.in_flight),
            installed_models=installed,
            loaded_models=loaded,
            ollama_ok=bool(self._ok),
            ollama_version=self._version or None,
            slots=self._registration.slots,
            draining=self._draining,
            boot=self._registration.boot,
            sequence=self._sequence,
            **{name: getattr(self._load, name) for name in self._load.__struct_fields__},
        )
        return SendHeartbeat(call=self._calls, heartbeat=self._sent)

    def _answered(self, event: RegistrationAnswered | HeartbeatAnswered | CallRefused | CallFailed, now: Instant) -> list[Effect]:
        changed_meanwhile = self._due
        self._call = self._call_until = self._due = None
        match event:
            case RegistrationAnswered(answer=registered):
                return self._registered(registered, now)
            case HeartbeatAnswered(answer=answer):
                effects = self._confirmed(answer, now)
            case CallRefused(status=401 | 404) if self.state is not LinkState.UNREGISTERED:
                effects = self._forgotten(event, now)
            case CallRefused():
                effects = self._failed(f"{event.status}: {event.text}", event.retry_after_s, now)
            case CallFailed():
                effects = self._failed(event.text, None, now)
        if changed_meanwhile is not None and self._failures == 0 and self._due is not None:
            self._due = min(self._due, changed_meanwhile)
        return effects

    def _registered(self, answer: RegistrationAnswer, now: Instant) -> list[Effect]:
        self.agent_id = answer.agent_id
        self._known_installed = self._known_loaded = None
        asked = answer.heartbeat_interval_s
        self._interval_s = self._asked_interval_s if asked is None else max(INTERVAL_MIN_S, min(self._asked_interval_s, asked))
        self._due = now
        if answer.status == "pending":
            return [self._admitted(answer), *self._pending(answer.code)]
        self.state = LinkState.REGISTERED
        self._code = None
        return [self._admitted(answer), Note(level="info", event="registered with the coordinator", fields={"agent_id": answer.agent_id})]

    def _confirmed(self, answer: HeartbeatAnswer, now: Instant) -> list[Effect]:
        effects: list[Effect] = []
        if self._complaint:
            effects.append(Note(level="info", event="the coordinator answers again"))
        self._failures, self._forgets, self._complaint = 0, 0, ""
        assert self._sent is not None
        assert self._sent_at is not None
        sent, soon = self._sent, Instant(max(now, self._sent_at + GAP_S))
        self._known_installed = self._known_installed if sent.installed_models is None else sent.installed_models
        self._known_loaded = self._known_loaded if sent.loaded_models is None else sent.loaded_models
        self._due = Instant(max(soon, self._sent_at + self._interval_s))
        if answer.agent_token is not None or answer.gateway_credential is not None:
            effects.append(self._admitted(answer))
        if answer.status == "pending":
            effects += self._pending(None)
        elif self.state is LinkState.PENDING:
            self.state, self._code = LinkState.REGISTERED, None
            effects.append(
                Note(level="info", event="approved: the coordinator sends requests from now on", fields={"agent_id": self.agent_id})
            )
        if answer.send_inventory:
            self._known_installed = self._known_loaded = None
            if self._installed is not None or self._loaded is not None:
                self._due = soon
        if sent.draining and not sent.in_flight:
            effects += self._leave()
        return effects

    def _pending(self, code: str | None) -> list[Effect]:
        """An admin must approve this agent; the code is said once."""
        self.state = LinkState.PENDING
        if code is None or code == self._code:
            return []
        self._code = code
        fields = {"code": code, "approve_with": f"ollama-router agents approve {code}"}
        return [Note(level="warning", event="waiting for approval by an admin of the coordinator", fields=fields)]

    def _forgotten(self, event: CallRefused, now: Instant) -> list[Effect]:
        """Register again: at once the first time, with pauses when that does not help."""
        self.state = LinkState.UNREGISTERED
        if self._draining:
            return self._leave()
        self._forgets += 1
        self._failures = self._forgets  # that it was out of reach before is over: it answered
        if self._forgets > 1:
            self._due = Instant(now + self._pause_s())
            return []
        self._due = now
        return [Note(level="info", event="the coordinator does not know this agent; registering again", fields={"answer": event.text})]

    def _failed(self, text: str, retry_after_s: float | None, now: Instant) -> list[Effect]:
        self._failures += 1
        pause_s = self._pause_s()
        if retry_after_s is not None:
            pause_s = max(pause_s, min(retry_after_s, RETRY_AFTER_MAX_S))
        self._due = Instant(now + pause_s)
        if self._draining and (self.state is LinkState.UNREGISTERED or not self._work.in_flight):
            return self._leave()
        if text == self._complaint:
            return []
        self._complaint = text
        what = "registration failed" if self.state is LinkState.UNREGISTERED else "heartbeat failed"
        return [Note(level="warning", event=f"{what}; trying again", fields={"error": text, "next_try_s": round(pause_s, 1)})]

    def _pause_s(self) -> float:
        """Doubles with each failure; half of it is chance, so that a fleet does not come back in step.
        A registered agent keeps its rhythm at least, so that a restarted coordinator hears it within one interval."""
        longest = BACKOFF_MAX_S if self.state is LinkState.UNREGISTERED else min(self._interval_s, BACKOFF_MAX_S)
        pause_ms = round(1000 * min(longest, BACKOFF_FIRST_S * 2.0 ** min(self._failures - 1, 16)))
        return (pause_ms // 2 + self._dice(pause_ms // 2 + 1)) / 1000

    def _admitted(self, answer: RegistrationAnswer | HeartbeatAnswer) -> Admitted:
        return Admitted(agent_id=self.agent_id, agent_token=answer.agent_token, gateway_credential=answer.gateway_credential)

    def _leave(self) -> list[Effect]:
        self._due, self._left = None, True
        return [Left()]


def _signature(rows: list[Any] | None) -> list[Any] | None:
    """What matters at once about models, in any order; the expiry of a loaded one moves with every request and can wait."""
    if rows is None:
        return None
    return sorted(([row.get(field) for field in _AT_ONCE] if isinstance(row, dict) else row for row in rows), key=repr)


_AT_ONCE: Final = ("name", "digest", "size_vram", "context_length")
