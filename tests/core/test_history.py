"""Records: their numbers, what redaction takes out, what is too old."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError
from core.history import DAY_MS, Numbers, default_max_bytes, first_number, number_of, oldest_kept, parse_mask, redacted
from core.units import UnixMs

NOW = UnixMs(1_800_000_000_000)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=40), st.integers(0, 1023))
def test_numbers_grow_whatever_the_calendar_does(steps: list[int], coordinator: int) -> None:
    numbers, now, given_out = Numbers(coordinator), int(NOW), []
    for step in steps:
        now += step
        given_out.append(numbers.next(UnixMs(now)))
    assert given_out == sorted(set(given_out))
    assert all(number < 1 << 63 for number in given_out)
    assert given_out[0] >= first_number(UnixMs(int(NOW) + steps[0]))


def test_a_millisecond_that_is_full_flows_over() -> None:
    numbers = Numbers(3)
    made = [numbers.next(NOW) for _ in range(3000)]
    assert made == sorted(set(made))
    assert number_of(NOW, 1024) == number_of(UnixMs(NOW + 1), 0)
    assert Numbers(4).next(NOW) not in made
    assert Numbers(3, after=made[-1]).next(NOW) > made[-1]


def redact(value: Any, *masks: str) -> Any:
    found = redacted(json.dumps(value).encode(), tuple(map(parse_mask, masks)))
    assert found is not None
    return json.loads(found)


def test_images_become_their_size_and_hash() -> None:
    blob = base64.b64encode(bytes(range(256)) * 3).decode()
    url = "data:image/png;base64," + blob
    found = redact({"images": [blob], "messages": [{"content": [{"image_url": {"url": url}}, "data:,x"]}], "n": 1, "prompt": "Hello"})
    assert found["images"][0].startswith("[base64, 1024 bytes, sha256 ")
    parts = found["messages"][0]["content"]
    assert parts[0]["image_url"]["url"].startswith(f"[image/png, {len(url)} bytes, sha256 ")
    assert parts[1].startswith("[data, 7 bytes")
    assert (found["n"], found["prompt"]) == (1, "Hello")


def test_long_prose_and_short_words_stay() -> None:
    prose = "It was a dark and stormy night. " * 40
    assert redact({"prompt": prose, "word": "QUJD"}) == {"prompt": prose, "word": "QUJD"}


def test_masked_paths_are_masked_in_every_letter_case() -> None:
    body = {"Messages": [{"content": "secret", "role": "user"}, "odd"], "user": {"name": "x", "id": 1}, "other": [1]}
    found = redact(body, "$.messages[].content", "user.name", "other.x", "user[]")
    assert found == {"Messages": [{"content": "[masked]", "role": "user"}, "odd"], "user": {"name": "[masked]", "id": 1}, "other": [1]}


@pytest.mark.parametrize("path", ["", "$", "a[0]", "a]", "[", "a..[]]"])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="HISTORY_MASK"):
        parse_mask(path)


@pytest.mark.parametrize("body", [b"", b"nonsense", b'{"a":', b'{"a":"\xff"}', b"[" * 5000])
def test_what_is_no_json_is_not_kept(body: bytes) -> None:
    assert redacted(body) is None


@given(
    st.recursive(
        st.none() | st.booleans() | st.text(max_size=300) | st.integers(-(2**40), 2**40),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=10,
    )
)
def test_redaction_leaves_json_json(value: Any) -> None:
    data = json.dumps(value).encode()
    found = redacted(data)
    assert found is None or type(json.loads(found)) is type(value)


def test_what_is_too_old_and_too_much() -> None:
    assert oldest_kept(NOW, 7) == first_number(UnixMs(NOW - 7 * DAY_MS))
    assert oldest_kept(UnixMs(5), 7) == 0
    assert (default_max_bytes(10**9), default_max_bytes(10**12), default_max_bytes(0)) == (10**8, 2 << 30, 1 << 20)
