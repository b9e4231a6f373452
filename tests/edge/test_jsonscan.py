"""The scanner against Python's own JSON reader, in every way of cutting, and against Go's rules where the two differ."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge.jsonscan import BLOB_MIN_BYTES, CAPTURE_MAX_BYTES, DEPTH_MAX, Member, Scanner, fold, go_string, is_empty
from tests.edge.readers import Pairs, python_reads

SPACE = st.sampled_from([b"", b" ", b"\n\t", b"\r\n "])


def scan(data: bytes, *, size: int = 4096) -> Scanner:
    scanner = Scanner(lambda key: key)
    for at in range(0, len(data), size):
        scanner.feed(data[at : at + size])
    scanner.close()
    assert scanner.done
    return scanner


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)),
    max_leaves=12,
)


@st.composite
def spaced(draw: st.DrawFn, value: Any) -> bytes:
    """`value` as JSON, with white space wherever it may stand."""

    def gap() -> bytes:
        return draw(SPACE)

    match value:
        case list():
            return gap() + b"[" + b",".join([draw(spaced(item)) for item in value] or [gap()]) + b"]" + gap()
        case dict():
            pairs = [gap() + json.dumps(key).encode() + gap() + b":" + draw(spaced(item)) for key, item in value.items()]
            return gap() + b"{" + b",".join(pairs or [gap()]) + b"}" + gap()
        case _:
            return gap() + json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass") + gap()


documents = json_values.flatmap(spaced)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A document with a few bytes changed, lost or added."""
    data = bytearray(draw(documents))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 2))] = draw(
            st.sampled_from([b"", b'"', b"\\", b"{", b"}", b"]", b",", b":", b"0", b"-", b"\x00", b"\xff", b"u"])
        )
    return bytes(data)


@given(st.one_of(documents, damaged(), st.binary(max_size=12)), st.integers(1, 9))
@example(b'{"a":"\xe2\x82"}', 1)
@example(b"nullx", 2)
@example(b"0+", 1)
@example(b'{"a":1}x', 3)
@example(b'{"a":tru e}', 2)
@example(b'{"a":"\\ud83d\\ude00\\ud83d"}', 1)
def test_it_accepts_what_python_accepts_however_it_is_cut(data: bytes, size: int) -> None:
    scanner = scan(data, size=size)
    whole = scan(data)
    assert (scanner.problem, scanner.members, scanner.top) == (whole.problem, whole.members, whole.top)
    try:
        expected = python_reads(data)
    except ValueError:
        assert scanner.problem is not None
        return
    assert scanner.problem is None
    if not isinstance(expected, Pairs):
        return
    assert [member.name for member in scanner.members] == [key for key, _ in expected]
    for member, (_, value) in zip(scanner.members, expected, strict=True):
        assert member.raw is not None
        assert (member.first, member.size) == (member.raw[0], len(member.raw))
        assert python_reads(member.raw) == value
        assert data[member.start : member.start + member.size] == member.raw
        assert is_empty(member.raw) is (value in ("", []))


@pytest.mark.parametrize("size", [4096, 4095, 1])
@pytest.mark.parametrize("brackets", [b"[]", b"{}"])
def test_ten_thousand_levels_and_no_more(size: int, brackets: bytes) -> None:
    inner = brackets[:1] if brackets == b"[]" else b'{"":'
    for levels, fine in ((DEPTH_MAX, True), (DEPTH_MAX + 1, False)):
        data = inner * (levels - 1) + brackets + brackets[1:] * (levels - 1)
        assert (scan(data, size=size).problem is None) is fine


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'""', ""),
        (b'"\xff\xfea"', "\ufffd\ufffda"),
        (b'"\xe2\x82"', "\ufffd\ufffd"),
        (b'"\xed\xa0\x80"', "\ufffd\ufffd\ufffd"),
        (b'"\\ud800"', "\ufffd"),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b'"\\ud800\\ud83d\\ude00"', "\ufffd\U0001f600"),
        (b'"\\ud800\\u0041"', "\ufffdA"),
        (b'"\\u212a\\n\xff"', "\u212a\n\ufffd"),
    ],
)
def test_strings_are_decoded_as_go_does(raw: bytes, text: str) -> None:
    assert go_string(raw) == text


def test_only_two_strangers_fold_to_ascii() -> None:
    strange = {chr(code): fold(chr(code)) for code in range(128, 0x110000) if fold(chr(code)).isascii()}
    assert strange == {"\u017f": "s", "\u212a": "k"}
    assert fold("\u212aEEP_ALIVE") == "keep_alive"


@pytest.mark.parametrize("size", [97, 4096, 1 << 20])
def test_long_values_are_measured_and_only_their_beginning_is_kept(size: int) -> None:
    image = b'"data:image/png;base64,' + b"A" * 100_000 + b'"'
    prose = b'"' + b"word " * 20_000 + b'"'
    escaped = b'"' + b"A" * 50_000 + b"\\n" + b"A" * 50_000 + b'"'
    chinese = b'"' + "字".encode() * 3_000 + b'"'
    parts = [image, prose, escaped, chinese]
    data = b'{"m":[' + b",".join(parts) + b'],"n":1,"k' + b"x" * 20_000 + b'":2,"' + b"k" * 20 + b'":3}'
    members = scan(data, size=size).members
    assert members == [
        Member("m", None, 0x5B, sum(map(len, parts)) + 5, 1, len(image), data[5 : 5 + CAPTURE_MAX_BYTES], 5),
        Member("n", b"1", 0x31, 1, 0, 0, b"1", data.index(b'"n":') + 4),
        Member("k" * 20, b"3", 0x33, 1, 0, 0, b"3", len(data) - 2),
    ]


@pytest.mark.parametrize("length", [BLOB_MIN_BYTES - 1, BLOB_MIN_BYTES, BLOB_MIN_BYTES + 1, 3 * BLOB_MIN_BYTES])
@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_a_blob_is_the_same_in_pieces(length: int, size: int) -> None:
    data = b'{"m":"' + b"A" * (length - 2) + b'"}'
    (member,) = scan(data, size=size).members
    assert member.blobs == (length >= BLOB_MIN_BYTES)
    assert member.blob_bytes == (length if length >= BLOB_MIN_BYTES else 0)


@pytest.mark.parametrize("over", [0, 1])
def test_what_is_kept_has_a_limit(over: int) -> None:
    data = b'{"m":"' + b"a b " * ((CAPTURE_MAX_BYTES - 2) // 4) + b"xx" + b"y" * over + b'"}'
    (member,) = scan(data).members
    assert (member.raw is None) is bool(over)
    assert member.size == CAPTURE_MAX_BYTES + over


@pytest.mark.parametrize(("end", "fine"), [(b'\\u00e9"', True), (b'\\q"', False), (b'\\u00g9"', False), (b'\x01"', False), (b"\\", False)])
@pytest.mark.parametrize("size", [1, 10_001, 10_003])
def test_a_long_string_is_as_strict_as_a_short_one(end: bytes, fine: bool, size: int) -> None:
    assert (scan(b'"' + b"x" * 10_000 + end, size=size).problem is None) is fine


def test_a_number_without_end_is_refused() -> None:
    assert "number" in (scan(b'{"m":' + b"1" * 200_000 + b"}").problem or "")


def test_bytes_after_the_value_are_not_looked_at() -> None:
    scanner = Scanner(lambda key: key)
    scanner.feed(b'{"a":1}')
    assert scanner.done
    scanner.feed(b"}}}")
    scanner.close()
    assert scanner.problem is None
