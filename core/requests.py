"""One live request: what is known of it, what it cost, and what is told about it in the end.

Decides texts, and what an ended request teaches; never where it goes. `core.dispatch` and `core.router` own all of its fields.
"""

import enum
from collections.abc import Mapping
from typing import Final

import msgspec

from core.agents import Agent
from core.errors import RemoteError
from core.events import Attempt, AttemptEnded, Ending, Failure, Record, Refuse, RequestCame, Route, Settled, Usage
from core.health import Verdict
from core.learning import Sample
from core.names import display, normalise
from core.scoring import Ask
from core.structs import mypyc_attr
from core.units import AgentId, Instant, LeaseId, ModelKey, RequestId

BUSY_TEXT: Final = "server busy, please try again.  maximum pending requests exceeded"
"""Ollama's own words (two spaces): clients know them."""

Kind = tuple[ModelKey | None, str, bool, bool, tuple[AgentId, ...], tuple[tuple[AgentId, int], ...]]

_NS_PER_S: Final = 1_000_000_000
_NOTHING_TOLD: Final = Usage()

_WHAT_HAPPENED: Final = {
    Failure.REFUSED: "could not be reached",
    Failure.NOT_TAKEN: "broke the connection before it had the request",
    Failure.DIED: "ended the connection before its answer was complete",
    Failure.EMPTY: "answered with nothing",
    Failure.BLANK: "answered with a blank answer",
    Failure.GARBLED: "answered with something that is not HTTP",
    Failure.VANISHED: "went away before it answered",
    Failure.TIMEOUT: "took longer than the operator allows",
}


class Phase(enum.Enum):
    """Where a request stands."""

    NEW = "new"
    WAITING = "waiting"
    TRYING = "trying"
    """On a node; the client has seen nothing of it."""
    STREAMING = "streaming"
    """The client has seen its first byte: no other node can take it."""
    FREED = "freed"
    """Its node has done with it, and its lease is gone; how it ended is still to be told."""
    ANSWERED = "answered"
    """The shell was told to answer it without a node; it has not said yet that it did."""


_NEW: Final = Phase.NEW
_SUCCESS: Final = Ending.SUCCESS
_Attempt: Final = Attempt  # compiled code looks up by name what it imports of other code, but not what is final here
_Record: Final = Record
_KNOWN_NOWHERE: Final[Mapping[AgentId, int]] = {}


