"""Work on the models of nodes: downloads, deletions and copies as tasks with states (contract 5).

Decides which task a node works on now, when a failed one is tried again, and what each has come to. Knows no socket and no Ollama: a
shell (or an agent) does the work and says how it went. Tasks are made for one node each; who wants a model on many nodes asks many
times, and is all-or-nothing about it before.

    PENDING ──START──► DOWNLOADING ──DONE──► COMPLETED
       ▲                  │  └──FAIL──► FAILED          (PENDING may FAIL and CANCEL too)
       └──────RETRY───────┘
    PENDING, DOWNLOADING ──CANCEL──► CANCELLED

`downloading` is also what a deletion or a copy in hand is called: contract 5 has no other word.

Invariants: `TRANSITIONS` is the only door; a node has one task in hand at most, and one that was cancelled occupies it until the work has
really stopped (or nothing was heard of it for `LEASE_S`); tasks about one model on one node run in the order they were asked for; what
is late (an older attempt) changes nothing; progress never goes back; a task that ends badly says why.
"""

import enum
import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Final, TypeAlias

import msgspec

from core.errors import IllegalTransition, RemoteError
from core.events import Note
from core.leases import Expiry
from core.names import display, normalise
from core.transfer import TEXT_MAX, Layer, joined, may_repeat
from core.units import NEVER, AgentId, Instant, ModelKey, UnixMs

LEASE_S: Final = 30.0
"""An attempt nobody said anything about for so long is over: its agent, or the shell's task, is gone."""
TRIES_MAX: Final = 6
"""Attempts in a row that brought nothing. One that brought bytes does not count: most of what came is kept."""
PAUSE_FIRST_S: Final = 2.0
PAUSE_MAX_S: Final = 300.0
UNFINISHED_MAX: Final = 10_000
FINISHED_MAX: Final = 10_000
"""Finished tasks that are remembered, the newest; more than there are nodes, so that a fan-out sees all of its own."""
SPEED_OVER_S: Final = 2.0
"""The speed that is shown is a mean that forgets this fast."""


class Kind(enum.Enum):
    """What is to be done to a model on a node."""

    PULL = "pull"
    DELETE = "delete"
    COPY = "copy"


class TaskState(enum.Enum):
    """Where a task stands; the value is its `status`."""

    PENDING = "pending"
    DOWNLOADING = "downloading"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class TaskInput(enum.Enum):
    """What can happen to a task."""

    START = "start"
    DONE = "done"
    RETRY = "retry"
    FAIL = "fail"
    CANCEL = "cancel"


_S = TaskState
_I = TaskInput

TRANSITIONS: Final[Mapping[tuple[TaskState, TaskInput], TaskState]] = {
    (_S.PENDING, _I.START): _S.DOWNLOADING,
    (_S.PENDING, _I.FAIL): _S.FAILED,
    (_S.PENDING, _I.CANCEL): _S.CANCELLED,
    (_S.DOWNLOADING, _I.DONE): _S.COMPLETED,
    (_S.DOWNLOADING, _I.RETRY): _S.PENDING,
    (_S.DOWNLOADING, _I.FAIL): _S.FAILED,
    (_S.DOWNLOADING, _I.CANCEL): _S.CANCELLED,
}
FINISHED: Final = (_S.COMPLETED, _S.FAILED, _S.CANCELLED)


def advance(state: TaskState, given: TaskInput) -> TaskState:
    """The state after `given` happened in `state`.

    Raises:
        IllegalTransition: `TRANSITIONS` has no such step.
    """
    after = TRANSITIONS.get((state, given))
    if after is None:
        raise IllegalTransition(f"a task that is {state.value} cannot be given {given.value!r}")
    return after


