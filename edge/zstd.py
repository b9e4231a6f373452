"""A request body that came compressed with zstd, decoded so that the router can read what the node will.

Decides how much is decoded (as much as Ollama decodes, 20 MiB); never what it says. Nodes get the body as it came.

Invariants: what is decoded counts as a body of its own and is given back like one; a body that is no zstd, or too much, is None and not an
error: the node says so in its own words; a frame cannot ask for more than `WINDOW_MAX_BYTES` of memory, nor can all clients together
ask for more than `AT_ONCE` such windows; no step in the loop takes 2 ms.
"""

import sys
import time
from collections.abc import Mapping
from typing import Final

import trio

from core.events import Route
from core.units import MIB
from edge.body import PIECE_BYTES, STEP_S, Body, BodyBudget, Store

if sys.version_info >= (3, 14):
    from compression.zstd import DecompressionParameter, ZstdDecompressor, ZstdError
else:
    from backports.zstd import DecompressionParameter, ZstdDecompressor, ZstdError

DECODED_MAX_BYTES: Final = 20 * MIB
"""Ollama's own limit."""

WINDOW_MAX_BYTES: Final = 8 * MIB
"""What every decoder must be able to hold (RFC 8878)."""

AT_ONCE: Final = 8
STEP_BYTES: Final = 64 << 10

_ROUTES: Final = frozenset((Route.V1_CHAT, Route.V1_COMPLETIONS, Route.V1_EMBEDDINGS, Route.V1_RESPONSES, Route.V1_MESSAGES))
_OPTIONS: Final[Mapping[int, int]] = {DecompressionParameter.window_log_max: WINDOW_MAX_BYTES.bit_length() - 1}
_places: Final = trio.CapacityLimiter(AT_ONCE)


def is_compressed(route: Route, fields: Mapping[bytes, bytes]) -> bool:
    """Whether Ollama decodes the body of such a request first."""
    return route in _ROUTES and fields.get(b"content-encoding", b"").lower().startswith(b"zstd")


async def decoded(body: Body, budget: BodyBudget) -> Body | None:
    """What `body` holds, to be closed by the caller; None when it is too much. What is broken is decoded as far as it goes.

    Raises:
        HttpError: 503, there is no room for it now.
    """
    async with _places:
        store = Store(budget, spool=False)
        try:
            if await _decode(body, store):
                return await store.finish()
        except BaseException:
            store.discard()
            raise
        store.discard()
        return None


async def _decode(body: Body, store: Store) -> bool:
    """Fill `store`; False: it would be too much."""
    decoder, began = _decoder(), time.perf_counter()
    for offset in range(0, body.length, PIECE_BYTES):
        data = await body.read_at(offset)
        while data or not decoder.needs_input:
            try:
                piece = decoder.decompress(data, STEP_BYTES)
            except ZstdError:
                return True
            if store.length + len(piece) > DECODED_MAX_BYTES:
                return False
            if piece:
                await store.add(piece)
            data = b""
            if decoder.eof:
                data = decoder.unused_data
                decoder = _decoder()
            if time.perf_counter() - began > STEP_S:
                await trio.lowlevel.checkpoint()
                began = time.perf_counter()
    return True


def _decoder() -> ZstdDecompressor:
    return ZstdDecompressor(options=_OPTIONS)
