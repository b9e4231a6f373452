"""What a simulated Ollama is told and what it says: its settings, what can happen to it, and what follows.

Decides nothing but the size of a runner and the time of a load. `core.simulation.node` is the machine that uses these words.
"""

from enum import Enum

import msgspec

from core.units import GIB, Instant


class ModelTiming(msgspec.Struct, frozen=True, kw_only=True):
    """A model on this node. Models with one `weights` share one runner."""

    weights: str
    size_bytes: int
    prefill_tokens_s: float
    decode_tokens_s: float
    prompt_base_s: float = 0.0  # what reading any prompt costs, however short or well known
    context_bytes: int = 0  # per token of context and slot
    trained_context: int = 131_072
    single: bool = False  # one slot, whatever the node's setting (embedding models)


class NodeTiming(msgspec.Struct, frozen=True, kw_only=True):
    """The node's settings and machine."""

    slots: int = 1
    max_loaded: int = 3
    max_queue: int = 512
    memory_bytes: int = 24 * GIB
    keep_alive_s: float = 300.0
    context: int = 4096
    load_base_s: float = 0.25
    load_bytes_s: float = 2e9
    unload_s: float = 0.0  # until the memory of an unloaded model is free
    batch_slope: float = 0.3  # each further stream of a runner slows all of them by this share
    batch_tokens: int = 512  # of a prompt, between two tokens of the streams beside it
    contention: float = 0.0  # each further runner that is busy costs all of them this share beyond the division of the machine
    prompt_cache: bool = True
    regroups: bool = False  # once a model is loaded, all that wait for it go first: what Ollama does not do, to see what that costs

    def load_s(self, model: ModelTiming) -> float:
        """Seconds from start to readiness of a runner for `model`."""
        return self.load_base_s + model.size_bytes / self.load_bytes_s


class Came(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request. Without prompt and output it only loads the model; without output it is an embedding."""

    request_id: str
    model: str
    prompt_tokens: int = 0
    output_tokens: int = 0
    num_ctx: int | None = None  # None: the node's choice
    options: str = ""  # the other options that a runner is started with, in any canonical form
    keep_alive_s: float | None = None  # negative: for ever
    conversation: str = ""  # requests with one value share a prompt prefix
    shared_tokens: int | None = None  # how much of it, of the last such prompt; None: all that the runner knows
    paced: bool = False  # report every token, not only the first
    hold_at: int | None = None  # stop after so many tokens, until `Resumed`
    leaks: bool = False  # if its client leaves in mid-answer, its slot stays taken until the runner goes
    load_error: str = ""  # a load that this request starts fails with this text


class Left(msgspec.Struct, frozen=True, tag=True):
    """The client is gone."""

    request_id: str


class Resumed(msgspec.Struct, frozen=True, tag=True):
    """A held request may go on to its end."""

    request_id: str


class UnloadAsked(msgspec.Struct, frozen=True, tag=True):
    """The model is to go as soon as nothing runs on it."""

    model: str


NodeEvent = Came | Left | Resumed | UnloadAsked


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The pending queue is full."""

    request_id: str


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """The load that the request had started came to nothing."""

    request_id: str
    text: str


class Produced(msgspec.Struct, frozen=True, tag=True):
    """The request now has so many tokens."""

    request_id: str
    tokens: int


class Held(msgspec.Struct, frozen=True, tag=True):
    """The request has reached its `hold_at`."""

    request_id: str


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How a request fared. `came <= obtained <= started <= first <= finished`."""

    came: Instant
    obtained: Instant  # a runner was ready for it
    started: Instant  # a slot was free
    first: Instant  # the prompt was read
    finished: Instant
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The request is done."""

    request_id: str
    timing: Timing


class Change(Enum):
    """What can happen to a runner."""

    LOADING = "loading"
    LOADED = "loaded"
    ABORTED = "aborted"
    FAILED = "failed"
    UNLOADED = "unloaded"


class RunnerChanged(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A runner started, became ready or went. `why`: for a load the request's id; else expired, evicted, reload, asked."""

    model: str
    change: Change
    why: str
    at: Instant


NodeEffect = Refused | LoadFailed | Produced | Held | Finished | RunnerChanged


class LoadedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `/api/ps`."""

    model: str
    size_bytes: int
    in_memory_bytes: int  # of the accelerator; the rest is computed by the CPU
    context: int
    expires_at: Instant  # in the past: busy, or about to go; infinite: never
    in_flight: int


def effective_context(num_ctx: int | None, model: ModelTiming, node: NodeTiming) -> int:
    """Tokens of context that a slot gets."""
    return min(num_ctx or node.context, model.trained_context)


def needed_bytes(model: ModelTiming, context: int, slots: int) -> int:
    """Memory that a runner takes."""
    return model.size_bytes + model.context_bytes * context * slots
