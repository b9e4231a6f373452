"""What coordinator and agent say to each other: one struct per message, one decoder, one encoder.

Decides what a well-formed message is, never what to do about it. The seed's fields keep the seed's names; all that contract 3 adds
is optional, so an older agent is understood. Invariant: `decode(any bytes, T)` is a `T` or a `RemoteError`, nothing else.
"""

import re
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec

from core.errors import RemoteError
from core.transfer import Layer

PROTOCOL_VERSION = 1

ENDINGS_MAX = 1000
"""Reports in one message of endings: a millisecond's work to read."""

COUNT_MAX = 1 << 53
"""What JSON's users can count to exactly."""

ENDING_TEXT_MAX = 4096
"""Characters of an ending's message."""

Amount: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=COUNT_MAX)]
Milliseconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=COUNT_MAX)]

T = TypeVar("T")


class GpuDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of GPU in a machine. `memory` is bytes of one device, when known."""

    model: str
    count: int = 1
    memory: int | None = None


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /api/agents`. `boot` only grows; with `instance_id` it names one run of one agent."""

    machine_name: str
    ip_address: str
    ollama_version: str
    ollama_port: int
    gpu_available: bool
    gpu_devices: list[GpuDevice] = []
    agent_api_port: int | None = None
    """Where the gateway listens; None: no gateway, the node is reached at `ip_address:ollama_port`."""
    agent_version: str | None = None
    slots: int | None = None
    """`OLLAMA_NUM_PARALLEL`, when the agent knows it."""
    instance_id: str | None = None
    boot: int = 0
    gpu_count: int | None = None
    gpu_model: str | None = None
    simulated: bool = False
    ollama_managed: bool = False
    """The agent installed this Ollama itself, so the default rule of placement may give it a model."""
    protocol: int = PROTOCOL_VERSION


class RegistrationAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """201 `registered`, 200 `updated`, 202 `pending` (with the `code` that an admin approves)."""

    agent_id: str
    status: str
    agent_token: str | None = None
    gateway_credential: str | None = None
    """What the coordinator will show to this agent's gateway."""
    code: str | None = None
    auto_distributed_model: str | None = None
    download_task_id: str | None = None
    heartbeat_interval_s: float | None = None


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /api/health`. Percentages 0-100. Rows of models are Ollama's own, from `/api/tags` and `/api/ps`."""

    agent_id: str
    cpu_usage: float
    memory_usage: float
    active_requests: int = 0
    gpu_usage: float | None = None
    gpu_memory_usage: float | None = None
    gpu_memory_total_mb: float | None = None
    gpu_memory_used_mb: float | None = None
    gpu_temperature: float | None = None
    gpu_model_name: str | None = None
    gpu_compute_capability: str | None = None
    average_response_time_ms: float | None = None
    loaded_models: list[Any] | None = None
    """`/api/ps` rows (or bare names, from older agents); None: unchanged."""
    installed_models: list[Any] | None = None
    """`/api/tags` rows (or bare names); None: unchanged."""
    in_flight: list[str] | None = None
    """Ids (`X-Request-Id`) of requests inside the gateway; None: not counted."""
    ollama_ok: bool = True
    """Whether the local Ollama answers."""
    ollama_version: str | None = None
    slots: int | None = None
    draining: bool = False
    disk_free_bytes: int | None = None
    """Free on the disk that holds the models, when the agent knows which that is."""
    boot: int = 0
    sequence: int = 0


class HeartbeatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`status`: `ok`, or `pending` while an admin has not approved the agent yet."""

    status: str = "ok"
    agent_token: str | None = None
    gateway_credential: str | None = None
    send_inventory: bool = False
    """The coordinator lacks this node's model lists: the next heartbeat must carry them."""
    tasks: list["PullOrder"] = []
    """What this node should be pulling; one that it knows already is no second order."""


class PullOrder(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /pull` of an agent's gateway: download `model` with the local Ollama, and report."""

    task_id: str
    model: str
    attempt: int = 1
    insecure: bool = False


class PullReport(msgspec.Struct, frozen=True, kw_only=True):
    """How an ordered pull stands. `over`: the work has stopped, with `error` when it failed (`lost`: Ollama said no last word)."""

    task_id: str
    attempt: int
    phase: str = ""
    layers: list[Layer] = []
    over: bool = False
    error: str | None = None
    lost: bool = False


