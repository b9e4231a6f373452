"""What a record of a request is, and what of its bodies may be kept.

Decides the form of a record (contract 6), its place in time, what redaction takes out of a body, and what is too old or too much. Must
never know a database or a clock. Runs off the loop, but for `number_of`.

Invariants: numbers grow with time, so that order, paging and retention are comparisons of numbers; redaction leaves valid JSON valid and
takes out every data URL, every long base64 string and every masked path; what cannot be read as JSON is not kept when it must be redacted.
"""

import hashlib
import re
from typing import Any, Final

import msgspec

from core.errors import ConfigError
from core.structs import Entry
from core.units import UnixMs

NUMBER_SHIFT: Final = 20
"""Bits of a record's number below its millisecond: 1,024 coordinators' worth of 1,024 records each."""
_COORDINATOR_SHIFT: Final = 10

STATUSES: Final = ("success", "error", "cancelled", "unknown")
EDGE_EMBEDDED: Final = "embedded"
EDGE_NGINX: Final = "nginx"
EDGES: Final = (EDGE_EMBEDDED, EDGE_NGINX, "imported")
DAY_MS: Final = 86_400_000

BLOB_MIN_CHARS: Final = 256
"""A string this long of nothing but base64's letters is no text."""
_DATA_URL: Final = re.compile(r"data:([\w.+-]+/[\w.+-]+)?[^,]{0,100},")
_BASE64: Final = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")

BODY_WHOLE: Final = "whole"
BODY_CUT: Final = "cut"
BODY_REDACTED: Final = "redacted"
BODY_OFF: Final = "off"
BODY_DROPPED: Final = "dropped"
BODY_NOT_CAPTURED: Final = "not captured"
BODY_STATES: Final = (BODY_WHOLE, BODY_CUT, BODY_REDACTED, BODY_OFF, BODY_DROPPED, BODY_NOT_CAPTURED)
"""What became of a body: all of it is kept; its beginning is; it was redacted; none was to be kept; the writer had no time for it; it did
not pass through the coordinator (the nginx edge)."""


class HistoryRecord(Entry):
    """One request as history keeps it. Times in milliseconds; None: not known, or there was none. Made by position where it is hot."""

    number: int
    """Its place: `number_of`."""
    request_id: str
    at_ms: UnixMs
    """When it came."""
    completed_at_ms: UnixMs
    request_type: str
    """`chat`, `generate`, `embeddings`, …"""
    path: str
    model: str | None
    agent_id: str | None
    agent_name: str | None
    client: str
    """An address, or the user that a trusted proxy named."""
    key_id: str | None
    status: str
    """One of `STATUSES`."""
    message: str
    http_status: int
    duration_ms: float
    queue_ms: float
    ttft_ms: float | None
    predicted_start_ms: float | None
    prompt_tokens: int
    output_tokens: int
    load_ms: float
    attempts: bytes
    """A JSON list of `{node, outcome, ms}`."""
    edge: str
    """One of `EDGES`."""
    chunks: int
    """Raw chunks of a stream."""
    body_bytes: int
    """Of the answer, as it was sent."""
    request_body: bytes | None = None
    response_body: bytes | None = None
    bodies: str = BODY_OFF
    """One of `BODY_STATES`, for both bodies: the worse one's."""
    observed_start_ms: float | None = None
    """When its node began to read the prompt, as `predicted_start_ms` foretold it, since it came."""


def number_of(at_ms: UnixMs, count: int, coordinator: int = 0) -> int:
    """The number of the `count`th record of a coordinator in the millisecond `at_ms`. A 64-bit integer until the year 2248.

    Beyond 1,024 in a millisecond the next millisecond's numbers are used.
    """
    at_ms = UnixMs(at_ms + (count >> _COORDINATOR_SHIFT))
    return at_ms << NUMBER_SHIFT | coordinator << _COORDINATOR_SHIFT | count & ((1 << _COORDINATOR_SHIFT) - 1)


