"""Whether the rest of a begun answer can come from another node, and what makes the two parts one (`ROUTER_RESUME=text`).

Decides from what was asked and from what was sent; never where the rest comes from. Only plain text is resumed: a chat by giving the
text so far as the beginning of the assistant's answer, `generate` in raw mode by adding it to the prompt. Whatever could make the rest
another answer's (tools, formats, log probabilities, thinking, a member that is not known here) is not resumed at all.

Invariants: in doubt None; what is kept of an answer is bounded by `TEXT_MAX_BYTES`; a line of the rest that needs no change passes byte
for byte; counts are those of both parts together, and the text that was given back as a prompt is no part of the prompt's.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from core.events import AttemptEnded, Count, Effect, Note, Route
from core.names import key_or_none
from core.requests import Request
from core.units import ModelKey

TEXT_MAX_BYTES: Final = 256 << 10
"""An answer that is longer is not resumed."""

BODY_MAX_BYTES: Final = 256 << 10
"""Nor is a request."""

WHY_MAX: Final = 200
"""Characters of a node's error text that the log quotes."""

_CHAT: Final = frozenset(
    ("model", "messages", "stream", "options", "keep_alive", "think", "tools", "format", "logprobs", "truncate", "shift")
)
_GENERATE: Final = frozenset(
    ("model", "prompt", "raw", "stream", "options", "keep_alive", "think", "format", "logprobs", "truncate", "shift")
)
_V1_CHAT: Final = frozenset(
    ("model", "messages", "stream", "stream_options", "max_tokens", "temperature", "top_p", "seed", "stop", "frequency_penalty",
     "presence_penalty", "user", "n", "tools", "response_format", "logprobs")
)  # fmt: skip
_KNOWN: Final = {Route.CHAT: _CHAT, Route.GENERATE: _GENERATE, Route.V1_CHAT: _V1_CHAT}
_EMPTY: Final[tuple[object, ...]] = (None, False, "", [])
_DONE: Final = b"data: [DONE]"


class Asked(msgspec.Struct, frozen=True):
    """A request whose answer may be resumed."""

    route: Route
    limit: int | None
    """Tokens that the answer may have."""
    thinks_unasked: bool
    """It does not say that the model shall not think."""


def may_resume(route: Route, members: Iterable[tuple[str, Any]]) -> Asked | None:
    """What matters of a request for a stream, given its members in order, names folded; None: its answer cannot be resumed."""
    known = _KNOWN.get(route)
    asked: dict[str, Any] = {}
    for name, value in members:
        if known is None or name not in known or name in asked:
            return None
        asked[name] = value
    if known is None or any(asked.get(name) not in _EMPTY for name in ("tools", "format", "logprobs")):
        return None
    if asked.get("think") not in (None, False) or asked.get("response_format") not in (None, {"type": "text"}) or asked.get("n", 1) != 1:
        return None
    if route is Route.GENERATE:
        fine = asked.get("raw") is True and isinstance(asked.get("prompt"), str) and asked["prompt"] != ""
    else:
        fine = _is_open_chat(asked.get("messages"))
    options = asked.get("options") or {}
    if not fine or not isinstance(options, dict):
        return None
    limit = asked.get("max_tokens") if route is Route.V1_CHAT else options.get("num_predict")
    if limit is not None and type(limit) is not int:
        return None
    unasked = asked.get("think") is None and route is not Route.GENERATE
    return Asked(route, limit if limit is not None and limit >= 0 else None, unasked)


def _is_open_chat(messages: object) -> bool:
    """Whether it is the assistant's turn, and nobody has begun it for it."""
    if not isinstance(messages, list) or not messages:
        return False
    last = messages[-1]
    return isinstance(last, dict) and last.get("role") == "user" and not {str(key).lower() for key in last} - {"role", "content", "images"}


def thinks(rows: Sequence[Any], key: ModelKey | None) -> bool:
    """Whether one of these rows of `/api/tags` says that the model can think."""
    for row in rows:
        if isinstance(row, dict) and isinstance(name := row.get("name"), str) and key_or_none(name) == key:
            told = row.get("capabilities")
            return isinstance(told, list) and "thinking" in told
    return False


def begin_resume(request: Request, event: AttemptEnded) -> list[Effect]:
    """The rest of an answer that broke off is asked of another node from now on."""
    agent = request.agent
    assert agent is not None, "an answer without a node"
    request.resumed = True
    fields = {"agent_id": agent.id, "agent": agent.name, "model": request.came.model, "request_id": request.id, "why": event.text[:WHY_MAX]}
    return [
        Note(level="warning", event="the rest of an answer is asked of another node", fields=fields),
        Count(name="resumes_total", labels={"agent": agent.name}),
    ]


