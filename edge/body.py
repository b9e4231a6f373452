"""The request body: read whole within limits, replayable, and the few facts that a decision needs.

Decides what is too much, and which model, options and sizes a body names, read exactly as Ollama reads them (Go's `encoding/json` into
structs: the first value only, keys folded, the last duplicate wins, duplicate `options` merged, `null` leaves strings and clears the
rest). Must never know nodes, names of models, or what to do about a fact; it never changes a byte.

Invariants: a body's memory and file are given back exactly once, in `Body.close`; all bodies together hold at most
`BodyBudget.memory_bytes`; a file is 0600, has no name, and is touched in worker threads only; `inspect` tells the same whether it took
the fast way or the exact one; no step in the loop takes 2 ms whatever a client sends.
"""

import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Final, Protocol

import msgspec
import trio

from core.events import Protocol as Manners
from core.events import Route
from core.units import MIB
from edge.facts import BYTES_PER_TOKEN, EMBEDS, BodyFacts, plain_facts
from edge.jsonscan import BLOB_MIN_BYTES, CAPTURE_MAX_BYTES, Member, Scanner, fold, go_string, is_empty
from edge.prefixes import prefix_keys
from edge.wire import ClientConnection, HttpError, RequestHead

SPOOL_ABOVE_BYTES: Final = MIB
"""Larger bodies go to disk, where that is allowed."""

PIECE_BYTES: Final = 256 << 10
"""Read from disk, and sent, at a time."""

CLOSE_IN_LOOP_BYTES: Final = 8 * MIB
"""Freeing the pages of a larger file takes the kernel milliseconds: a thread does it."""

FAST_MAX_BYTES: Final = 256 << 10
FAST_MAX_QUOTES: Final = 16_384
FAST_MAX_KEYS: Final = 256
"""Bounds of what is decoded in one go: about a millisecond at worst."""

STEP_BYTES: Final = 2048
STEP_S: Final = 0.0005
"""The exact scanner gives way to other tasks after this long; its steps are of so many bytes (1.4 ms of nothing but keys)."""

IMAGE_TOKENS: Final = 576
"""What an image in a prompt is counted as: a common size of one (its bytes say nothing)."""


class BodyBudget:
    """What all request bodies together may take, in bytes; shared by all requests of one process.

    `spool`: bodies above 1 MiB, or above the memory left, may go to disk (`directory`: where; None: the system's place). Without it
    they stay in memory, and are refused with 503 when that is used up.
    """

    __slots__ = ("directory", "held_bytes", "max_body_bytes", "memory_bytes", "spool")

    def __init__(
        self, *, max_body_bytes: int = 256 * MIB, memory_bytes: int = 512 * MIB, spool: bool = True, directory: str | None = None
    ) -> None:
        self.max_body_bytes = max_body_bytes
        self.memory_bytes = memory_bytes
        self.spool = spool
        self.directory = directory
        self.held_bytes = 0


class Sink(Protocol):
    """What a body is sent to."""

    async def send(self, data: bytes) -> None:
        """Send all of `data`."""
        ...


class Body:
    """A request body that was read whole: in memory (`data`), or in a file. May be sent several times, one after the other."""

    __slots__ = ("_closed", "budget", "data", "file", "length")

    def __init__(self, data: bytes | None, length: int, budget: BodyBudget, file: IO[bytes] | None = None) -> None:
        self.data = data
        self.length = length
        self.budget = budget
        self.file = file
        self._closed = False

    async def send_to(self, conn: Sink) -> None:
        """Send all of it. Raises what `conn.send` raises."""
        if self.data is not None:
            if self.data:
                await conn.send(self.data)
            return
        for offset in range(0, self.length, PIECE_BYTES):
            await conn.send(await self.read_at(offset))

    async def read_at(self, offset: int) -> bytes:
        """At most `PIECE_BYTES` from `offset` on."""
        if self.data is not None:
            return self.data[offset : offset + PIECE_BYTES]
        return await trio.to_thread.run_sync(self._read, offset)

    def _read(self, offset: int) -> bytes:
        assert self.file is not None
        self.file.seek(offset)
        return self.file.read(PIECE_BYTES)

    def close(self) -> None:
        """Give back memory or file. Once only."""
        assert not self._closed, "a body is closed once"
        self._closed = True
        if self.file is None:
            self.budget.held_bytes -= self.length
            self.data = b""
        else:
            _close(self.file, self.length)


