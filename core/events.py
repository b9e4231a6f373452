"""What can happen to the coordinator, and what it wants done about it.

A vocabulary, no decisions. Shells turn the world into events and effects into deeds; `core.router` is the only one in between.
An event carries facts, never opinions; an effect is complete in itself: a shell needs no other state to carry it out.
Ids and wall times are made by shells (the core has neither dice nor calendar). None of these structs can be part of a cycle, so the
garbage collector need not track them (`gc=False`): they are made by the thousands per second.

The life of a request (both edges):

    RequestCame ──► Forward | Wait | Refuse
    Wait        ──► later Forward | Refuse, at the request's desk
    Forward     ──► the shell tries the node: FirstByte once (an answer that was held whole needs none), then Settled; or, before any
                    byte reached the client,
                    AttemptEnded ──► Forward (another node) | Wait | PassOn | Refuse
    Freed       ──► an edge that sees no bytes (nginx) saw the answer end: the lease is released, Settled follows when the node has told
    Cut         ──► at any time: this attempt's node is gone; stop waiting for it, and say AttemptEnded (or end in-band)
    Settled     exactly once per RequestCame, whatever happened
"""

import enum
from typing import Any, TypeAlias

import msgspec

from core.messages import AgentSettings, GpuDevice, Heartbeat, Metrics, Registration
from core.units import AgentId, Instant, LeaseId, RequestId, UnixMs


class _Word(enum.Enum):
    """An enumeration that is looked up often: members are singletons, so identity is all that a hash needs."""

    __hash__ = object.__hash__


class Protocol(_Word):
    """Whose manners a route has: error envelopes and stream ends go by it."""

    NATIVE = "native"
    OPENAI = "openai"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"


class Route(_Word):
    """A route that is forwarded to a node. The value is the `request_type` of the record."""

    CHAT = "chat"
    GENERATE = "generate"
    EMBED = "embed"
    EMBEDDINGS = "embeddings"
    SHOW = "show"
    V1_CHAT = "v1_chat"
    V1_COMPLETIONS = "v1_completions"
    V1_EMBEDDINGS = "v1_embeddings"
    V1_MODEL = "v1_model"
    V1_RESPONSES = "v1_responses"
    V1_MESSAGES = "v1_messages"
    V1_TRANSCRIPTIONS = "v1_transcriptions"

    protocol: Protocol
    runs_model: bool
    """Whether a node needs the model in memory for it."""
    embeds: bool
    """Whether its answer is vectors, not tokens."""
    streams_by_default: bool
    """What an absent `stream` means."""

    def __init__(self, value: str) -> None:
        own = {"v1_responses": Protocol.RESPONSES, "v1_messages": Protocol.ANTHROPIC}
        self.protocol = own.get(value, Protocol.OPENAI if value.startswith("v1_") else Protocol.NATIVE)
        self.embeds = value in ("embed", "embeddings", "v1_embeddings")
        self.runs_model = value not in ("show", "v1_model")
        self.streams_by_default = value in ("chat", "generate")


class Upstream(msgspec.Struct, frozen=True, kw_only=True, gc=False, cache_hash=True):
    """Where a node is reached. `gateway`: an agent's own port, which wants its credential; else a bare Ollama."""

    host: str
    port: int
    gateway: bool = False
    base_path: str = ""
    tls: bool = False


