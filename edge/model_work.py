"""Work on the models of one Ollama: pull, delete, copy, unload, and the look at its lists that says whether it is true.

Decides when a node's `success` is believed (with `core.transfer`); must never know tasks, other nodes or who asked. The coordinator uses
it for nodes and the agent for its own Ollama. Invariants: whoever stops waiting closes the connection, which stops a pull on the node and
loses nothing of it; a model is in no memory when its files go; an error is one sentence without paths of the node's disk.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import trio

from core.events import Upstream
from core.names import key_or_none
from core.transfer import Layer, PullReader, explained, what_is_wrong
from core.units import MIB, ModelKey
from edge.headers import own_request
from edge.pool import DialFailed, Pool
from edge.wire import UpstreamCut
from edge.wire_heads import Header

ANSWER_MAX_BYTES: Final = 32 * MIB
ANSWER_LIMIT_S: Final = 60.0
"""For everything but pulls; a busy node was seen to take 20 s for a list."""
DECODE_INLINE_BYTES: Final = 256 * 1024
"""Longer lists are decoded in a worker thread."""
BATCH_S: Final = 0.2
"""Between two looks at the lines of a pull, which come every 60 ms: several are read at once."""
UNLOADED_WITHIN_S: Final = 10.0
UNLOADED_POLL_S: Final = 0.1

Tell = Callable[[str, tuple[Layer, ...]], None]
"""Is told the last status line and the layers so far."""


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """How it ended. `error` None: it is done. `lost`: the node said no last word. `rows`: what the node lists now, if it was asked."""

    error: str | None = None
    lost: bool = False
    status: int = 0
    rows: list[Any] | None = None


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    status: int
    body: bytes


class NodeOllama:
    """One Ollama as the work sees it. `extra`: header fields that it wants (a gateway's credential)."""

    def __init__(self, pool: Pool, upstream: Upstream, *, extra: Sequence[Header] = ()) -> None:
        self._pool = pool
        self._upstream = upstream
        self._extra = extra

    # ------------------------------------------------------------ the work

    async def pull(self, model: str, *, insecure: bool, tell: Tell) -> Done:
        """Download `model` and see that it is there."""
        reader = PullReader()
        try:
            refused = await self._pull(reader, {"model": model, "stream": True, **({"insecure": True} if insecure else {})}, tell)
        except (DialFailed, UpstreamCut) as problem:
            if reader.error is None and not reader.succeeded:
                return Done(error=f"the connection to the node was lost: {problem}", lost=True)
            refused = None
        if refused is not None:
            return Done(error=explained(_error_of(refused)), status=refused.status)
        tell(reader.phase, reader.layers)
        if reader.error is not None:
            return Done(error=explained(reader.error))
        if not reader.succeeded:
            return Done(error="the node ended its answer without saying that the download was done", lost=True)
        try:
            rows = await self.installed()
        except (DialFailed, UpstreamCut, trio.TooSlowError) as problem:
            return Done(error=f"the download ended, but the node does not say what it holds: {problem}", lost=True)
        return Done(error=what_is_wrong(row_of(rows, key_or_none(model)), reader.layers), rows=rows)

    async def _pull(self, reader: PullReader, body: dict[str, Any], tell: Tell) -> _Answer | None:
        conn = await self._pool.dial(self._upstream)
        try:
            await conn.send(own_request(self._upstream, b"/api/pull", body, extra=self._extra))
            status = (await conn.read_head()).status
            if status != 200:
                return _Answer(status=status, body=await conn.read_some())
            while piece := await conn.read_some():
                reader.feed(piece)
                tell(reader.phase, reader.layers)
                await trio.sleep(BATCH_S)
            return None
        finally:
            reader.close()
            self._pool.give_back(conn)

    async def delete(self, model: str) -> Done:
        """Unload `model`, wait until it has left memory, and remove it. One that is not there is gone already."""
        key = key_or_none(model)
        try:
            if key is not None and await self._loaded(key):
                await self.unload(model)
                await self._wait_unloaded(key)
            answer = await self._ask(b"DELETE", b"/api/delete", {"model": model})
            rows = await self.installed()
        except (DialFailed, UpstreamCut, trio.TooSlowError) as problem:
            return _lost(problem)
        if answer.status not in (200, 404):
            return Done(error=explained(_error_of(answer)), status=answer.status, rows=rows)
        if row_of(rows, key) is not None:
            return Done(error="the node said that it removed the model, but lists it still", rows=rows)
        return Done(status=answer.status, rows=rows)

    async def copy(self, source: str, destination: str) -> Done:
        """Give `source` a second name."""
        try:
            answer = await self._ask(b"POST", b"/api/copy", {"source": source, "destination": destination})
            rows = await self.installed()
        except (DialFailed, UpstreamCut, trio.TooSlowError) as problem:
            return _lost(problem)
        if answer.status != 200:
            return Done(error=explained(_error_of(answer)), status=answer.status, rows=rows)
        if row_of(rows, key_or_none(destination)) is None:
            return Done(error="the node said that it made the copy, but does not list it", rows=rows)
        return Done(status=200, rows=rows)

    async def unload(self, model: str) -> Done:
        """Ask for `model` to leave memory; Ollama answers before it has."""
        try:
            answer = await self._ask(b"POST", b"/api/generate", {"model": model, "keep_alive": 0})
        except (DialFailed, UpstreamCut, trio.TooSlowError) as problem:
            return _lost(problem)
        return Done(status=answer.status, error=None if answer.status == 200 else explained(_error_of(answer)))

    async def order(self, method: str, path: str, body: object) -> int:
        """Tell a gateway something; the status of its answer. Raises DialFailed, UpstreamCut, trio.TooSlowError."""
        return (await self._ask(method.encode(), path.encode(), body)).status

    async def _loaded(self, key: ModelKey) -> bool:
        return row_of(await self._rows(b"/api/ps"), key) is not None

    async def _wait_unloaded(self, key: ModelKey) -> None:
        with trio.move_on_after(UNLOADED_WITHIN_S):
            while await self._loaded(key):  # noqa: ASYNC110  (another machine has no event for it)
                await trio.sleep(UNLOADED_POLL_S)

    # ------------------------------------------------------------ asking

    async def installed(self) -> list[Any]:
        """The rows of `/api/tags`. Raises DialFailed, UpstreamCut, trio.TooSlowError."""
        return await self._rows(b"/api/tags")

    async def _rows(self, path: bytes) -> list[Any]:
        answer = await self._ask(b"GET", path)
        if answer.status != 200:
            raise UpstreamCut(f"the node answered {path.decode()} with {answer.status}")
        try:
            if len(answer.body) <= DECODE_INLINE_BYTES:
                said = msgspec.json.decode(answer.body)
            else:
                said = await trio.to_thread.run_sync(msgspec.json.decode, answer.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise UpstreamCut(f"the node's answer to {path.decode()} is not JSON") from None
        rows = said.get("models") if isinstance(said, dict) else None
        return rows if isinstance(rows, list) else []

    async def _ask(self, method: bytes, path: bytes, body: object = None) -> _Answer:
        """A whole answer, over a new connection: what changes something must not be sent into one that is closing."""
        with trio.fail_after(ANSWER_LIMIT_S):
            conn = await self._pool.dial(self._upstream)
            try:
                await conn.send(own_request(self._upstream, path, body, method=method, extra=self._extra))
                status, data = (await conn.read_head()).status, bytearray()
                while piece := await conn.read_some():
                    data += piece
                    if len(data) > ANSWER_MAX_BYTES:
                        raise UpstreamCut(f"the node's answer to {path.decode()} is larger than {ANSWER_MAX_BYTES} bytes")
                return _Answer(status=status, body=bytes(data))
            finally:
                self._pool.give_back(conn)


def row_of(rows: Sequence[Any], key: ModelKey | None) -> Any:
    """The row of one model in a list; None when it is not there."""
    for row in rows:
        name = (row.get("name") or row.get("model")) if isinstance(row, dict) else row
        if isinstance(name, str) and key_or_none(name) == key:
            return row
    return None


def _lost(problem: Exception) -> Done:
    return Done(error=f"the connection to the node was lost: {problem or 'no answer in time'}", lost=True)


def _error_of(answer: _Answer) -> str:
    try:
        said = msgspec.json.decode(answer.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        said = None
    error = said.get("error") if isinstance(said, dict) else None
    return error if isinstance(error, str) and error else f"the node answered with status {answer.status}"