def _close(file: IO[bytes], length: int) -> None:
    if length > CLOSE_IN_LOOP_BYTES:
        threading.Thread(target=file.close, name="close a body's file").start()
    else:
        file.close()


async def read_body(conn: ClientConnection, head: RequestHead, budget: BodyBudget) -> Body:
    """Read the body of the request whose head is `head`, whole.

    Raises:
        HttpError: 413 above the limit, 503 when there is no room for it now, 400 and 408 from the connection.
        ClientGone: the client left.
    """
    length = head.content_length or 0
    if length > budget.max_body_bytes:
        raise _too_large(budget)
    if length <= SPOOL_ABOVE_BYTES and not head.chunked:
        data = await conn.read_body_some() if length else b""
        if len(data) == length and budget.held_bytes + length <= budget.memory_bytes:
            budget.held_bytes += length
            return Body(data, length=length, budget=budget)
    else:
        data = b""
    store = Store(budget, spool=budget.spool and length > SPOOL_ABOVE_BYTES)
    try:
        while data or (data := await conn.read_body_some()):
            await store.add(data)
            data = b""
        return await store.finish()
    except BaseException:
        store.discard()
        raise


def _too_large(budget: BodyBudget) -> HttpError:
    return HttpError(413, f"the request body is larger than {budget.max_body_bytes} bytes; send less, or raise ROUTER_BODY_MAX_BYTES")


class Store:
    """A body on its way in: in memory, until it must go to disk. Ends in `finish` or `discard`."""

    __slots__ = ("budget", "file", "held", "length", "parts", "spooling")

    def __init__(self, budget: BodyBudget, *, spool: bool) -> None:
        self.budget = budget
        self.parts: list[bytes] = []
        self.held = 0  # bytes in `parts`
        self.length = 0
        self.spooling = spool
        self.file: IO[bytes] | None = None

    async def add(self, data: bytes) -> None:
        """Take more of it. Raises HttpError 413, 503."""
        budget = self.budget
        self.length += len(data)
        if self.length > budget.max_body_bytes:
            raise _too_large(budget)
        self.parts.append(data)
        self.held += len(data)
        budget.held_bytes += len(data)
        if budget.held_bytes > budget.memory_bytes or self.length > SPOOL_ABOVE_BYTES:
            if budget.spool:
                self.spooling = True
            elif budget.held_bytes > budget.memory_bytes:
                raise HttpError(503, "the router holds as many request bodies as it may (ROUTER_BODY_MEMORY_BYTES); try again in a moment")
        if self.spooling and self.held >= SPOOL_ABOVE_BYTES:
            await self._write()

    async def finish(self) -> Body:
        """All of it is here."""
        if not self.spooling:
            return Body(b"".join(self.parts), length=self.length, budget=self.budget)
        if self.parts:
            await self._write()
        return Body(None, length=self.length, budget=self.budget, file=self.file)

    async def _write(self) -> None:
        parts, self.parts = self.parts, []
        try:
            self.file = await trio.to_thread.run_sync(_append, self.file, parts, self.budget.directory)
        except OSError as error:
            raise HttpError(503, f"the router has no room on disk for the request body: {error.strerror}") from None
        finally:
            self.budget.held_bytes -= self.held
            self.held = 0

    def discard(self) -> None:
        """It is not wanted any more; instead of `finish`."""
        self.budget.held_bytes -= self.held
        if self.file is not None:
            _close(self.file, self.length)


def _append(file: IO[bytes] | None, parts: list[bytes], directory: str | None) -> IO[bytes]:
    """In a worker thread: `parts` at the end of `file`, which is made if there is none (0600, and nameless at once)."""
    made = file is None
    if file is None:
        file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  # the body closes it
    try:
        for part in parts:
            view = memoryview(part)
            while view:
                written = file.write(view)
                view = view[written:]
    except OSError:
        if made:
            file.close()
        raise
    return file


