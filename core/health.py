"""Whose fault a failure was, what may be tried next, and who is passed over for a while.

Decides by counts, never by windows: an Ollama node sees too few requests for rates. Knows nothing of queues, scores or the inventory.

* `classify` is pure: one failed attempt in, whose fault and what another try costs out. A fault of the client, a busy node and a cut
  that the router ordered count against nobody.
* A 503 is load: that model on that node is passed over for a pause that doubles at each repeat, and used again after it.
* `eject_after` failures in a row of a model on a node eject the two together; in a row over several models, or when no request can even
  be delivered, the node at large. Each ejection lasts longer. Then one real request tries alone: its first byte lifts the ejection, its
  success clears the count, its failure ejects anew.

Invariants: a client's cancel changes no count; a node is never ejected for 503; an entry exists only for what failed and has not
succeeded since.
"""

import enum
from typing import Final

import msgspec

from core.config import RouterConfig
from core.events import Failure
from core.leases import Wake
from core.parts import Part
from core.structs import Fact
from core.units import NEVER, AgentId, Instant, ModelKey, RequestId


class Fault(enum.Enum):
    """Against whom a failure counts."""

    NOBODY = "nobody"
    CLIENT = "client"
    SATURATION = "saturation"
    MODEL = "model on node"
    NODE = "node"


class Cost(enum.Enum):
    """What another try elsewhere costs."""

    FREE = "free"
    """The node did no work: each eligible node may be tried once."""
    BUDGETED = "budgeted"
    """It may have: `retries_budgeted` more tries."""
    FINAL = "final"
    """Nobody else would do better: the client gets this answer."""


class Verdict(Fact, frozen=True):
    """What a failed attempt means."""

    fault: Fault
    cost: Cost
    own_answer: bool = False
    """Whether the node's answer may be given to the client when nothing is left to try."""
    refuse_status: int = 502
    """The router's own status when there is no such answer."""
    lacks_model: bool = False
    """The node says it does not hold the model."""
    cannot: bool = False
    """The node says that the model cannot do what is asked; another's success would prove it wrong."""
    lost_memory: bool = False
    """All of the node's loaded models are gone."""


CLIENT_TEXTS: Final = (
    "must be of type",
    "invalid format:",
    "XML syntax error",
    "failed to parse JSON",
    "invalid tool call arguments",
    "image input is not supported",
    "exceeded 8 MB limit",
    "exceeds the context length",
    "exceeds the available context size",
    "exceed_context_size_error",
)
"""Parts of 500s that any node would answer: the request's own doing, or the model's with this request (ollama-failures: rule 5)."""

MEMORY_TEXTS: Final = ("out of memory", "out-of-memory", "insufficient memory")

_MODEL: Final = Verdict(fault=Fault.MODEL, cost=Cost.BUDGETED)
_FINAL: Final = Verdict(fault=Fault.CLIENT, cost=Cost.FINAL, own_answer=True)

_VERDICTS: Final = {
    Failure.REFUSED: Verdict(fault=Fault.NODE, cost=Cost.FREE),
    Failure.NOT_TAKEN: Verdict(fault=Fault.NODE, cost=Cost.FREE),
    Failure.DIED: _MODEL,
    Failure.EMPTY: _MODEL,
    Failure.BLANK: _MODEL,
    Failure.GARBLED: _MODEL,
    Failure.VANISHED: Verdict(fault=Fault.NOBODY, cost=Cost.BUDGETED, refuse_status=503),
    Failure.TIMEOUT: Verdict(fault=Fault.MODEL, cost=Cost.BUDGETED, refuse_status=504),
}


def classify(failure: Failure, *, status: int = 0, text: str = "", repeat_guard: bool = False) -> Verdict:
    """What the failed attempt means."""
    if failure is Failure.ANSWERED:
        return _classify_answer(status, text)
    if failure is Failure.INCOMPLETE:
        if repeat_guard:  # the model repeats itself, and would anywhere
            return Verdict(fault=Fault.NOBODY, cost=Cost.FINAL, own_answer=True)
        return Verdict(fault=Fault.MODEL, cost=Cost.BUDGETED, own_answer=True)
    return _VERDICTS[failure]