def first_number(at_ms: UnixMs) -> int:
    """The least number of a record that came at `at_ms` or later."""
    return at_ms << NUMBER_SHIFT


class Numbers:
    """Gives each record of one coordinator its number. `after`: the greatest number that was given before a restart."""

    def __init__(self, coordinator: int = 0, *, after: int = 0) -> None:
        assert 0 <= coordinator < 1 << (NUMBER_SHIFT - _COORDINATOR_SHIFT)
        self._coordinator = coordinator
        self._last_ms = UnixMs(after >> NUMBER_SHIFT)
        self._count = 1 << _COORDINATOR_SHIFT  # that millisecond is taken

    def next(self, at_ms: UnixMs) -> int:
        """A number for a record of `at_ms`: never given before, even when the calendar's clock was set back."""
        if at_ms > self._last_ms:
            self._last_ms, self._count = at_ms, 0
        elif self._count >> _COORDINATOR_SHIFT:
            self._last_ms, self._count = UnixMs(self._last_ms + 1), 0
        count = self._count
        self._count = count + 1
        return self._last_ms << NUMBER_SHIFT | self._coordinator << _COORDINATOR_SHIFT | count  # `number_of` without its call: it is hot


# ---------------------------------------------------------------- what may be kept of a body


def parse_mask(path: str) -> tuple[str, ...]:
    """A path such as `messages[].content` or `$.user.name`, as its steps; `[]` means every entry of a list.

    Raises:
        ConfigError: it is no path.
    """
    steps = tuple(step for part in path.strip().removeprefix("$").strip(".").split(".") for step in re.findall(r"\[\]|[^\[\]]+", part))
    if not steps or "".join(steps).count("]") != path.count("]"):
        raise ConfigError(f"HISTORY_MASK: {path!r} is no path such as messages[].content")
    return steps


def redacted(body: bytes, masks: tuple[tuple[str, ...], ...] = ()) -> bytes | None:
    """`body` with data URLs and base64 replaced by their size and hash, and what `masks` name by `"[masked]"`.

    None: it is no JSON, so nobody knows what is in it.
    """
    try:
        value = msgspec.json.decode(body)
        value = _without_blobs(value)
        for mask in masks:
            value = _masked(value, mask)
        return msgspec.json.encode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError, UnicodeEncodeError, RecursionError):
        return None


def _without_blobs(value: Any) -> Any:
    if isinstance(value, str):
        return _shortened(value)
    if isinstance(value, list):
        return [_without_blobs(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _without_blobs(entry) for name, entry in value.items()}
    return value


def _shortened(text: str) -> str:
    head = _DATA_URL.match(text)
    if head is None and (len(text) < BLOB_MIN_CHARS or _BASE64.fullmatch(text) is None):
        return text
    kind = (head[1] or "data") if head is not None else "base64"
    data = text.encode("utf-8", "surrogatepass")
    return f"[{kind}, {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:16]}]"


def _masked(value: Any, steps: tuple[str, ...]) -> Any:
    if not steps:
        return "[masked]"
    step, rest = steps[0], steps[1:]
    if step == "[]":
        return [_masked(entry, rest) for entry in value] if isinstance(value, list) else value
    if isinstance(value, dict):  # Ollama folds the case of keys
        return {name: _masked(entry, rest) if name.lower() == step.lower() else entry for name, entry in value.items()}
    return value


# ---------------------------------------------------------------- retention


def oldest_kept(now: UnixMs, days: int) -> int:
    """The least number that is kept when records live for `days`."""
    return first_number(UnixMs(max(0, now - days * DAY_MS)))


def default_max_bytes(free_disk_bytes: int) -> int:
    """2 GiB, or a tenth of the free disk if that is less (contract 2)."""
    return min(2 << 30, max(1 << 20, free_disk_bytes // 10))