# ---------------------------------------------------------------- what the body says


# Keys whose bytes are the prompt, so far as a count of tokens is concerned.
_TEXT: Final = {
    Route.CHAT: ("messages", "tools"),
    Route.GENERATE: ("prompt", "system", "suffix", "images"),
    Route.EMBED: ("input",),
    Route.EMBEDDINGS: ("prompt",),
    Route.V1_CHAT: ("messages", "tools"),
    Route.V1_COMPLETIONS: ("prompt", "suffix"),
    Route.V1_EMBEDDINGS: ("input",),
    Route.V1_RESPONSES: ("input", "instructions", "tools"),
    Route.V1_MESSAGES: ("messages", "system", "tools"),
}
_LIMITS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_STRINGS: Final = frozenset(("model", "name", "prompt", "system", "suffix", "instructions"))  # null leaves them as they were
_RELOADING: Final = frozenset(("draft_num_predict", "main_gpu", "num_batch", "num_ctx", "num_gpu", "num_thread", "use_mmap"))
_WANTED: Final = frozenset(
    (*_STRINGS, *_LIMITS, "stream", "options", "shift", "messages", "tools", "format", "response_format", "text", "images", "input",
     "keep_alive")
)  # fmt: skip
_SPELLED: Final = {name: b'"%b"' % name.encode() for name in _WANTED}

# Escapes that could spell a letter or an underscore of a wanted key, the Kelvin sign and the long s included.
_SPELLS_LETTERS: Final = re.compile(rb"\\u(?:00[4-7]|212[aA]|017[fF])")
_DURATION: Final = re.compile(r"[-+]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:ns|us|µs|μs|ms|s|m|h))+")
_DURATION_PART: Final = re.compile(r"([0-9.]+)([a-zµμ]+)")
_UNIT_NS: Final = {"ns": 1, "us": 1e3, "µs": 1e3, "μs": 1e3, "ms": 1e6, "s": 1e9, "m": 6e10, "h": 3.6e12}

_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def _wanted(key: str) -> str | None:
    name = fold(key)
    return name if name in _WANTED else None


def inspect(route: Route, body: bytes | memoryview, *, content_type: bytes = b"") -> BodyFacts:
    """What `body` says, as Ollama reads it. In one go, so for small bodies; in the loop use `inspect_async`."""
    body = bytes(body)
    facts = inspect_ordinary(route, body)
    if facts is not None:
        return facts
    scanner = Scanner(_wanted)
    for piece in _slices(body, STEP_BYTES):
        scanner.feed(piece)
    return _conclude(route, scanner, content_type)


def inspect_ordinary(route: Route, body: bytes) -> BodyFacts | None:
    """What `body` says when it is of the small plain kind that is decoded at once; None: only the exact scanner can tell."""
    facts = plain_facts(route, body)
    if facts is not None:
        return facts
    found = _decode_small(body)
    members = None if found is None else _members(found, body)
    return None if members is None else _facts(route, members)


async def inspect_async(route: Route, body: Body, *, content_type: bytes = b"") -> BodyFacts:
    """`inspect` for a body of any size and malice, without holding up the loop.

    Small plain bodies are decoded at once, with no checkpoint. Others pass through the exact scanner here in the loop, in steps below
    2 ms with checkpoints between them, and not in a worker thread: a thread that computes keeps the interpreter's lock for 5 ms at a
    time, which every stream would feel. Only files are read by a thread.
    """
    if body.data is not None and (facts := inspect_ordinary(route, body.data)) is not None:
        return facts
    return _conclude(route, await scan(body, _wanted), content_type)


async def scan(body: Body, wanted: Callable[[str], str | None]) -> Scanner:
    """The exact scanner after all of `body` has passed through it, in steps below 2 ms; not closed yet."""
    scanner = Scanner(wanted)
    began = time.perf_counter()
    for offset in range(0, body.length, PIECE_BYTES):
        for piece in _slices(await body.read_at(offset), STEP_BYTES):
            scanner.feed(piece)
            if time.perf_counter() - began > STEP_S:
                await trio.lowlevel.checkpoint()
                began = time.perf_counter()
        if scanner.done:
            break
    return scanner