def _classify_answer(status: int, text: str) -> Verdict:
    if status == 503:
        return Verdict(fault=Fault.SATURATION, cost=Cost.FREE, own_answer=True)
    if status == 404 and "not found" in text:
        return Verdict(fault=Fault.NOBODY, cost=Cost.FREE, own_answer=True, lacks_model=True)
    if status == 400 and "does not support" in text:
        return Verdict(fault=Fault.NOBODY, cost=Cost.BUDGETED, own_answer=True, cannot=True)
    if status == 499:  # a cancel that was not the client's: it would have been settled, not reported
        return Verdict(fault=Fault.NOBODY, cost=Cost.BUDGETED, own_answer=True)
    if status < 500 or status == 501 or any(part in text for part in CLIENT_TEXTS):
        return _FINAL
    return Verdict(fault=Fault.MODEL, cost=Cost.BUDGETED, own_answer=True, lost_memory=any(part in text for part in MEMORY_TEXTS))


class Ejection(msgspec.Struct):
    """A node (`key` None), or one model on it, that is passed over."""

    agent_id: AgentId
    key: ModelKey | None
    until: Instant
    length_s: float
    why: str
    trial: RequestId | None = None
    """The one request that tries whether it is well again."""


class _Pause(msgspec.Struct):
    until: Instant
    length_s: float


class _Streak(msgspec.Struct):
    """Failures of a node without a success between."""

    undelivered: int = 0
    failed: int = 0
    models: dict[ModelKey | None, int] = {}


class _Past(msgspec.Struct):
    count: int
    until: Instant