# ---------------------------------------------------------------- what was sent


class _Message(msgspec.Struct):
    content: str = ""
    thinking: str | None = None
    reasoning: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    delta: _Message = msgspec.field(default_factory=_Message)
    finish_reason: str | None = None
    logprobs: Any = None


class _Line(msgspec.Struct):
    """A line of NDJSON, or the data of an event."""

    model: str = ""
    message: _Message = msgspec.field(default_factory=_Message)
    response: str = ""
    thinking: str | None = None
    done: bool = False
    error: Any = None
    logprobs: Any = None
    id: str = ""
    created: int = 0
    choices: list[_Choice] | None = None


_decode: Final = msgspec.json.Decoder(_Line).decode


class Transcript:
    """What a client got of an answer. `take` sees each whole line (event) before it goes to the client."""

    def __init__(self) -> None:
        self.plain = True
        """Nothing but text was sent, and not all of it."""
        self.tokens = 0
        """Lines that brought text: with Ollama about one token each."""
        self.id = ""
        self.created = 0
        self._parts: list[str] = []
        self._bytes = 0

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self._parts)

    def take(self, line: bytes) -> bool:
        """Whether the line is for the client in any case; False: only if the answer is not resumed, for it tells a failure."""
        if not self.plain:
            return True
        data = line.strip()
        event = data.startswith(b"data: ")
        try:
            said = _decode(data[6:] if event else data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self.plain = data == b""
            return True
        if said.error is not None:
            return False
        choice = said.choices[0] if said.choices else _Choice()
        if event and not said.model and choice.finish_reason is None:
            return False  # how Ollama hides a failure: a chunk without model or text
        spoken = choice.delta if event else said.message
        odd = (spoken.thinking, spoken.reasoning, spoken.tool_calls, said.thinking, said.logprobs, choice.logprobs)
        if any(odd) or said.done or choice.finish_reason is not None:
            self.plain = False
            return True
        self.id, self.created = self.id or said.id, self.created or said.created
        self._keep(spoken.content or said.response)
        return True

    def _keep(self, text: str) -> None:
        if text:
            self.tokens += 1
            self._bytes += len(text.encode("utf-8", "surrogatepass"))
            self._parts.append(text)
        if self._bytes > TEXT_MAX_BYTES:
            self.plain = False
            self._parts.clear()


def tokens_left(asked: Asked, sent: Transcript) -> int | None:
    """How many tokens the rest may have; None: any number. 0: there is no rest."""
    return None if asked.limit is None else max(0, asked.limit - sent.tokens)


# ---------------------------------------------------------------- the rest


class Rest:
    """Makes another node's answer the rest of this one, line by line (event by event)."""

    def __init__(self, sent: Transcript, *, before_ns: int) -> None:
        """`before_ns`: how long the first part took."""
        self._sent = sent
        self._before_ns = before_ns

    def rewrite(self, line: bytes) -> bytes:
        """`line` as the client gets it."""
        if line.startswith(b"data: "):
            return line if line.startswith(_DONE) else self._event(line)
        return self._last(line) if b'"done":true' in line else line

    def _last(self, line: bytes) -> bytes:
        said = _object(line)
        if said is None or said.get("done") is not True:
            return line
        _add(said, "eval_count", self._sent.tokens)
        _add(said, "prompt_eval_count", -self._sent.tokens)
        for name in ("total_duration", "eval_duration"):
            _add(said, name, self._before_ns)
        return msgspec.json.encode(said) + b"\n"

    def _event(self, line: bytes) -> bytes:
        said = _object(line[6:])
        if said is None or "id" not in said:
            return line
        said["id"], said["created"] = self._sent.id, self._sent.created
        for choice in said.get("choices") or ():
            if isinstance(choice, dict) and isinstance(delta := choice.get("delta"), dict):
                delta.pop("role", None)
        usage = said.get("usage")
        if isinstance(usage, dict):
            _add(usage, "prompt_tokens", -self._sent.tokens)
            _add(usage, "completion_tokens", self._sent.tokens)
        return b"data: " + msgspec.json.encode(said) + b"\n\n"


def _add(counts: dict[str, Any], name: str, more: int) -> None:
    if isinstance(value := counts.get(name), int):
        counts[name] = max(0, value + more)


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        said = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return said if isinstance(said, dict) else None