def _slices(data: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def _conclude(route: Route, scanner: Scanner, content_type: bytes) -> BodyFacts:
    scanner.close()
    problem = scanner.problem
    if problem is None and scanner.top in b"{n":
        return _facts(route, scanner.members)
    if scanner.top == 0:
        problem = "the request has no body; send a JSON object with a model"
    elif content_type.startswith(b"multipart/"):
        problem = "the request body is a form, whose model is not read; send it to a node that has the model"
    elif problem is None:
        problem = "the request body is no JSON object; send one with a model"
    else:
        problem = f"the request body is not JSON: {problem}; send a JSON object with a model"
    return BodyFacts(problem=problem, stream=route.streams_by_default)


def _decode_small(body: bytes) -> dict[str, msgspec.Raw] | None:
    """The members of an ordinary body; None when only the exact scanner can tell.

    What is made of them equals the scanner's result because: msgspec is as strict as Go or stricter; its dict keeps every key that
    occurs, so a wanted key in other letters is seen; one spelled with escapes is ruled out first; and a repeated one is, since the dict
    lost its value, found more often in the body than in the values that the dict kept (once more: the key itself).
    """
    if len(body) > FAST_MAX_BYTES or (len(body) > STEP_BYTES and body.count(b'"') > FAST_MAX_QUOTES):
        return None
    if b"\\u" in body and _SPELLS_LETTERS.search(body) is not None:
        return None
    try:
        found = _decode_object(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return found if len(found) <= FAST_MAX_KEYS else None


def _members(found: dict[str, msgspec.Raw], body: bytes) -> list[Member] | None:
    """The wanted ones; None when only the exact scanner can tell."""
    members: list[Member] = []
    for key, value in found.items():
        spelled = _SPELLED.get(key)
        if spelled is None:
            if fold(key) in _WANTED:
                return None
            continue
        times = body.count(spelled)
        if times > 1 and times - 1 != sum(bytes(other).count(spelled) for other in found.values()):
            return None
        raw = bytes(value)
        size = len(raw)
        if size >= BLOB_MIN_BYTES and _may_hold_blob(raw):
            return None
        members.append(Member(key, raw if size <= CAPTURE_MAX_BYTES else None, raw[0], size, 0, 0, raw[:CAPTURE_MAX_BYTES]))
    return members


def _may_hold_blob(raw: bytes) -> bool:
    return any(len(part) >= BLOB_MIN_BYTES - 2 and b" " not in part and b"\\" not in part and part.isascii() for part in raw.split(b'"'))


# ---------------------------------------------------------------- from members to facts


def _facts(route: Route, members: list[Member]) -> BodyFacts:
    """What the members come to, in the order they stand, by Go's rules for each type."""
    native = route.protocol is Manners.NATIVE
    last: dict[str, Member] = {}
    options: dict[str, bytes] = {}
    problem: str | None = None
    names = 0
    for member in members:
        name, raw, first = member.name, member.raw, member.first
        if name == "model" or (name == "name" and route is Route.SHOW):
            names += 1
        if first == 0x6E:
            if name == "options":
                options = {}
            if name not in _STRINGS and (native or name != "stream"):
                last.pop(name, None)
            continue
        if name == "options" and raw is not None and first == 0x7B:
            options.update(_options(raw))
        elif name == "model" and (first != 0x22 or raw is None):
            problem = "the request's model is not a string; send its name" if raw else "the request's model name is too long"
        last[name] = member
    model: str | None = None
    if problem is None:
        model = _model(route, last)
        problem = None if model else 'the request names no model; set "model"'
    blobs = size = 0
    for name in _TEXT.get(route, ()):
        text = last.get(name)
        if text is not None:
            size += text.size - text.blob_bytes
            blobs += text.blobs
    load_only = _loads_only(route, last)
    return BodyFacts(
        model=model,
        problem=problem,
        stream=_flag(last.get("stream"), route.streams_by_default),
        runner_options=_runner_options(options, last.get("shift")) if native else "",
        input_tokens=size // BYTES_PER_TOKEN + blobs * IMAGE_TOKENS,
        output_limit=_output_limit(native, options, last),
        constrained=_constrained(native, last),
        load_only=load_only,
        unload=load_only and route in (Route.CHAT, Route.GENERATE) and _is_zero(last.get("keep_alive")),
        prefixes=_prefixes(route, last),
        named_once=names <= 1,
    )


def _prefixes(route: Route, last: dict[str, Member]) -> tuple[int, ...]:
    """Of the text that grows from turn to turn; all that a model reads before it must be the same."""
    main, *others = _TEXT.get(route, ("",))
    text = last.get(main)
    if text is None or route in EMBEDS:
        return ()
    return prefix_keys(text.head, [member.head for name in others if (member := last.get(name)) is not None])


def _model(route: Route, last: dict[str, Member]) -> str | None:
    member = last.get("model")
    model = go_string(member.raw) if member is not None and member.raw is not None else ""
    if not model and route is Route.SHOW and (member := last.get("name")) is not None and member.raw is not None and member.first == 0x22:
        model = go_string(member.raw)
    return model or None


def _flag(member: Member | None, default: bool) -> bool:
    if member is None or member.first not in b"tf":
        return default
    return member.first == 0x74


def _empty(member: Member | None) -> bool:
    return member is None or (member.raw is not None and is_empty(member.raw))


def _loads_only(route: Route, last: dict[str, Member]) -> bool:
    if route is Route.CHAT:
        return _empty(last.get("messages"))
    if route is Route.EMBED:
        return _empty(last.get("input"))
    return route in (Route.GENERATE, Route.EMBEDDINGS) and _empty(last.get("prompt"))


def _constrained(native: bool, last: dict[str, Member]) -> bool:
    if not _empty(last.get("tools")):
        return True
    if native:
        return not _empty(last.get("format"))
    return "response_format" in last or "text" in last


def _options(raw: bytes) -> dict[str, bytes]:
    """The members of one `options` object. Go keeps them in a map: no folding here, the last wins, null unsets."""
    try:
        return {key: bytes(value) for key, value in _decode_object(raw).items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        scanner = Scanner(lambda key: key if key in _RELOADING or key == "num_predict" else None)
        scanner.feed(raw)
        return {member.name: member.raw for member in scanner.members if member.raw is not None}


def _integer(raw: bytes | None) -> int | None:
    """A JSON number as Ollama takes it for an integer (1.5 is 1); None when it is none, or beyond 64 bits."""
    if raw is None or raw[0] not in b"-0123456789":
        return None
    value = float(raw)
    return int(value) if abs(value) < 2**63 else None


def _runner_options(options: dict[str, bytes], shift: Member | None) -> str:
    parts: list[str] = []
    for name in sorted(_RELOADING.intersection(options)):
        raw = options[name]
        if name == "use_mmap":
            if raw in (b"true", b"false"):
                parts.append(f"use_mmap={raw.decode()}")
        elif (value := _integer(raw)) is not None:
            parts.append(f"{name}={value}")
    if shift is not None and shift.first in b"tf":
        parts.append(f"shift={'true' if shift.first == 0x74 else 'false'}")
    return ",".join(parts)


def _output_limit(native: bool, options: dict[str, bytes], last: dict[str, Member]) -> int | None:
    if native:
        limit = _integer(options.get("num_predict"))
        return limit if limit is None or limit >= 0 else None
    given = [_integer(member.raw) for name in _LIMITS if (member := last.get(name)) is not None]
    return min((limit for limit in given if limit is not None and limit >= 0), default=None)


def _is_zero(keep_alive: Member | None) -> bool:
    """Whether `keep_alive` unloads at once: a number of seconds, or a Go duration, of less than a nanosecond."""
    if keep_alive is None or keep_alive.raw is None:
        return False
    raw = keep_alive.raw
    if keep_alive.first != 0x22:
        return raw[0] in b"-0123456789" and 0 <= float(raw) < 1e-9
    text = go_string(raw)
    if text in ("0", "+0", "-0"):
        return True
    if _DURATION.fullmatch(text) is None:
        return False
    return all(float(number) * _UNIT_NS[unit] < 1 for number, unit in _DURATION_PART.findall(text))
