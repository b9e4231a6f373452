"""The timing of one Ollama: which request waits for what, which model loads and which must go, and when each token is due.

A pure machine in virtual time (`handle`, `tick`, `next_deadline`), used by the world simulator and, through a socket, by the
simulated Ollama. It never knows what a token says, who the client is, or what time it really is.

What it keeps of the real one:
* Two waiting rooms. A request whose model is ready waits in that runner's own queue, without limit. One that needs a load or a
  reload waits in the pending queue (`max_queue`, then `Refused`), which one loop serves in order, one load at a time.
* Room is made by evicting, idle runners first, in order of (keep-alive, weights); a busy victim is marked by taking its keep-alive
  away, and the loop waits until some runner goes. A request with a keep-alive of its own undoes the mark.
* A keep-alive stays on the runner until another request sets one. Its timer runs while nothing is in flight.
* The client whose request started a load takes the load with it when it leaves. A client that leaves during prefill frees its slot
  when the running batch is through; at any other time at once.
* A stream whose client leaves in mid-answer may leak its slot: the runner has one less until it is unloaded, and nothing shows it.
* Prefill goes before decoding on one runner: the streams beside it get one token for each batch that is read. Runners that are busy
  at once share the machine, evenly and, where `contention` says so, with a loss.
* Waiting for a slot is first come first served, but for requests that come close together: those may overtake each other, if the
  machine is given dice.

Invariants: a runner never works for more requests than it has slots; a runner that works is never evicted; what happens
between two calls happens at its own instant, however late the call comes.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Mapping
from enum import Enum
from typing import Final

from core.simulation.node_words import (
    Came,
    Change,
    Finished,
    Held,
    Left,
    LoadedModel,
    LoadFailed,
    ModelTiming,
    NodeEffect,
    NodeEvent,
    NodeTiming,
    Produced,
    Refused,
    Resumed,
    RunnerChanged,
    Timing,
    UnloadAsked,
    effective_context,
    needed_bytes,
)
from core.simulation.prng import Prng, Ratio
from core.units import Instant

__all__ = [
    "Came",
    "Change",
    "Finished",
    "Held",
    "Left",
    "LoadFailed",
    "LoadedModel",
    "ModelTiming",
    "NodeEffect",
    "NodeEvent",
    "NodeTiming",
    "Produced",
    "Refused",
    "Resumed",
    "RunnerChanged",
    "SimulatedNode",
    "Timing",
    "UnloadAsked",
]

ROOM_SHARE: Final = 0.8
"""A model is loaded beside others only if it fits into this share of the free memory."""
ABORT_S: Final = 0.21
"""From the client's leaving to the end of the load that it had started."""
SHUFFLE_S: Final = 0.06
"""Requests that come for one runner within this time may overtake each other: each pings the runner before it queues for a slot."""
OVERTAKES: Final = Ratio(1, 3)
"""How often a request gets before the one that it finds in front of it, so recent."""
CACHED_CONVERSATIONS: Final = 64
"""Conversations whose prompt a runner still knows; the longest unused goes first."""
NEAR: Final = 1e-3
"""Tokens: sums of fractions come this close to a whole number without reaching it."""


class _Phase(Enum):
    WAITING = 0  # in the pending queue, or for a slot
    PREFILL = 1
    DECODE = 2
    HELD = 3
    DRAIN = 4  # the client left, the batch runs on


class _Stage(Enum):
    """What the pending loop is doing."""

    READY = 0
    EVICTING = 1  # until some runner goes
    RECOVERING = 2  # until the memory is free
    LOADING = 3
    ABORTING = 4


class _Work:
    __slots__ = (
        "batches", "cached", "came", "done", "event", "first", "goal", "gone", "obtained", "phase", "prompt", "reported", "runner",
        "started", "todo",
    )  # fmt: skip

    def __init__(self, event: Came, came: Instant) -> None:
        self.event = event
        self.came = self.obtained = self.started = self.first = came
        self.goal = event.output_tokens if event.hold_at is None else min(event.output_tokens, event.hold_at)
        self.phase = _Phase.WAITING
        self.runner: _Runner | None = None
        self.prompt = 0.0  # tokens to be read at the start, what any prompt costs included
        self.todo = 0.0  # of these, still to be read
        self.batches = 0  # read whole, as far as the streams beside it have noticed
        self.done = 0.0  # tokens produced
        self.reported = 0
        self.cached = 0
        self.gone = False


