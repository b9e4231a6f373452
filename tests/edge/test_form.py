"""Forms as clients write them, and as nobody should."""

import secrets
from contextlib import closing

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.body import BodyBudget
from edge.facts import BodyFacts
from edge.form import PARTS_MAX, _Form, read_form
from edge.splice import Patched, Span
from tests.edge.test_body import read

TYPE = b'multipart/form-data; boundary="xyz"'


def part(name: str, value: bytes, *more: str) -> bytes:
    return b'--xyz\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (name.encode(), "".join(more).encode(), value)


async def facts(data: bytes, content_type: bytes = TYPE, query: bytes = b"") -> tuple[BodyFacts, Span | None]:
    with closing(await read(BodyBudget(), data)) as body:
        return await read_form(body, content_type, query)


@given(st.binary(max_size=50), st.booleans(), st.sampled_from(["whisper", "a:b", "m\u00f6del"]))
async def test_what_a_client_writes_is_read(sound: bytes, first: bool, model: str) -> None:
    fields = {"model": model, "language": "de"} if first else {"language": "de", "prompt": 'name="model"', "model": model}
    request = httpx.Request("POST", "http://x/", data=fields, files={"file": ("model.wav", sound, "audio/wav")})
    data = request.read()
    found, span = await facts(data, request.headers["content-type"].encode())
    assert (found.model, found.problem, found.named_once, found.stream) == (model, None, True, False)
    assert span is not None
    with closing(await read(BodyBudget(), data)) as body:
        patched = Patched(body, [span.becomes(b"other")])
        assert patched.data is not None
        again, _ = await facts(patched.data, request.headers["content-type"].encode())
        assert again.model == "other"


async def test_a_large_file_before_the_model_is_passed_over() -> None:
    sound = secrets.token_bytes(3 << 20) + b"\r\n--xy"
    data = part("file", sound, '; filename="model"') + part("model", b"m") + b"--xyz--\r\n"
    found, span = await facts(data)
    assert found.model == "m"
    assert span == Span(data.rindex(b"\r\nm\r\n") + 2, data.rindex(b"\r\nm\r\n") + 3)


@given(st.integers(1, 200))
def test_pieces_of_any_size_make_no_difference(size: int) -> None:
    data = part("file", b"\r\n--x\r\n--xy\r\n-", '; filename="f"') + part("model", b"m\r\n") + part("empty", b"") + b"--xyz--\r\nrest"
    form = _Form(b"xyz")
    for at in range(0, len(data), size):
        form.feed(data[at : at + size])
    assert form.done
    assert [value for value, _ in form.models] == [b"m\r\n"]
    assert [data[span.start : span.end] for _, span in form.models] == [b"m\r\n"]


async def test_a_second_model_is_told_and_the_first_counts() -> None:
    data = part("model", b"a") + part("model", b"b") + b"--xyz--"
    found, _ = await facts(data)
    assert (found.model, found.named_once) == ("a", False)
    found, _ = await facts(part("model", b"a") + b"--xyz--", query=b"model=b")
    assert (found.model, found.named_once) == ("a", False)


@pytest.mark.parametrize(
    ("data", "content_type"),
    [
        (b"", TYPE),
        (b"{}", b"application/json"),
        (part("model", b"m") + b"--xyz--", b"multipart/form-data"),
        (part("model", b"m"), TYPE),
        (part("model", b"") + b"--xyz--", TYPE),
        (part("model", b"m" * 2000) + b"--xyz--", TYPE),
        (part("model", b"m" * 3000), TYPE),
        (part("model", b"m", '; filename="f"') + b"--xyz--", TYPE),
        (part("file", b"m") + b"--xyz--", TYPE),
        (b"--xyz\r\n" + b"X: y\r\n" * 3000, TYPE),
        (b"--xyz trailing\r\nA: b\r\n\r\n\r\n--xyz--", TYPE),
        (part("a", b"b") * (PARTS_MAX + 1) + part("model", b"m") + b"--xyz--", TYPE),
    ],
)
async def test_what_is_no_such_form_has_no_model(data: bytes, content_type: bytes) -> None:
    found, span = await facts(data, content_type)
    assert found.model is None
    assert found.problem
    assert span is None
