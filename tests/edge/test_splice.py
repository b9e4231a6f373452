"""Which bytes are replaced, held against a plain reading of the result; and that all others stay as they were."""

import json
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.events import Route
from edge.body import Body, BodyBudget, inspect
from edge.splice import Patch, Patched, Places, Span, find_places, text_value
from tests.edge.test_body import read


class Taken:
    def __init__(self) -> None:
        self.data = b""

    async def send(self, data: bytes) -> None:
        self.data += data


async def replaced(route: Route, data: bytes, model: str, *, num_ctx: int | None = None) -> bytes:
    """`data` as a node gets it, sent in one piece and in pieces."""
    body = Body(data, length=len(data), budget=BodyBudget())
    places = await find_places(route, body)
    patches = [places.model.becomes(text_value(model))] if places.model else []
    if num_ctx is not None and places.num_ctx is not None:
        patches.append(places.num_ctx.becomes(b"%d" % num_ctx))
    patched, taken = Patched(body, patches), Taken()
    await patched.send_to(taken)
    assert taken.data == patched.data
    assert len(taken.data) == patched.length
    return taken.data


@pytest.mark.parametrize(
    ("route", "data", "expected"),
    [
        (Route.CHAT, '{"model":"a","messages":[{"model":"a"}]}', '{"model":"NEW","messages":[{"model":"a"}]}'),
        (Route.CHAT, ' {"stream":true, "model" : "a" }tail "model":"a"', ' {"stream":true, "model" : "NEW" }tail "model":"a"'),
        (Route.CHAT, '{"model":"a","MODEL":"b"}', '{"model":"a","MODEL":"NEW"}'),
        (Route.CHAT, '{"MODEL":"b","model":"a"}', '{"MODEL":"b","model":"NEW"}'),
        (Route.CHAT, '{"model":"a","model":null}', '{"model":"NEW","model":null}'),
        (Route.CHAT, '{"mod\\u0065l":"\\u0061"}', '{"mod\\u0065l":"NEW"}'),
        (Route.CHAT, '{"model":7}', '{"model":7}'),
        (Route.CHAT, '{"name":"a"}', '{"name":"a"}'),
        (Route.SHOW, '{"name":"a"}', '{"name":"NEW"}'),
        (Route.SHOW, '{"name":"a","model":""}', '{"name":"NEW","model":""}'),
        (Route.SHOW, '{"model":"b","name":"a"}', '{"model":"NEW","name":"a"}'),
        (Route.SHOW, '{"model":""}', '{"model":"NEW"}'),
        (Route.CHAT, "[1]", "[1]"),
    ],
)  # fmt: skip
async def test_the_value_that_ollama_reads_is_the_one_that_is_replaced(route: Route, data: str, expected: str) -> None:
    assert await replaced(route, data.encode(), "NEW") == expected.encode()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ('"options":{"num_ctx":1024,"seed":1}', '"options":{"num_ctx":8192,"seed":1}'),
        ('"options":{"num_ctx":1,"num_ctx":2}', '"options":{"num_ctx":1,"num_ctx":8192}'),
        ('"options":{"NUM_CTX":1,"num_ctx":2}', '"options":{"NUM_CTX":1,"num_ctx":8192}'),
        ('"options":{"num_ctx":1},"Options":{"seed":2}', '"options":{"num_ctx":8192},"Options":{"seed":2}'),
        ('"options":{"num_ctx":1},"options":null', '"options":{"num_ctx":1},"options":null'),
    ],
)
async def test_the_context_length_too(options: str, expected: str) -> None:
    data = b'{"model":"a",%b}' % options.encode()
    assert await replaced(Route.CHAT, data, "a", num_ctx=8192) == b'{"model":"a",%b}' % expected.encode()


keys = st.sampled_from(["model", "Model", "MODEL", "mode\\u006c", "name", "stream", "options"])
values = st.sampled_from(['"a"', '"b\\u00e9"', "null", '""', '{"model":"x"}', "[]", "3"])


@given(st.sampled_from([Route.CHAT, Route.SHOW]), st.lists(st.tuples(keys, values), max_size=6), st.text(max_size=4))
async def test_what_is_read_afterwards_is_what_was_put_in(route: Route, members: list[tuple[str, str]], new: str) -> None:
    new = "n" + new.encode("utf-8", "replace").decode()
    data = "{" + ",".join(f'"{key}":{value}' for key, value in members) + "}"
    before = inspect(route, data.encode())
    after = inspect(route, await replaced(route, data.encode(), new))
    if before.model is not None:
        assert after.model == new
        assert after.named_once == before.named_once


@given(st.binary(min_size=20, max_size=200), st.data())
async def test_all_other_bytes_stay(data: bytes, draw: Any) -> None:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), min_size=4, max_size=4)))
    patches = [Patch(cuts[2], cuts[3], b"<2>"), Span(cuts[0], cuts[1]).becomes(b"")]
    body = Body(data, length=len(data), budget=BodyBudget())
    assert Patched(body, patches).data == data[: cuts[0]] + data[cuts[1] : cuts[2]] + b"<2>" + data[cuts[3] :]


async def test_a_body_on_disk_is_spliced_on_its_way() -> None:
    text = "x" * 1_500_000
    data = json.dumps({"messages": [{"role": "user", "content": text}], "model": "a", "options": {"num_ctx": 5}}).encode()
    body = await read(BodyBudget(), data)
    with closing(body):
        assert body.data is None
        places = await find_places(Route.CHAT, body)
        assert places.model is not None
        taken = Taken()
        patched = Patched(body, [places.model.becomes(b'"longer"')])
        await patched.send_to(taken)
        assert taken.data == data.replace(b'"model": "a"', b'"model": "longer"')
        assert (patched.data, patched.length) == (None, len(taken.data))


async def test_a_body_without_these_has_no_places() -> None:
    body = Body(b"{}", length=2, budget=BodyBudget())
    assert await find_places(Route.CHAT, body) == Places()