class What(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for, on one node. Names as they were spelled; `destination` is a copy's. `origin`: who wants it."""

    kind: Kind
    agent_id: AgentId
    model: str
    destination: str = ""
    insecure: bool = False
    origin: str = "admin"

    @property
    def keys(self) -> tuple[ModelKey, ...]:
        """The models that it concerns."""
        return tuple(normalise(name) for name in (self.model, self.destination) if name)


class TaskView(msgspec.Struct, frozen=True, kw_only=True):
    """A task as it is shown. `progress` 0 to 1; `phase`: the node's last status line."""

    id: str
    kind: Kind
    agent_id: AgentId
    model: str
    destination: str
    origin: str
    status: TaskState
    progress: float
    completed_bytes: int
    total_bytes: int
    download_speed_bps: int | None
    phase: str
    layers: tuple[Layer, ...]
    attempts: int
    created_at: UnixMs
    updated_at: UnixMs
    error: str | None
    next_try_s: float | None
    """Seconds from now until a failed attempt is repeated."""


# ---------------------------------------------------------------- events


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody wants this. `kept`: it goes on when nobody watches; otherwise the asker watches it, and says `WatcherLeft` once."""

    task_id: str
    what: What
    kept: bool
    now_unix: UnixMs


class WatcherLeft(msgspec.Struct, frozen=True, kw_only=True):
    task_id: str
    now_unix: UnixMs


class Cancelled(msgspec.Struct, frozen=True, kw_only=True):
    task_id: str
    why: str
    now_unix: UnixMs


class NodesSeen(msgspec.Struct, frozen=True, kw_only=True):
    """Which nodes there are, and which of them can work now."""

    known: Collection[AgentId]
    ready: Collection[AgentId]
    now_unix: UnixMs


class Progressed(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt goes on. Said at least every `LEASE_S` / 2, also when there is nothing new."""

    task_id: str
    attempt: int
    phase: str = ""
    layers: tuple[Layer, ...] = ()
    now_unix: UnixMs


class AttemptOver(msgspec.Struct, frozen=True, kw_only=True):
    """The work has stopped. `error` None: it is done. `lost`: the connection or the worker went away, so the node said no last word."""

    task_id: str
    attempt: int
    error: str | None = None
    lost: bool = False
    now_unix: UnixMs


class TaskRestored(msgspec.Struct, frozen=True, kw_only=True):
    """What was kept of a task (`Tasks.lasting`) from before the coordinator's start. Only before anything else is asked."""

    task_id: str
    what: What
    status: TaskState
    kept: bool
    progress: float
    error: str | None
    attempts: int
    created_at: UnixMs
    updated_at: UnixMs


Event: TypeAlias = Asked | TaskRestored | WatcherLeft | Cancelled | NodesSeen | Progressed | AttemptOver


# ---------------------------------------------------------------- effects


class Joined(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to `Asked`: the task that does it, an earlier one where there is one."""

    task_id: str
    new: bool


class Begin(msgspec.Struct, frozen=True, kw_only=True):
    """Do it now, and say `AttemptOver` whatever happens."""

    task_id: str
    attempt: int
    what: What


class Abort(msgspec.Struct, frozen=True, kw_only=True):
    """Stop doing it; `AttemptOver` is still to be said."""

    task_id: str
    attempt: int
    agent_id: AgentId


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """The task's state is another one now: tell who watches, and keep it."""

    task_id: str
    status: TaskState


Effect: TypeAlias = Joined | Begin | Abort | Changed | Note


class _Task:
    __slots__ = (
        "attempts",
        "created_at",
        "error",
        "id",
        "kept",
        "keys",
        "layers",
        "measured",
        "not_before",
        "phase",
        "progress",
        "reached",
        "speed",
        "state",
        "tries",
        "updated_at",
        "watchers",
        "what",
    )  # fmt: skip

    def __init__(self, task_id: str, what: What, keys: tuple[ModelKey, ...], *, now: Instant, now_unix: UnixMs) -> None:
        self.id = task_id
        self.what = what
        self.keys = keys
        self.state = _S.PENDING
        self.kept = False
        self.watchers = 0
        self.attempts = 0
        self.tries = 0
        """Attempts in a row that brought nothing."""
        self.reached = 0
        """Bytes that earlier attempts had come to."""
        self.not_before = now
        self.layers: tuple[Layer, ...] = ()
        self.phase = ""
        self.progress = 0.0
        self.measured: tuple[Instant, int] | None = None
        self.speed: float | None = None
        self.error: str | None = None
        self.created_at = self.updated_at = now_unix

    @property
    def completed_bytes(self) -> int:
        return sum(layer.completed for layer in self.layers)

    def take(self, event: Progressed, *, now: Instant) -> None:
        self.layers = joined(self.layers, event.layers)
        self.phase = event.phase or self.phase
        completed, total = self.completed_bytes, sum(layer.total for layer in self.layers)
        if total:
            self.progress = max(self.progress, min(completed / total, 0.99))
        if self.measured is None:
            self.measured = (now, completed)
        elif (passed := now - self.measured[0]) > 0:
            rate, weight = (completed - self.measured[1]) / passed, min(1.0, passed / SPEED_OVER_S)
            self.speed = rate if self.speed is None else self.speed + weight * (rate - self.speed)
            self.measured = (now, completed)

    def view(self, *, now: Instant) -> TaskView:
        working = self.state is _S.DOWNLOADING
        waits = self.state is _S.PENDING and self.attempts and self.not_before > now
        return TaskView(
            id=self.id,
            kind=self.what.kind,
            agent_id=self.what.agent_id,
            model=self.what.model,
            destination=self.what.destination,
            origin=self.what.origin,
            status=self.state,
            progress=round(self.progress, 4),
            completed_bytes=self.completed_bytes,
            total_bytes=sum(layer.total for layer in self.layers),
            download_speed_bps=round(self.speed) if working and self.speed is not None else None,
            phase=self.phase,
            layers=self.layers,
            attempts=self.attempts,
            created_at=self.created_at,
            updated_at=self.updated_at,
            error=self.error,
            next_try_s=round(self.not_before - now, 1) if waits else None,
        )


class Tasks:
    """All tasks of a fleet."""

    def __init__(self) -> None:
        self._tasks: dict[str, _Task] = {}
        self._waiting: dict[AgentId, dict[str, _Task]] = {}
        """Per node what is pending, in the order it was asked for."""
        self._in_hand: dict[AgentId, tuple[_Task, int]] = {}
        """Per node the attempt that occupies it."""
        self._finished: dict[str, None] = {}
        self._leases: Expiry[AgentId] = Expiry(LEASE_S)
        self._ready: Collection[AgentId] = ()
        self._now = Instant(0.0)

    # ------------------------------------------------------------ asking

    def get(self, task_id: str) -> TaskView | None:
        """One task."""
        task = self._tasks.get(task_id)
        return None if task is None else task.view(now=self._now)

    def newest(self, limit: int) -> list[TaskView]:
        """The last `limit` tasks, the last asked first."""
        return [task.view(now=self._now) for task in itertools.islice(reversed(self._tasks.values()), limit)]

    def on(self, agent_id: AgentId) -> Begin | None:
        """The attempt that a node has in hand and should go on with."""
        held = self._in_hand.get(agent_id)
        if held is None or held[0].state is not _S.DOWNLOADING:
            return None
        return Begin(task_id=held[0].id, attempt=held[1], what=held[0].what)

    def busy(self) -> set[tuple[AgentId, ModelKey]]:
        """Models on nodes about which something is to be done, or is being done."""
        at_work = [task for waiting in self._waiting.values() for task in waiting.values()]
        at_work += [task for task, _ in self._in_hand.values()]
        return {(task.what.agent_id, key) for task in at_work for key in task.keys}

    @property
    def unfinished(self) -> int:
        """Tasks that are not over."""
        return len(self._tasks) - len(self._finished)

    # ------------------------------------------------------------ the three inputs

    def handle(self, event: Event, *, now: Instant) -> list[Effect]:
        """`event` happened. Returns what must be done about it.

        Raises:
            RemoteError: of `Asked`: 400 a name that is none, 503 there are too many tasks already.
        """
        self._now = max(self._now, now)
        effects: list[Effect] = []
        match event:
            case Asked():
                self._asked(event, effects)
            case TaskRestored():
                self._restored(event, effects)
            case WatcherLeft(task_id=task_id):
                self._watcher_left(task_id, event.now_unix, effects)
            case Cancelled(task_id=task_id, why=why):
                if (task := self._tasks.get(task_id)) is not None:
                    self._cancel(task, why, event.now_unix, effects)
            case NodesSeen():
                self._nodes_seen(event, effects)
            case Progressed():
                self._progressed(event)
            case AttemptOver():
                self._attempt_over(event, effects)
        return effects

    def next_deadline(self) -> Instant | None:
        """When `tick` must be called, if no event comes before."""
        pauses = [
            task.not_before
            for agent_id, waiting in self._waiting.items()
            if agent_id in self._ready and agent_id not in self._in_hand
            for task in waiting.values()
            if task.not_before > self._now
        ]
        earliest = min([self._leases.earliest, *pauses])
        return None if earliest == NEVER else earliest

    def tick(self, *, now: Instant, now_unix: UnixMs) -> list[Effect]:
        """Time passed: give up what is not heard of any more, begin what has waited long enough."""
        self._now = max(self._now, now)
        effects: list[Effect] = []
        for agent_id in self._leases.due(now=self._now):
            task, attempt = self._in_hand[agent_id]
            lost = f"nothing was heard of it for {LEASE_S:g} s"
            self._attempt_over(AttemptOver(task_id=task.id, attempt=attempt, error=lost, lost=True, now_unix=now_unix), effects)
        for agent_id in list(self._waiting):
            self._begin(agent_id, now_unix, effects)
        return effects

    # ------------------------------------------------------------ inside

    def _asked(self, event: Asked, effects: list[Effect]) -> None:
        what, keys = event.what, event.what.keys
        waiting = self._waiting.get(what.agent_id, {})
        before = [task for task in waiting.values() if not set(keys).isdisjoint(task.keys)]
        held = self._in_hand.get(what.agent_id)
        if held is not None and held[0].state is _S.DOWNLOADING and not before and not set(keys).isdisjoint(held[0].keys):
            before.append(held[0])
        if before and (last := before[-1]).keys == keys and (last.what.kind, last.what.insecure) == (what.kind, what.insecure):
            self._join(last, event)
            effects.append(Joined(task_id=last.id, new=False))
            return
        if self.unfinished >= UNFINISHED_MAX:
            raise RemoteError(f"there are {UNFINISHED_MAX} unfinished tasks already; cancel some, or wait", status=503)
        task = self._tasks[event.task_id] = _Task(event.task_id, what, keys, now=self._now, now_unix=event.now_unix)
        self._join(task, event)
        self._waiting.setdefault(what.agent_id, {})[task.id] = task
        effects += [Joined(task_id=task.id, new=True), Changed(task_id=task.id, status=task.state)]
        self._begin(what.agent_id, event.now_unix, effects)

    def _restored(self, event: TaskRestored, effects: list[Effect]) -> None:
        """A task of a former run. What was not finished is begun anew: most of a download's bytes are on the node."""
        if event.task_id in self._tasks:
            return
        task = self._tasks[event.task_id] = _Task(event.task_id, event.what, event.what.keys, now=self._now, now_unix=event.created_at)
        task.kept, task.progress, task.error, task.attempts = event.kept, event.progress, event.error, event.attempts
        task.updated_at = event.updated_at
        if event.status in FINISHED:
            task.state = event.status
            self._finished[task.id] = None
            return
        self._waiting.setdefault(event.what.agent_id, {})[task.id] = task
        if not event.kept:  # who watched it is gone
            self._cancel(task, "the coordinator started anew, and nobody waits for it any more", event.updated_at, effects)

    def lasting(self, task_id: str) -> TaskRestored | None:
        """What is to be kept of a task; None: it is forgotten."""
        task = self._tasks.get(task_id)
        if task is None:
            return None
        return TaskRestored(
            task_id=task.id, what=task.what, status=task.state, kept=task.kept, progress=round(task.progress, 4), error=task.error,
            attempts=task.attempts, created_at=task.created_at, updated_at=task.updated_at,
        )  # fmt: skip

    def _join(self, task: _Task, event: Asked) -> None:
        task.kept = task.kept or event.kept
        task.watchers += not event.kept

    def _watcher_left(self, task_id: str, now_unix: UnixMs, effects: list[Effect]) -> None:
        task = self._tasks.get(task_id)
        if task is None:
            return
        task.watchers -= 1
        if task.watchers <= 0 and not task.kept:
            self._cancel(task, "the client that asked for it left", now_unix, effects)

    def _cancel(self, task: _Task, why: str, now_unix: UnixMs, effects: list[Effect]) -> None:
        if task.state in FINISHED:
            return
        if task.state is _S.DOWNLOADING:
            effects.append(Abort(task_id=task.id, attempt=task.attempts, agent_id=task.what.agent_id))
        self._step(task, _I.CANCEL, why, now_unix, effects)

    def _nodes_seen(self, event: NodesSeen, effects: list[Effect]) -> None:
        self._ready = frozenset(event.ready)
        for agent_id in [agent_id for agent_id in self._waiting if agent_id not in event.known]:
            for task in list(self._waiting[agent_id].values()):
                self._step(task, _I.FAIL, "the node was removed from the fleet", event.now_unix, effects)
        for agent_id in list(self._waiting):
            self._begin(agent_id, event.now_unix, effects)

    def _progressed(self, event: Progressed) -> None:
        task = self._tasks.get(event.task_id)
        if task is None or task.attempts != event.attempt or self._in_hand.get(task.what.agent_id) != (task, event.attempt):
            return
        self._leases.set(task.what.agent_id, now=self._now)
        if task.state is _S.DOWNLOADING:
            task.take(event, now=self._now)
            task.updated_at = event.now_unix

    def _attempt_over(self, event: AttemptOver, effects: list[Effect]) -> None:
        task = self._tasks.get(event.task_id)
        agent_id = AgentId("") if task is None else task.what.agent_id
        if task is None or self._in_hand.get(agent_id) != (task, event.attempt):
            return
        del self._in_hand[agent_id]
        self._leases.discard(agent_id)
        if task.state is _S.DOWNLOADING:
            if event.error is None:
                task.progress = 1.0
                self._step(task, _I.DONE, None, event.now_unix, effects)
            elif self._goes_on(task, event):
                self._step(task, _I.RETRY, event.error, event.now_unix, effects)
            else:
                self._step(task, _I.FAIL, event.error, event.now_unix, effects)
        self._drop_oldest()
        self._begin(agent_id, event.now_unix, effects)

    def _goes_on(self, task: _Task, event: AttemptOver) -> bool:
        """Whether the failed attempt is repeated; if so, not before when."""
        brought = task.completed_bytes > task.reached
        task.reached = task.completed_bytes
        task.tries = 1 if brought else task.tries + 1
        pulls = task.what.kind is Kind.PULL
        if task.tries >= TRIES_MAX or not (event.lost or (pulls and may_repeat(event.error or ""))):
            return False
        task.not_before = Instant(self._now + min(PAUSE_MAX_S, PAUSE_FIRST_S * 2.0 ** (task.tries - 1)))
        return True

    def _begin(self, agent_id: AgentId, now_unix: UnixMs, effects: list[Effect]) -> None:
        """Give the node its next task, if it is ready, idle and has one that may begin."""
        if agent_id in self._in_hand or agent_id not in self._ready:
            return
        passed: set[ModelKey] = set()
        for task in self._waiting.get(agent_id, {}).values():
            if task.not_before <= self._now and passed.isdisjoint(task.keys):
                task.attempts += 1
                task.measured = task.speed = None
                self._in_hand[agent_id] = (task, task.attempts)
                self._leases.set(agent_id, now=self._now)
                self._step(task, _I.START, task.error, now_unix, effects)
                effects.append(Begin(task_id=task.id, attempt=task.attempts, what=task.what))
                return
            passed.update(task.keys)

    def _step(self, task: _Task, given: TaskInput, why: str | None, now_unix: UnixMs, effects: list[Effect]) -> None:
        """The only place where a task changes its state."""
        task.state = advance(task.state, given)
        task.error = None if given is _I.DONE or why is None else why[:TEXT_MAX]
        task.updated_at = now_unix
        waiting = self._waiting.setdefault(task.what.agent_id, {})
        waiting.pop(task.id, None)
        if task.state is _S.PENDING:  # it was there before those that were asked since
            self._waiting[task.what.agent_id] = {task.id: task, **waiting}
        elif not waiting:
            del self._waiting[task.what.agent_id]
        if task.state in FINISHED:
            self._finished[task.id] = None
        effects.append(Changed(task_id=task.id, status=task.state))
        fields = {"task_id": task.id, "agent_id": task.what.agent_id, "model": display(task.keys[0]), "status": task.state.value}
        level = "warning" if task.state is _S.FAILED or given is _I.RETRY else "info"
        why_field = {"why": task.error} if task.error else {}
        effects.append(Note(level=level, event=f"task: {task.what.kind.value}", fields={**fields, **why_field}))
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Forget the finished tasks that are too many, but none whose work has not stopped yet or that somebody watches."""
        if len(self._finished) > FINISHED_MAX:
            busy = {task.id for task, _ in self._in_hand.values()}
            idle = (task_id for task_id in self._finished if task_id not in busy and self._tasks[task_id].watchers <= 0)
            for task_id in list(itertools.islice(idle, len(self._finished) - FINISHED_MAX)):
                del self._finished[task_id]
                del self._tasks[task_id]


def failures(tasks: Iterable[TaskView], names: Mapping[AgentId, str]) -> str:
    """What went wrong where, as one sentence; "" when nothing did."""
    wrong = [task for task in tasks if task.status in (_S.FAILED, _S.CANCELLED)]
    return "; ".join(f"{names.get(task.agent_id, task.agent_id)}: {task.error or task.status.value}" for task in wrong)