class Usage(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """What a node said about its work in the final chunk; durations in nanoseconds, 0 when not told."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    total_ns: int = 0
    load_ns: int = 0
    prompt_ns: int = 0
    eval_ns: int = 0


class Lease(msgspec.Struct, frozen=True, gc=False):
    """The right to have one request in flight on one node."""

    id: LeaseId
    request_id: RequestId
    agent_id: AgentId
    agent_name: str
    upstream: Upstream
    attempt: int
    """1 for the first try of a request."""


# ---------------------------------------------------------------- events: requests


class RequestCame(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A client's request was read whole.

    `model` is the client's spelling; None when the body has none that can be read: any ready node will do, its error is Ollama's own.
    """

    request_id: RequestId
    route: Route
    model: str | None
    client: str = ""
    """Fairness key: an API key's id, a trusted proxy's user, else the address."""
    stream: bool = False
    runner_options: str = ""
    """The options that make Ollama reload (`num_ctx`, ...), canonical text; "" when none is set."""
    input_tokens: int = 0
    """Estimate: prompt bytes / 4."""
    prefixes: tuple[int, ...] = ()
    """Checksums of how the prompt begins (`core.affinity`)."""
    output_limit: int | None = None
    """`num_predict` / `max_tokens`, when given and not negative."""
    constrained: bool = False
    """Tools or a format: may rightly be silent until the end."""
    load_only: bool = False
    """Empty prompt: Ollama only loads (or unloads) the model."""
    unload: bool = False
    """`load_only` with `keep_alive` 0."""
    others: tuple[str, ...] = ()
    """Models that will do as well, in this order, when no ready node holds `model` (an alias was asked for)."""
    excluded: tuple[AgentId, ...] = ()
    """Nodes that were tried already, by an edge that asks anew (nginx)."""


class FirstByte(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The first body byte of a good answer is here: from now on the client sees this attempt. `Settled` as a success implies it."""

    request_id: RequestId


class Failure(_Word):
    """How an attempt ended before the client saw a byte of it."""

    REFUSED = "refused"
    """No connection could be made: refused, unreachable, or none within the dial limit."""
    NOT_TAKEN = "not_taken"
    """The connection broke before the request was sent whole: the node cannot have worked on it."""
    DIED = "died"
    """End or reset after the request was taken, no complete answer."""
    ANSWERED = "answered"
    """The node answered with a status of 400 or more: `status` and `text` say which."""
    EMPTY = "empty"
    """Status 200 and not one body byte."""
    BLANK = "blank"
    """A whole answer made of nothing (year 0001, no model)."""
    INCOMPLETE = "incomplete"
    """A whole answer that says `"done":false` itself."""
    GARBLED = "garbled"
    """Not HTTP, or framing that cannot be."""
    VANISHED = "vanished"
    """The router said `Cut`."""
    TIMEOUT = "timeout"
    """A first-token or stall limit that the operator set has passed."""


class AttemptEnded(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The current attempt failed before the client saw a byte (but see `resume`). Releases its lease."""

    request_id: RequestId
    failure: Failure
    status: int = 0
    text: str = ""
    """The node's error text, or the failure in words (4 KB at most)."""
    resume: bool = False
    """The client has seen bytes of it, and would see the rest of another node's answer as this one's. Once per request; the next
    FirstByte is that of the rest."""
    thinks_unasked: bool = False
    """With `resume`: the request does not say that the model shall not think."""
    repeat_guard: bool = False
    """INCOMPLETE that ends in the repeat guard's equal tokens: the node is healthy."""


class Ending(_Word):
    """How a request ended for its client; the value is the record's `status`."""

    SUCCESS = "success"
    ERROR = "error"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


class Settled(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The request is over; its lease, if any lives, is released."""

    request_id: RequestId
    ending: Ending
    status: int = 0
    """HTTP status the client got; 0 when none was sent."""
    message: str = ""
    node_fault: Failure | None = None
    """Set when a cut after the first byte was the node's doing."""
    usage: Usage | None = None
    """Of the last node alone."""
    tokens_before: int = 0
    """Output tokens that came from another node, before this one went on from them."""
    body_bytes: int = 0
    chunks: int = 0
    ttft_ms: float | None = None
    """From the beginning of the attempt to its first body byte, where nobody said FirstByte: who applies this saw no bytes."""
    duration_ms: float | None = None
    """From the beginning of the attempt to its end, where this is said later than it was."""


class Freed(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The attempt is over, as an edge saw that sees no bytes; how it ended is told by `Settled`, soon. Releases its lease."""

    request_id: RequestId
    delivered: bool = False
    """The client got bytes of a good answer."""
    ttft_ms: float | None = None
    """As in `Settled`."""


class Pulse(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Every `pulse_s` from a shell: the requests it still works on (their leases are renewed), the nodes it got bytes from since."""

    requests: tuple[RequestId, ...] = ()
    heard: tuple[AgentId, ...] = ()


# ---------------------------------------------------------------- events: nodes


class AgentRegistered(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An agent introduces itself. `new_id` and `code` are used only if it is new or strange."""

    registration: Registration
    new_id: AgentId
    code: str
    trusted: bool
    """Loopback, or a valid join token; otherwise it waits for approval."""
    gpu_exempt: bool
    """`ROUTER_REQUIRE_GPU` does not apply."""
    upstream: Upstream
    """Checked by the shell's access rules."""
    now_unix: UnixMs
    known_as: AgentId | None = None
    """The agent whose own token came with it. Without it, an untrusted registration is a stranger's, whatever name it gives."""


class HeartbeatCame(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    heartbeat: Heartbeat
    now_unix: UnixMs


class MetricsCame(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    agent_id: AgentId
    metrics: Metrics
    now_unix: UnixMs


class BackendAdded(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A node without an agent; it is polled."""

    agent_id: AgentId
    name: str
    upstream: Upstream
    slots: int | None = None
    simulated: bool = False
    now_unix: UnixMs


class AgentRestored(msgspec.Struct, frozen=True, kw_only=True):
    """What was kept of an agent (`core.restoring`) from before the coordinator's start. Fields as in `core.agents.Agent`."""

    agent_id: AgentId
    upstream: Upstream
    registered_at: UnixMs
    last_seen: UnixMs | None = None
    machine_name: str
    ip_address: str
    ollama_version: str
    ollama_port: int
    agent_api_port: int | None = None
    agent_version: str | None = None
    instance_id: str | None = None
    agentless: bool = False
    simulated: bool = False
    ollama_managed: bool = False
    gpu_available: bool = False
    gpu_devices: list[GpuDevice] = []
    gpu_count: int | None = None
    gpu_model: str | None = None
    boot: int = 0
    custom_name: str | None = None
    tags: list[str] = []
    notes: str | None = None
    weight: float | None = None
    max_concurrent: int | None = None
    held: bool = False
    """An admin took it out."""
    slots: int | None = None
    """As it told them; None: it never did."""
    installed: list[Any] = []
    """Ollama's rows of the models it held."""


class NodePolled(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An agentless node answered. Only the parts that were asked for are set; rows are Ollama's own."""

    agent_id: AgentId
    version: str | None = None
    installed: list[Any] | None = None
    loaded: list[Any] | None = None
    alive: bool = True
    """False for what came from `/api/ps`, which is never a sign of life or death."""
    now_unix: UnixMs
    asked_at: Instant | None = None
    """When the question was sent: what the router saw itself after that is newer than this answer."""


class NodeSilent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A full check of an agentless node failed. `refused`: no connection could be made, so it is offline at once."""

    agent_id: AgentId
    refused: bool


class SettingsChanged(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    agent_id: AgentId
    settings: AgentSettings


class Command(enum.Enum):
    """What an admin, or the agent itself when it stops, may order."""

    DRAIN = "drain"
    CONNECT = "connect"
    DISCONNECT = "disconnect"
    DISCONNECT_NOW = "disconnect_now"
    DELETE = "delete"
    APPROVE = "approve"


class AgentCommanded(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    agent_id: AgentId
    command: Command


# ---------------------------------------------------------------- effects: requests


class Forward(msgspec.Struct, frozen=True, gc=False):
    """Send the request to this node now. Made by position on the hot path, as its lease is."""

    request_id: RequestId
    lease: Lease
    unload: tuple[str, ...] = ()
    """Models that this node is to unload first: without that it would choose itself which one goes, or wait for a busy one."""
    model: str | None = None
    """The model to name to the node: the request has turned from the one it came for to one of its `others`."""
    raise_context: int | None = None
    """The context length to put into the request in place of its own `num_ctx`, so that the node need not load the model anew."""


class Wait(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Hold the request: it stands in the queue, `position` from 1. A Forward or Refuse will come."""

    request_id: RequestId
    position: int
    why: str


class Refuse(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Answer with the router's own error, in the route's envelope."""

    request_id: RequestId
    status: int
    text: str
    retry_after_s: int | None = None


class PassOn(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Nobody is left to try (or nobody else would do better): give the client the last node's own answer as it came."""

    request_id: RequestId
    retry_after_s: int | None = None


class Cut(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The node of this request's attempt is gone, or was ordered away: give the attempt up."""

    request_id: RequestId
    reason: str
    unload: tuple[str, ...] = ()
    """Models that the node is to unload once this attempt's connection is closed, before `AttemptEnded` is said."""
    again: bool = False
    """The node is not to blame for good: it may be asked again."""


# ---------------------------------------------------------------- effects: nodes and the rest


class Registered(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Answer to `AgentRegistered`. `status`: `registered` (new), `updated`, `pending`."""

    agent_id: AgentId
    status: str
    code: str | None = None


class Accepted(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Answer to a heartbeat, metrics, settings or command that was taken."""

    agent_id: AgentId
    status: str = "ok"
    send_inventory: bool = False


class Declined(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Answer to an event about an agent that cannot be taken: unknown id (404), no GPU (403), conflict (409), full (503)."""

    status: int
    text: str


class Probe(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Ask this agentless node everything, now."""

    agent_id: AgentId


class Note(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A line for the log. `event` is a constant phrase, what varies is in `fields`."""

    level: str
    event: str
    fields: dict[str, Any] = {}


class Count(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Add to a counter of `/metrics`."""

    name: str
    labels: dict[str, str] = {}
    by: int = 1


class Attempt(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One try of a recorded request."""

    agent_id: AgentId
    agent_name: str
    outcome: str
    duration_ms: float


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What history keeps of a request, bodies apart (contract 6). Made by position on the hot path: so many keywords cost 2 µs."""

    request_id: RequestId
    route: Route
    model: str | None
    client: str
    agent_id: AgentId | None
    agent_name: str | None
    ending: Ending
    message: str
    status: int
    duration_ms: float
    queue_ms: float
    ttft_ms: float | None
    predicted_start_ms: float | None
    usage: Usage | None
    attempts: tuple[Attempt, ...]
    body_bytes: int
    chunks: int
    observed_start_ms: float | None = None
    """Since it came, until its node began to read the prompt; None where the node did not tell its times."""


Event: TypeAlias = (
    RequestCame | FirstByte | AttemptEnded | Freed | Settled | Pulse
    | AgentRegistered | HeartbeatCame | MetricsCame | BackendAdded | AgentRestored | NodePolled | NodeSilent | SettingsChanged
    | AgentCommanded
)  # fmt: skip

RequestEffect: TypeAlias = Forward | Wait | Refuse | PassOn | Cut
Effect: TypeAlias = RequestEffect | Registered | Accepted | Declined | Probe | Note | Count | Record