@mypyc_attr(acyclic=True)
class Request:
    """One request from `RequestCame` to `Settled`; `begin` makes it. Never part of a cycle. No struct, for compiled code reads and writes
    attributes of its own classes at once."""

    __slots__ = (
        "agent", "alone", "ask", "at", "attempt", "attempts", "barred", "beside", "busy", "cached", "came", "client", "cold",
        "expected_at", "failed", "first_byte_at", "freed_at", "held", "id", "key", "leaks", "lease_id", "number", "phase", "plan",
        "predicted_ms", "prefixes", "refused_by", "renamed", "resumed", "spent", "started_at", "tried", "unload", "verdict", "victims",
        "waited_s", "waiting_since", "why",
    )  # fmt: skip

    def __init__(self, came: RequestCame, key: ModelKey | None, ask: Ask, number: int, tried: dict[AgentId, int], now: Instant) -> None:
        self.id = came.request_id
        self.unload = came.unload
        self.prefixes = came.prefixes
        """What `came` says, as these are read most often."""
        self.came = came
        self.key = key
        self.ask = ask
        self.at = now
        self.number = number
        """Of arrival, over all requests."""
        self.client = came.client
        self.tried = tried
        """Nodes that are out for this request, and how often they were tried."""
        self.started_at = now
        """When the present or the last attempt began."""
        self.waiting_since = now
        self.phase: Phase = _NEW
        self.agent: Agent | None = None
        """Of the present or the last attempt."""
        self.lease_id: LeaseId | None = None
        self.attempt = 0
        self.first_byte_at: Instant | None = None
        self.freed_at: Instant | None = None
        """When its lease was given back, before its end was told."""
        self.cold = False
        """Whether the present attempt makes the node load the model."""
        self.alone = False
        """Whether no other load ran there when it began."""
        self.busy: dict[AgentId, None] = {}
        """Nodes that said 503; they come back when nobody else is left."""
        self.victims: tuple[ModelKey, ...] = ()
        """Models that the node that was just chosen has to unload for it."""
        self.barred: dict[str, str] = {}
        """Nodes that the last decision passed over, by name, and why."""
        self.renamed: str | None = None
        """The model that it has turned to, in the operator's spelling; None: the one it came for."""
        self.resumed = False
        """Whether its client already has the beginning of an answer, whose node failed, and shall get the rest from another one."""
        self.held = False
        """Whether it was held back to spare a runner with other options."""
        self.beside = 0
        """How many requests for its model were on the node when it was sent there, itself included."""
        self.cached: Mapping[AgentId, int] = _KNOWN_NOWHERE
        """Nodes that were believed to know the beginning of its prompt when it was placed, and how many tokens of it. Never changed, but
        replaced."""
        self.leaks = 0
        """How often it was taken off a node because it seemed to hang on a leaked slot."""
        self.refused_by: tuple[Agent, ...] = ()
        """Nodes that said their model cannot do this."""
        self.spent = 0
        """Attempts that may have cost a node work."""
        self.failed: AttemptEnded | None = None
        self.verdict: Verdict | None = None
        self.attempts: tuple[Attempt, ...] = ()
        self.plan: AgentId | None = None
        """While it waits: the node that it waits for."""
        self.why = ""
        """While it waits: for what."""
        self.expected_at: Instant | None = None
        self.predicted_ms: float | None = None
        self.waited_s = 0.0

    @property
    def kind(self) -> Kind:
        """Requests of one kind have the same nodes to choose from, and cost about the same there."""
        out = tuple(sorted((*self.tried, *self.busy))) if self.tried or self.busy else ()
        knows = tuple(self.cached.items()) if self.cached else ()
        return (self.key, self.ask.options, self.ask.needs_slot, self.ask.capped, out, knows)

    def after(self, ms: float, *, now: Instant) -> Instant:
        """So long after the present attempt began; not later than now."""
        return min(Instant(self.started_at + ms / 1000), now)

    def ended_at(self, settled: Settled, *, now: Instant) -> Instant:
        """When it really ended that is told now."""
        duration_ms = settled.duration_ms
        if duration_ms is not None:
            return max(self.after(duration_ms, now=now), self.first_byte_at or self.started_at)
        return now if self.freed_at is None else self.freed_at

    def end_attempt(self, outcome: str, now: Instant) -> None:
        """Note how the present attempt ended."""
        agent = self.agent
        assert agent is not None, "an attempt without a node"
        self.attempts += (_Attempt(agent.id, agent.name, outcome, (now - self.started_at) * 1000.0),)

    def record(self, ending: Ending, settled: Settled | None, now: Instant) -> Record:
        """What history keeps."""
        agent, came, at, first_byte_at = self.agent, self.came, self.at, self.first_byte_at
        if settled is None:
            settled = Settled(request_id=self.id, ending=ending, message="its end was never reported")
        usage, told_ending = settled.usage, settled.ending
        return _Record(
            self.id,
            came.route,
            came.model,
            self.client,
            None if agent is None else agent.id,
            None if agent is None else agent.name,
            ending,
            settled.message,
            settled.status,
            (now - at) * 1000.0,
            self.waited_s * 1000.0,
            None if first_byte_at is None else (first_byte_at - at) * 1000.0,
            self.predicted_ms,
            usage if not settled.tokens_before else _of_both(settled),
            self.attempts,
            settled.body_bytes,
            settled.chunks,
            None if usage is None or told_ending is not _SUCCESS else self.observed_start_ms(usage, now),
        )

    def observed_start_ms(self, usage: Usage, now: Instant) -> float | None:
        """When its node began to read the prompt, since it came: what `predicted_ms` predicted. None where nobody can tell.

        From the first byte of a stream, or from the end of an answer that may be silent until then; it ended well.
        """
        prompt_ns, came, first_byte_at = usage.prompt_ns, self.came, self.first_byte_at
        if not prompt_ns:
            return None
        if first_byte_at is not None and came.stream and not came.constrained:
            end, worked_ns = first_byte_at, prompt_ns
        else:
            end, worked_ns = now, prompt_ns + usage.eval_ns
        started_ms = (end - self.at) * 1000.0 - worked_ns / 1e6
        return started_ms if started_ms > 0.0 else 0.0

    def sample(self, settled: Settled, *, now: Instant) -> Sample:
        """What the request showed of its node's speed; it ended well there."""
        usage = settled.usage or _NOTHING_TOLD
        service_s = now - self.started_at
        answering_s = now - (self.first_byte_at or self.started_at)
        load_s = usage.load_ns / _NS_PER_S if usage.load_ns else None
        if self.cold and load_s is None and self.first_byte_at is not None and self.first_byte_at < now:
            load_s = self.first_byte_at - self.started_at
        output, told = usage.output_tokens, True
        if self.ask.output_tokens and not output:
            told = self.came.stream and settled.chunks > 1
            output = settled.chunks if told else self.ask.output_tokens
        prefill_s, decode_s = usage.prompt_ns / _NS_PER_S, usage.eval_ns / _NS_PER_S
        if not usage.eval_ns and output and (self.came.stream or not self.cold):
            decode_s = answering_s if self.came.stream and told else service_s
        if not self.ask.output_tokens and not usage.prompt_ns and not self.cold:
            prefill_s = service_s
        return Sample(
            prompt_tokens=0
            if self.agent is not None and self.agent.id in self.cached
            else usage.prompt_tokens,  # what was known was not read: no measure of speed
            output_tokens=output if self.ask.output_tokens else 0,
            output_told=told,
            prefill_s=prefill_s,
            decode_s=decode_s,
            load_s=load_s if self.cold and self.alone else None,
            cold=self.cold,
            service_s=None if self.cold else service_s,
        )