class Health(Part):
    """Of all nodes. `key` is None for requests that name no model."""

    __slots__ = ("_config", "_ejected", "_past", "_pauses", "_streaks", "earliest", "quiet", "spotless", "wake")

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._streaks: dict[AgentId, _Streak] = {}
        self._pauses: dict[AgentId, dict[ModelKey | None, _Pause]] = {}
        self._ejected: dict[AgentId, dict[ModelKey | None, Ejection]] = {}
        self._past: dict[AgentId, dict[ModelKey | None, _Past]] = {}
        self.earliest = NEVER
        """When the next pause or ejection runs out."""
        self.wake = Wake()
        """Lowered by each new one."""
        self.quiet = True
        """Whether nobody is passed over. An attribute, as the next, for they are read with every request."""
        self.spotless = True
        """Whether moreover nothing is held against anybody: a success changes nothing."""

    def _sum_up(self) -> None:
        """Something was added or taken away."""
        self.quiet = not self._pauses and not self._ejected
        self.spotless = self.quiet and not self._streaks

    def paused_until(self, agent_id: AgentId, key: ModelKey | None, *, now: Instant) -> Instant | None:
        """Until when this model is passed over there for a 503; None when it is not."""
        pause = self._pauses.get(agent_id, {}).get(key)
        return pause.until if pause is not None and pause.until > now else None

    def ejection(self, agent_id: AgentId, key: ModelKey | None, *, now: Instant) -> Ejection | None:
        """Why a new request may not go there: the ejection that bars it; None when none does."""
        ejected = self._ejected.get(agent_id)
        if ejected:
            for ejection in (ejected.get(None), ejected.get(key)):
                if ejection is not None and (ejection.until > now or ejection.trial is not None):
                    return ejection
        return None

    def ejections(self, agent_id: AgentId) -> list[Ejection]:
        """All of a node's, for showing."""
        return list(self._ejected.get(agent_id, {}).values())

    def began(self, agent_id: AgentId, key: ModelKey | None, request_id: RequestId) -> None:
        """A request was sent there; where an ejection has run out it is the trial."""
        ejected = self._ejected.get(agent_id)
        if ejected:
            for ejection in (ejected.get(None), ejected.get(key)):
                if ejection is not None and ejection.trial is None:
                    ejection.trial = request_id

    def ended(self, agent_id: AgentId, request_id: RequestId) -> None:
        """An attempt ended without telling anything about the node (cancelled, the client's fault): the next one is the trial."""
        for ejection in self._ejected.get(agent_id, {}).values():
            if ejection.trial == request_id:
                ejection.trial = None

    def delivered(self, agent_id: AgentId, key: ModelKey | None, request_id: RequestId) -> None:
        """The first byte of a good answer: the node is not busy, and a trial went well. Failures stay counted until a success."""
        self._unpause(agent_id, key)
        ejected = self._ejected.get(agent_id)
        if ejected:
            for barred in [barred for barred, ejection in ejected.items() if ejection.trial == request_id]:
                del ejected[barred]
            if not ejected:
                del self._ejected[agent_id]
        self._sum_up()

    def succeeded(self, agent_id: AgentId, key: ModelKey | None) -> None:
        """A request ended well there."""
        if self.spotless:
            return
        self._unpause(agent_id, key)
        self._streaks.pop(agent_id, None)
        ejected = self._ejected.get(agent_id)
        if ejected:
            ejected.pop(key, None)
            ejected.pop(None, None)
            if not ejected:
                del self._ejected[agent_id]
        self._sum_up()

    def failed(
        self, agent_id: AgentId, key: ModelKey | None, fault: Fault, why: str, *, request_id: RequestId, now: Instant
    ) -> list[Ejection]:
        """A failed attempt. Returns the ejections that it brought about."""
        self.ended(agent_id, request_id)
        if fault is Fault.SATURATION:
            self._pause(agent_id, key, now=now)
        if fault not in (Fault.MODEL, Fault.NODE):
            return []
        streak = self._streaks.setdefault(agent_id, _Streak())
        new = []
        if fault is Fault.NODE:
            streak.undelivered += 1
        else:
            streak.undelivered = 0
            streak.failed += 1
            streak.models[key] = streak.models.get(key, 0) + 1
            if key is not None and (streak.models[key] >= self._config.eject_after or self._is_ejected(agent_id, key)):
                new.append(self._eject(agent_id, key, why, now=now))
        at_large = streak.failed >= self._config.eject_after and len(streak.models) > 1
        if streak.undelivered >= self._config.eject_after or at_large or self._is_ejected(agent_id, None):
            new.append(self._eject(agent_id, None, why, now=now))
        self._sum_up()
        return [ejection for ejection in new if ejection is not None]

    def pause(self, agent_id: AgentId, key: ModelKey | None, *, now: Instant) -> None:
        """Pass this model over there for the shortest pause."""
        self._pause(agent_id, key, now=now)

    def forget(self, agent_id: AgentId) -> None:
        """The node is gone, or a new run of it began: nothing is held against it."""
        for table in (self._streaks, self._pauses, self._ejected, self._past):
            table.pop(agent_id, None)
        self._sum_up()

    def next_deadline(self) -> Instant | None:
        """When the next pause or ejection runs out."""
        return None if self.earliest == NEVER else self.earliest

    def woken(self, *, now: Instant) -> bool:
        """Whether a pause or an ejection has run out by `now`; it is reported once."""
        if self.earliest > now:
            return False
        ends = [pause.until for pauses in self._pauses.values() for pause in pauses.values()]
        ends += [ejection.until for ejected in self._ejected.values() for ejection in ejected.values()]
        self.earliest = min((until for until in ends if until > now), default=NEVER)
        return True

    def _wake_at(self, until: Instant) -> None:
        self.earliest = min(self.earliest, until)
        self.wake.at = min(self.wake.at, until)

    def _pause(self, agent_id: AgentId, key: ModelKey | None, *, now: Instant) -> None:
        pauses = self._pauses.setdefault(agent_id, {})
        pause = pauses.get(key)
        if pause is not None and pause.until > now:
            return  # one that was sent before the pause began
        length_s = self._config.busy_pause_s if pause is None else min(pause.length_s * 2, self._config.busy_pause_max_s)
        pauses[key] = _Pause(Instant(now + length_s), length_s)
        self._wake_at(pauses[key].until)
        self._sum_up()

    def _unpause(self, agent_id: AgentId, key: ModelKey | None) -> None:
        pauses = self._pauses.get(agent_id)
        if pauses is not None:
            pauses.pop(key, None)
            if not pauses:
                del self._pauses[agent_id]

    def _is_ejected(self, agent_id: AgentId, key: ModelKey | None) -> bool:
        return key in self._ejected.get(agent_id, {})

    def _eject(self, agent_id: AgentId, key: ModelKey | None, why: str, *, now: Instant) -> Ejection | None:
        ejected = self._ejected.setdefault(agent_id, {})
        current = ejected.get(key)
        if current is not None and current.until > now:
            return None  # one that was sent before, or to the least bad
        pasts = self._past.setdefault(agent_id, {})
        past = pasts.get(key)
        if past is None or now - past.until > self._config.eject_max_s:
            past = _Past(0, now)
        length_s = min(self._config.eject_s * (past.count + 1), self._config.eject_max_s)
        until = Instant(now + length_s)
        pasts[key] = _Past(past.count + 1, until)
        ejected[key] = Ejection(agent_id, key, until, length_s, why)
        self._wake_at(until)
        return ejected[key]
