"""Compressed bodies: read as their node reads them, within limits, and given back."""

import os
from contextlib import closing

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from core.events import Route
from core.units import MIB
from edge.body import Body, BodyBudget
from edge.wire import HttpError
from edge.zstd import DECODED_MAX_BYTES, decoded, is_compressed
from tests.edge.test_body import read, replayed


async def back(data: bytes, budget: BodyBudget | None = None) -> bytes | None:
    """What `data` is decoded to; None: it is not."""
    budget = budget or BodyBudget()
    with closing(await read(budget, data)) as body:
        made = await decoded(body, budget)
        if made is None:
            return None
        with closing(made):
            return await replayed(made)


@given(st.lists(st.binary(max_size=300), max_size=4), st.integers(1, 19))
async def test_frame_after_frame_comes_back(parts: list[bytes], level: int) -> None:
    frames = [zstd.compress(part, level) for part in parts]
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    assert await back(skippable.join(frames)) == b"".join(parts)


async def test_a_large_one_goes_through_disk_and_memory() -> None:
    text = os.urandom(3 * MIB) + b"word " * MIB
    budget = BodyBudget()
    assert await back(zstd.compress(text), budget) == text
    assert budget.held_bytes == 0


async def test_a_bomb_is_not_decoded_further_than_ollama_does() -> None:
    budget = BodyBudget()
    assert await back(zstd.compress(bytes(1 << 30)), budget) is None
    assert budget.held_bytes == 0
    assert await back(zstd.compress(bytes(DECODED_MAX_BYTES)), budget) == bytes(DECODED_MAX_BYTES)
    assert await back(zstd.compress(bytes(DECODED_MAX_BYTES + 1)), budget) is None


async def test_a_frame_that_wants_a_huge_window_is_left_to_the_node() -> None:
    huge = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.content_size_flag: 0})
    assert await back(huge.compress(b"x" * 100) + huge.flush()) == b""


@pytest.mark.parametrize("data", [b"", b"{}", b"\x28\xb5\x2f\xfd", b'{"model":"m"}'])
async def test_what_is_none_is_decoded_to_nothing(data: bytes) -> None:
    assert await back(data) == b""


async def test_what_breaks_off_is_decoded_as_far_as_it_goes() -> None:
    text = os.urandom(200_000)
    got = await back(zstd.compress(text)[:-20_000])
    assert got
    assert text.startswith(got)


async def test_no_room_is_a_503_and_nothing_is_kept() -> None:
    data = zstd.compress(bytes(2 * MIB))
    budget = BodyBudget(memory_bytes=MIB, spool=False)
    body = Body(data, length=len(data), budget=budget)
    with pytest.raises(HttpError) as raised:
        await decoded(body, budget)
    assert raised.value.status == 503
    assert budget.held_bytes == 0


def test_only_openais_and_anthropics_inference_routes_take_it() -> None:
    fields = {b"content-encoding": b"zstd"}
    taking = [route for route in Route if is_compressed(route, fields)]
    assert taking == [Route.V1_CHAT, Route.V1_COMPLETIONS, Route.V1_EMBEDDINGS, Route.V1_RESPONSES, Route.V1_MESSAGES]
    assert not is_compressed(Route.V1_CHAT, {b"content-encoding": b"gzip"})
    assert not is_compressed(Route.V1_CHAT, {})