def _of_both(settled: Settled) -> Usage | None:
    """What an answer of two nodes comes to: what the first one said was an answer's, and only for the second one a prompt's."""
    usage, before = settled.usage, settled.tokens_before
    if usage is None:
        return None
    output = usage.output_tokens + before
    return msgspec.structs.replace(usage, prompt_tokens=max(0, usage.prompt_tokens - before), output_tokens=output)


def begin(event: RequestCame, key: ModelKey | None, ask: Ask, number: int, now: Instant) -> Request:
    """A request that has just come."""
    excluded = event.excluded
    tried: dict[AgentId, int] = dict.fromkeys(excluded, 2) if excluded else {}
    return Request(event, key, ask, number, tried, now)


def blank_request() -> Request:
    """One of which nothing is known, to be filled with what was kept of another (`core.snapshot`)."""
    came = RequestCame(request_id=RequestId(""), route=Route.SHOW, model=None)
    return Request(came, None, Ask(None, "", 0, 0, needs_slot=False), 0, {}, Instant(0.0))


def expected_output(route: Route, limit: int | None, mean: int) -> int:
    """How many tokens the answer will have that is asked for in a request to work, given the model's mean."""
    if route.embeds:
        return 0
    return mean if limit is None else min(mean, limit)


def not_found(event: RequestCame, key: ModelKey | None) -> Refuse:
    """No node that is known ever listed the model, or it names none and no node is there to say so: Ollama's own status and text."""
    model = event.model or ""
    status, text = 404, f"model '{model}' not found"
    if key is not None and event.route.embeds:
        text = f'model "{model}" not found, try pulling it first'
    elif key is not None and not event.route.runs_model:
        text = f"model '{_shown(key, model)}' not found"
    elif key is None and (model.strip() or event.route is not Route.GENERATE):
        try:
            normalise(model)
        except RemoteError as error:
            status, text = error.status, str(error)
    return Refuse(request_id=event.request_id, status=status, text=text)


def _shown(key: ModelKey, spelling: str) -> str:
    """The name as Ollama displays it, with its tag, in the letter case that was sent."""
    shown, spelt = display(key), spelling.strip()
    for full in (spelt, f"{spelt}:latest"):
        if full.lower().endswith(shown):
            return full[-len(shown) :]
    return shown


def cloud_off(event: RequestCame) -> Refuse:
    """The name means a model in Ollama's cloud: Ollama's own status and text where the cloud is switched off."""
    what = "remote model is" if event.route.runs_model else "remote model details are"
    return Refuse(request_id=event.request_id, status=403, text=f"ollama cloud is disabled: {what} unavailable")


def gave_up(request: Request) -> Refuse:
    """Nothing is left to try, and no node gave an answer of its own."""
    failed, verdict = request.failed, request.verdict
    if failed is None or verdict is None or request.agent is None:
        text = "every node that could answer was tried already; try again later"
        return Refuse(request_id=request.id, status=502, text=text)
    what = _WHAT_HAPPENED.get(failed.failure, "failed")
    text = f"node {request.agent.name} {what} and no other node is left to try; try again"
    return Refuse(request_id=request.id, status=verdict.refuse_status, text=text)
