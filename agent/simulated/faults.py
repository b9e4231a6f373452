"""The ways in which a simulated Ollama can be told to fail, and the choice of who is hit.

Decides which request gets which fault; the server carries it out. Chance comes from a seeded generator, so a run repeats.

| kind | what the client sees |
| --- | --- |
| `refuse` | the port is closed for as long as the fault is set |
| `silent` | the request is taken and never answered |
| `close`, `reset` | after `after_tokens` (0: before the head) the connection ends, with FIN or RST |
| `cut` | after `after_tokens` the connection ends inside a chunk |
| `end` | after `after_tokens` a clean end without `done` |
| `error` | after `after_tokens` a line `{"error": text}`; at 0 status 500 with it |
| `stall` | after `after_tokens` nothing for `seconds`, the slot stays taken; other routes answer late |
| `drip` | every write in pieces of `piece_bytes`, `seconds` apart |
| `status` | `status` with `body` (default: Ollama's text for it) |
| `malformed` | after `after_tokens` a line that is no JSON, then on |
| `huge` | after `after_tokens` a line of `size_bytes`, then on |
| `empty`, `blank`, `html` | 200 with no body; with the blank answer of year 0001; with a web page |
| `garbage` | bytes that are no HTTP |
| `hang-up` | a good answer, then the kept connection is closed |
| `leak` | nothing; but if the client leaves in mid-answer, a slot of the model stays taken until it is unloaded |
| `load` | the load that the request starts fails with `text` |
"""

import random
from collections.abc import Callable
from typing import Final, Literal

import msgspec

FaultKind = Literal[
    "refuse", "silent", "close", "reset", "cut", "end", "error", "stall", "drip", "status", "malformed", "huge", "empty", "blank", "html",
    "garbage", "hang-up", "leak", "load",
]  # fmt: skip

BUSY: Final = "server busy, please try again.  maximum pending requests exceeded"
RUNNER_GONE: Final = (
    "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error, "
    + "check ollama server logs for details"
)
LINE_TEXT: Final = "an error was encountered while running the model: unexpected EOF"
LOAD_TEXT: Final = "llama-server process has terminated: exit status 1: error loading model: bad tensor layout"
INFERENCE: Final = frozenset(
    {
        "/api/generate", "/api/chat", "/api/embed", "/api/embeddings", "/v1/chat/completions", "/v1/completions", "/v1/embeddings",
        "/v1/responses", "/v1/messages", "/v1/audio/transcriptions",
    }
)  # fmt: skip


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One way to fail, and for whom. Unset selectors match everything they may."""

    kind: FaultKind
    route: str | None = None  # a path; None: every inference route; "*": every route
    model: str | None = None  # as the client spells it
    nth: int | None = None  # only the n-th request (from 1) that matches
    probability: float = 1.0
    times: int | None = None  # so often at most
    after_tokens: int = 0
    seconds: float = float("inf")
    status: int = 503
    body: str | None = None  # None: Ollama's own text for the status
    content_type: str = "application/json; charset=utf-8"
    text: str = ""  # of `error` and `load`; empty: one of Ollama's own
    piece_bytes: int = 1
    size_bytes: int = 1 << 20


class Faults:
    """The faults that are set. The first that matches is it."""

    def __init__(self, seed: int = 0) -> None:
        self._dice = random.Random(seed)
        self._set: list[Fault] = []
        self._matched: list[int] = []
        self._fired: list[int] = []
        self.on_change: Callable[[], None] = lambda: None

    def add(self, fault: Fault) -> None:
        """From the next request on."""
        self._set.append(fault)
        self._matched.append(0)
        self._fired.append(0)
        self.on_change()

    def clear(self) -> None:
        """None is left; work in hand keeps the fault it was given."""
        self._set, self._matched, self._fired = [], [], []
        self.on_change()

    @property
    def refusing(self) -> bool:
        """Whether the port is to be closed."""
        return any(fault.kind == "refuse" for fault in self._set)

    def pick(self, route: str, model: str | None) -> Fault | None:
        """The fault for a request that comes now."""
        for at, fault in enumerate(self._set):
            if fault.kind == "refuse":
                continue
            if not (route in INFERENCE if fault.route is None else fault.route in ("*", route)):
                continue
            if fault.model is not None and fault.model != model:
                continue
            self._matched[at] += 1
            if fault.nth is not None and self._matched[at] != fault.nth:
                continue
            if fault.times is not None and self._fired[at] >= fault.times:
                continue
            if fault.probability < 1 and self._dice.random() >= fault.probability:
                continue
            self._fired[at] += 1
            return fault
        return None