class _Runner:
    __slots__ = (
        "cache", "context", "expires_at", "in_flight", "keep_alive_s", "model", "name", "num_ctx",
        "options", "prefill", "rate", "size_bytes", "slots", "streams", "waiting", "working",
    )  # fmt: skip

    def __init__(self, work: _Work, model: ModelTiming, node: NodeTiming) -> None:
        event = work.event
        self.name = event.model
        self.model = model
        self.num_ctx = event.num_ctx
        self.options = event.options
        self.slots = 1 if model.single else node.slots
        self.context = effective_context(event.num_ctx, model, node)
        self.size_bytes = needed_bytes(model, self.context, self.slots)
        self.keep_alive_s = node.keep_alive_s
        self.expires_at: Instant | None = None
        self.in_flight = 0
        self.waiting: deque[_Work] = deque()
        self.working: list[_Work] = []
        self.cache: OrderedDict[str, int] = OrderedDict()
        self.prefill: _Work | None = None  # whose prompt is being read
        self.streams = 0  # that decode, or wait for the next batch of that prompt
        self.rate = 0.0  # tokens per second: of that prompt, or of each stream


class SimulatedNode:
    """One Ollama. `models` is read at each request and may be changed between calls. Without `dice` nobody overtakes anybody."""

    def __init__(self, timing: NodeTiming, models: Mapping[str, ModelTiming], *, now: Instant, dice: Prng | None = None) -> None:
        self.timing = timing
        self._dice = dice
        self.models = models
        self._runners: dict[str, _Runner] = {}
        self._works: dict[str, _Work] = {}
        self._pending: deque[_Work] = deque()
        self._current: _Work | None = None
        self._stage = _Stage.READY
        self._stage_until = Instant(math.inf)
        self._free_at = now  # when the memory of what was unloaded is free
        self._loading: _Runner | None = None
        self._settled = now
        self._next: Instant | None = None
        self._out: list[NodeEffect] = []

    # -- the machine

    def handle(self, event: NodeEvent, *, now: Instant) -> list[NodeEffect]:
        """What follows from `event`, and from whatever was due before it."""
        self._advance(now)
        match event:
            case Came():
                self._came(event, now)
            case Left():
                if (work := self._works.pop(event.request_id, None)) is not None:
                    self._left(work, now)
            case Resumed():
                if (work := self._works.get(event.request_id)) is not None:
                    self._resumed(work, now)
            case UnloadAsked():
                if (model := self.models.get(event.model)) is not None and (runner := self._runners.get(model.weights)) is not None:
                    runner.keep_alive_s = 0.0
                    runner.expires_at = now
                    if not runner.in_flight:
                        self._unload(runner, "asked", now)
        return self._answer(now)

    def tick(self, *, now: Instant) -> list[NodeEffect]:
        """What was due by now."""
        self._advance(now)
        return self._answer(now)

    def next_deadline(self) -> Instant | None:
        """When `tick` has something to do, if nothing happens before."""
        return self._next

    def loaded(self, *, now: Instant) -> list[LoadedModel]:
        """The runners that are ready, last to expire first, as `/api/ps` lists them."""
        rows = [
            LoadedModel(
                model=runner.name,
                size_bytes=runner.size_bytes,
                in_memory_bytes=min(runner.size_bytes, self.timing.memory_bytes),
                context=runner.context,
                expires_at=Instant(now + runner.keep_alive_s) if runner.expires_at is None else runner.expires_at,
                in_flight=runner.in_flight,
            )
            for runner in self._runners.values()
        ]
        return sorted(rows, key=lambda row: -row.expires_at)

    @property
    def in_flight(self) -> int:
        """Requests that are neither finished nor gone."""
        return len(self._works)

    @property
    def pending(self) -> int:
        """Requests in the pending queue, the one that is worked on left out."""
        return len(self._pending)

    # -- time

    def _advance(self, now: Instant) -> None:
        while self._next is not None and self._next <= now:
            at = max(self._next, self._settled)
            self._settle(at)
            self._fire(at)
            self._plan(at)
        self._settle(now)

    def _answer(self, now: Instant) -> list[NodeEffect]:
        self._plan(now)
        while self._next is not None and self._next <= now:  # what takes no time happens in this call
            self._fire(now)
            self._plan(now)
        out, self._out = self._out, []
        return out

    def _settle(self, to: Instant) -> None:
        """Credit all work with the time since it was last credited."""
        elapsed = to - self._settled
        if elapsed <= 0:
            return
        self._settled = to
        for runner in self._runners.values():
            if runner.prefill is not None:
                runner.prefill.todo -= elapsed * runner.rate
            elif runner.rate:
                for work in runner.working:
                    if work.phase is _Phase.DECODE:
                        work.done += elapsed * runner.rate

    def _plan(self, now: Instant) -> None:
        """Set every runner's rate and the next instant at which something is due."""
        due = self._stage_until
        busy = 0
        for runner in self._runners.values():
            runner.prefill = None
            runner.rate = 0.0
            streams = 0
            for work in runner.working:
                if work.phase is _Phase.DECODE:
                    streams += 1
                elif runner.prefill is None and work.phase is not _Phase.HELD:
                    runner.prefill = work
            runner.streams = streams
            if runner.prefill is not None:
                runner.rate = runner.model.prefill_tokens_s
                busy += 1
            elif streams:
                runner.rate = runner.model.decode_tokens_s / (1 + self.timing.batch_slope * (streams - 1))
                busy += 1
            elif not runner.in_flight and runner.expires_at is not None:
                due = min(due, runner.expires_at)
        share = busy * (1 + self.timing.contention * (busy - 1)) if busy > 1 else 1.0
        for runner in self._runners.values():
            if runner.rate:
                runner.rate /= share
                due = min(due, Instant(now + self._tokens_left(runner) / runner.rate))
        self._next = None if due == math.inf else due

    def _tokens_left(self, runner: _Runner) -> float:
        """Tokens until the runner has something to report."""
        prefill = runner.prefill
        if prefill is not None:
            if not runner.streams:
                return max(0.0, prefill.todo)
            read = prefill.prompt - prefill.todo
            return max(0.0, min(prefill.todo, (self._batches(read) + 1) * self.timing.batch_tokens - read))
        return max(
            0.0,
            min(
                (work.reported + 1 if work.event.paced else work.goal) - work.done for work in runner.working if work.phase is _Phase.DECODE
            ),
        )

    def _batches(self, read: float) -> int:
        """Whole batches in so many tokens of a prompt."""
        return int((read + NEAR) / self.timing.batch_tokens)

    def _fire(self, at: Instant) -> None:
        for runner in list(self._runners.values()):
            if runner.prefill is not None:
                if runner.prefill.todo <= NEAR:
                    self._prompt_read(runner, runner.prefill, at)
                elif runner.streams:
                    self._batch_read(runner, runner.prefill, at)
            elif runner.rate:
                for work in list(runner.working):
                    if work.phase is _Phase.DECODE:
                        self._report(runner, work, at)
            elif not runner.in_flight and runner.expires_at is not None and runner.expires_at <= at:
                self._unload(runner, "expired", at)
        if self._stage_until <= at:
            self._stage_over(at)

    # -- a request's way

    def _came(self, event: Came, now: Instant) -> None:
        work = _Work(event, now)
        model = self.models[event.model]
        runner = self._runners.get(model.weights)
        if runner is not None and self._fits(work, runner):
            self._works[event.request_id] = work
            self._obtain(work, runner, now)
        elif self._current is not None and len(self._pending) >= self.timing.max_queue:
            self._out.append(Refused(event.request_id))
        else:
            self._works[event.request_id] = work
            self._pending.append(work)
            if self._stage is _Stage.READY:
                self._serve_pending(now)

    def _fits(self, work: _Work, runner: _Runner) -> bool:
        event = work.event
        if event.options != runner.options:
            return False
        return event.num_ctx == runner.num_ctx or effective_context(event.num_ctx, runner.model, self.timing) == runner.context

    def _obtain(self, work: _Work, runner: _Runner, now: Instant) -> None:
        work.runner = runner
        work.obtained = work.started = work.first = now
        runner.in_flight += 1
        keep_alive_s = work.event.keep_alive_s
        if keep_alive_s is not None:
            runner.keep_alive_s = math.inf if keep_alive_s < 0 else keep_alive_s
        if not work.event.prompt_tokens and not work.event.output_tokens:
            self._finish(work, now)
        elif len(runner.working) < runner.slots:
            self._start(work, runner, now)
        else:
            place = len(runner.waiting)
            if self._dice is not None:
                while place and runner.waiting[place - 1].obtained > now - SHUFFLE_S and self._dice.chance(OVERTAKES):
                    place -= 1
            runner.waiting.insert(place, work)

    def _start(self, work: _Work, runner: _Runner, now: Instant) -> None:
        work.started = work.first = now
        if self.timing.prompt_cache and work.event.conversation:
            known = runner.cache.get(work.event.conversation, 0)
            if work.event.shared_tokens is not None:
                known = min(known, work.event.shared_tokens)
            work.cached = max(0, min(known, work.event.prompt_tokens - 1))
        work.prompt = work.todo = work.event.prompt_tokens - work.cached + runner.model.prompt_base_s * runner.model.prefill_tokens_s
        work.phase = _Phase.PREFILL
        runner.working.append(work)

    def _prompt_read(self, runner: _Runner, work: _Work, at: Instant) -> None:
        """The first token comes with the end of the prompt."""
        if work.phase is _Phase.DRAIN:
            self._free_slot(work, runner, at)
            return
        work.first = at
        work.phase = _Phase.DECODE
        work.done = float(min(1, work.goal))
        self._report(runner, work, at)

    def _batch_read(self, runner: _Runner, prefill: _Work, at: Instant) -> None:
        """The streams beside a prompt get their next token with the end of its batch."""
        batches = self._batches(prefill.prompt - prefill.todo)
        if batches > prefill.batches:
            prefill.batches = batches
            for work in list(runner.working):
                if work.phase is _Phase.DECODE:
                    work.done += 1
                    self._report(runner, work, at)

    def _report(self, runner: _Runner, work: _Work, at: Instant) -> None:
        tokens = min(int(work.done + NEAR), work.goal)
        if tokens > work.reported and (work.event.paced or not work.reported):
            self._out.append(Produced(work.event.request_id, tokens))
            work.reported = tokens
        if tokens < work.goal:
            return
        work.done = float(work.goal)
        if work.goal < work.event.output_tokens:
            work.phase = _Phase.HELD
            self._out.append(Held(work.event.request_id))
            return
        self._finish(work, at)  # first: who takes the slot may share the prompt
        self._free_slot(work, runner, at)

    def _resumed(self, work: _Work, now: Instant) -> None:
        work.goal = work.event.output_tokens
        if work.phase is _Phase.HELD:
            work.phase = _Phase.DECODE
            work.done = max(work.done, 1.0)

    def _finish(self, work: _Work, at: Instant) -> None:
        event = work.event
        runner = work.runner
        assert runner is not None
        del self._works[event.request_id]
        if self.timing.prompt_cache and event.conversation:
            runner.cache[event.conversation] = event.prompt_tokens + event.output_tokens
            runner.cache.move_to_end(event.conversation)
            if len(runner.cache) > CACHED_CONVERSATIONS:
                runner.cache.popitem(last=False)
        timing = Timing(
            came=work.came,
            obtained=work.obtained,
            started=work.started,
            first=work.first,
            finished=at,
            prompt_tokens=event.prompt_tokens,
            cached_tokens=work.cached,
            output_tokens=event.output_tokens,
        )
        self._out.append(Finished(event.request_id, timing))
        self._let_go(runner, at)

    def _left(self, work: _Work, now: Instant) -> None:
        runner = work.runner
        if runner is None:  # still in the pending queue, or worked on by its loop
            work.gone = True
            if work is self._current and self._stage is _Stage.LOADING:
                self._enter(_Stage.ABORTING, Instant(now + ABORT_S))
            return
        if work.phase is _Phase.WAITING:
            runner.waiting.remove(work)
        elif work is runner.prefill:
            read = work.prompt - work.todo
            batch = self.timing.batch_tokens
            work.todo = min(work.todo, math.ceil((read + NEAR) / batch) * batch - read)
            work.phase = _Phase.DRAIN
        else:
            runner.slots -= work.event.leaks
            self._free_slot(work, runner, now)
        self._let_go(runner, now)

    def _free_slot(self, work: _Work, runner: _Runner, at: Instant) -> None:
        runner.working.remove(work)
        if runner.waiting and len(runner.working) < runner.slots:
            self._start(runner.waiting.popleft(), runner, at)

    def _let_go(self, runner: _Runner, at: Instant) -> None:
        runner.in_flight -= 1
        if runner.in_flight:
            return
        if runner.keep_alive_s == 0:
            self._unload(runner, "evicted" if self._stage is _Stage.EVICTING else "expired", at)
        else:
            runner.expires_at = Instant(at + runner.keep_alive_s)

    # -- the pending loop

    def _enter(self, stage: _Stage, until: Instant) -> None:
        self._stage = stage
        self._stage_until = until

    def _serve_pending(self, at: Instant) -> None:
        """Go on with the request in work, then with the next ones, until something takes time."""
        self._enter(_Stage.READY, Instant(math.inf))
        while True:
            if self._current is None or self._current.gone:
                if not self._pending:
                    self._current = None
                    return
                self._current = self._pending.popleft()
                continue
            work = self._current
            model = self.models.get(work.event.model)
            if model is None:  # deleted while the request waited
                self._fail(work, f"model '{work.event.model}' not found")
                continue
            runner = self._runners.get(model.weights)
            if runner is not None and self._fits(work, runner):
                self._current = None
                self._obtain(work, runner, at)
                continue
            if at < self._free_at:
                self._enter(_Stage.RECOVERING, self._free_at)
                return
            victim, why = (runner, "reload") if runner is not None else (self._victim(work, model), "evicted")
            if victim is None:
                self._load(work, model, at)
                return
            if victim.in_flight:
                victim.keep_alive_s = 0.0
                self._enter(_Stage.EVICTING, Instant(math.inf))
                return
            self._unload(victim, why, at)

    def _victim(self, work: _Work, model: ModelTiming) -> _Runner | None:
        """Whom to unload for `model`: nobody if it fits, or if nothing is loaded at all."""
        if not self._runners:
            return None
        context = effective_context(work.event.num_ctx, model, self.timing)
        needed = needed_bytes(model, context, 1 if model.single else self.timing.slots)
        free = self.timing.memory_bytes - sum(runner.size_bytes for runner in self._runners.values())
        if len(self._runners) < self.timing.max_loaded and needed <= ROOM_SHARE * free:
            return None
        order = sorted(self._runners.values(), key=lambda runner: (runner.keep_alive_s, runner.model.weights))
        return next((runner for runner in order if not runner.in_flight), order[0])

    def _load(self, work: _Work, model: ModelTiming, at: Instant) -> None:
        self._loading = _Runner(work, model, self.timing)
        self._out.append(RunnerChanged(model=work.event.model, change=Change.LOADING, why=work.event.request_id, at=at))
        self._enter(_Stage.LOADING, Instant(at + self.timing.load_s(model)))

    def _stage_over(self, at: Instant) -> None:
        runner, self._loading = self._loading, None
        if self._stage in (_Stage.LOADING, _Stage.ABORTING):
            work = self._current
            assert work is not None
            assert runner is not None
            change = Change.ABORTED if self._stage is _Stage.ABORTING else Change.FAILED if work.event.load_error else Change.LOADED
            self._out.append(RunnerChanged(model=runner.name, change=change, why=work.event.request_id, at=at))
            if change is Change.FAILED:
                self._fail(work, work.event.load_error)
            elif change is Change.LOADED:
                self._runners[runner.model.weights] = runner
                if self.timing.regroups:
                    self._pending = deque(sorted(self._pending, key=lambda other: other.event.model != runner.name))
        self._serve_pending(at)

    def _fail(self, work: _Work, text: str) -> None:
        self._works.pop(work.event.request_id, None)
        self._current = None
        self._out.append(LoadFailed(work.event.request_id, text))

    def _unload(self, runner: _Runner, why: str, at: Instant) -> None:
        del self._runners[runner.model.weights]
        self._free_at = Instant(at + self.timing.unload_s)
        self._out.append(RunnerChanged(model=runner.name, change=Change.UNLOADED, why=why, at=at))
        if self._stage is _Stage.EVICTING:
            self._enter(_Stage.RECOVERING, self._free_at)