class PullReports(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /api/agents/:id/tasks`: all pulls in hand, and those that ended and whose end is not confirmed yet."""

    reports: list[PullReport]


class PullReportsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`stop`: tasks of the report that are not to go on. An answer confirms the ends that were reported."""

    stop: list[str] = []


class EndingReport(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """How a request that came through nginx ended at the gateway of its node. Bounds are checked while it is read: there are thousands.

    With a `status` of 400 and more its edge asks elsewhere, or passes the answer on: what the client gets is not decided by it.
    """

    request_id: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    ending: Literal["success", "error", "cancelled"]
    status: Annotated[int, msgspec.Meta(ge=0, le=999)] = 200
    """HTTP status that the caller got; 0 when none was sent."""
    message: Annotated[str, msgspec.Meta(max_length=ENDING_TEXT_MAX)] = ""
    node_fault: Annotated[str, msgspec.Meta(max_length=40)] | None = None
    """A `core.events.Failure`, when it was the node's doing; a word that is not known yet means `died`."""
    prompt_tokens: Amount = 0
    output_tokens: Amount = 0
    total_ns: Amount = 0
    """Durations as Ollama told them; 0 when it did not."""
    load_ns: Amount = 0
    prompt_ns: Amount = 0
    eval_ns: Amount = 0
    body_bytes: Amount = 0
    """Of the answer's body, as the caller got it."""
    chunks: Amount = 0
    ttft_ms: Milliseconds | None = None
    """From the request to the first body byte of its answer, both at the gateway; None when none came."""
    duration_ms: Milliseconds = 0.0
    """From the request to its end, at the gateway."""


class EndingReports(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /api/agents/:id/endings`: what ended and is not confirmed yet, oldest first. One may come twice."""

    reports: Annotated[list[EndingReport], msgspec.Meta(max_length=ENDINGS_MAX)]
    dropped: Amount = 0
    """Reports that were given up since the last confirmed message, because there were too many."""


class EndingReportsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer confirms all that came; what the coordinator does not know (it began anew) it has dropped."""

    taken: int = 0
    gather_s: float = 0.25
    """Least time between two messages that the coordinator wants: it has many agents to listen to."""


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /api/agents/:id/metrics` (seed)."""

    cpu_usage: float
    memory_usage: float
    active_requests: int = 0
    avg_response_time_ms: float | None = None
    agent_id: str | None = None
    timestamp: str | None = None


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`PUT /api/agents/:id/settings`: absent leaves as is, null clears (contract 3)."""

    custom_name: str | msgspec.UnsetType | None = msgspec.UNSET
    tags: list[str] | msgspec.UnsetType | None = msgspec.UNSET
    notes: str | msgspec.UnsetType | None = msgspec.UNSET
    weight: float | msgspec.UnsetType | None = msgspec.UNSET
    max_concurrent: int | msgspec.UnsetType | None = msgspec.UNSET


def encode(message: msgspec.Struct) -> bytes:
    """The message as JSON."""
    return msgspec.json.encode(message)


def decode(data: bytes, kind: type[T]) -> T:
    """`data` as a `kind`, its values checked.

    Raises:
        RemoteError: status 400 when it is not JSON of that form (the text names the field), 422 when a value is impossible.
    """
    try:
        message = msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        status = 422 if "out of range" in str(error) else 400
        raise RemoteError(f"the request body does not fit: {error}", status=status) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _why_not_json(data) from None
    _check(message)
    return message


_STRINGS_AND_NOT_NUMBERS = re.compile(rb'"(?P<string>(?:[^"\\]|\\.)*+)"\s*+(?P<colon>:)?|-?(?P<not_number>NaN|Infinity)\b', re.DOTALL)


def _why_not_json(data: bytes) -> RemoteError:
    """Many writers put NaN and Infinity where JSON has no word for them: an impossible value (422). Anything else is not JSON (400)."""
    key = b"a number"
    for match in _STRINGS_AND_NOT_NUMBERS.finditer(data):
        if match["not_number"] is not None:
            break
        if match["colon"] is not None:
            key = match["string"]
    else:
        return RemoteError("the request body is not valid JSON", status=400)
    repaired = _STRINGS_AND_NOT_NUMBERS.sub(lambda match: b"null" if match["not_number"] else match[0], data)
    try:
        msgspec.json.decode(repaired)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return RemoteError("the request body is not valid JSON", status=400)
    name = key.decode("utf-8", "replace")[:100]
    return RemoteError(f"{name} must be a finite number, not {match[0].decode()}", status=422)


_PERCENT = ("cpu_usage", "memory_usage", "gpu_usage", "gpu_memory_usage")
_NOT_NEGATIVE = (
    "active_requests", "gpu_memory_total_mb", "gpu_memory_used_mb", "average_response_time_ms", "avg_response_time_ms", "boot", "sequence",
    "disk_free_bytes",
)  # fmt: skip


def _check(message: object) -> None:
    """Values that JSON allows and the world does not."""
    for name in _PERCENT:
        value = getattr(message, name, None)
        if value is not None and not 0 <= value <= 100:
            raise RemoteError(f"{name} must be between 0 and 100, not {value}", status=422)
    for name in _NOT_NEGATIVE:
        value = getattr(message, name, None)
        if value is not None and not 0 <= value <= COUNT_MAX:
            raise RemoteError(f"{name} must be between 0 and {COUNT_MAX}", status=422)
    if isinstance(message, Registration):
        _check_registration(message)
    if isinstance(message, AgentSettings):
        _check_settings(message)


def _check_registration(message: Registration) -> None:
    if not message.machine_name.strip() or len(message.machine_name) > 255:
        raise RemoteError("machine_name must have 1 to 255 characters", status=400)
    for name in ("ollama_port", "agent_api_port"):
        port = getattr(message, name)
        if port is not None and not 1 <= port <= 65535:
            raise RemoteError(f"{name} must be a port from 1 to 65535, not {port}", status=422)
    if message.slots is not None and not 1 <= message.slots <= 1024:
        raise RemoteError(f"slots must be between 1 and 1024, not {message.slots}", status=422)


def _check_settings(message: AgentSettings) -> None:
    if isinstance(message.custom_name, str) and len(message.custom_name) > 100:
        raise RemoteError("custom_name may have 100 characters at most")
    if isinstance(message.notes, str) and len(message.notes) > 2000:
        raise RemoteError("notes may have 2000 characters at most")
    if isinstance(message.tags, list) and (len(message.tags) > 20 or any(len(tag) > 50 or not tag.strip() for tag in message.tags)):
        raise RemoteError("tags may be 20 at most, of 1 to 50 characters each")
    if isinstance(message.weight, (int, float)) and not (0.01 <= message.weight <= 100):
        raise RemoteError("weight must be between 0.01 and 100")
    if isinstance(message.max_concurrent, int) and not 1 <= message.max_concurrent <= 10_000:
        raise RemoteError("max_concurrent must be between 1 and 10000")
