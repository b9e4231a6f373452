"""Bodies read as Go reads them: folded and repeated keys, first value only, depth, broken text, and Go's words for what is wrong."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.simulated.asking import checked_think, duration_s, keep_alive_s
from agent.simulated.reading import Refusal, first_value, plain, read_request


def refusal(body: bytes, struct: str = "GenerateRequest") -> str:
    with pytest.raises(Refusal) as caught:
        read_request(body, struct)
    assert caught.value.status == 400
    return caught.value.text


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (b"null", {}),
        (b"{}", {}),
        (b' {"model":"a"} garbage', {"model": "a"}),
        (b'{"model":"a"}{"model":"b"}', {"model": "a"}),
        (b'{"model":"a","MODEL":"b"}', {"model": "b"}),
        (b'{"MODEL":"b","model":"a"}', {"model": "a"}),
        ('{"\u212aeep_alive":"1h"}'.encode(), {"keep_alive": "1h"}),
        ('{"prompt":"x","\u017fuffix":"y"}'.encode(), {"prompt": "x", "suffix": "y"}),
        (b'{"options":{"a":1,"b":1},"options":{"b":2}}', {"options": {"a": 1, "b": 2}}),
        (b'{"options":{"a":1},"options":null}', {}),
        (b'{"model":"a","model":null}', {"model": "a"}),
        (b'{"model":"\\ud800"}', {"model": "\ufffd"}),
        (b'{"model":"\xff"}', {"model": "\ufffd"}),
        (b'{"unknown":{"a":[1]},"stream":false}', {"stream": False}),
        (b'{"images":["aGk=",null]}', {"images": ["aGk="]}),
    ],
)
def test_what_a_body_says(body: bytes, fields: dict[str, object]) -> None:
    assert read_request(body, "GenerateRequest") == fields


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "missing request body"),
        (b" \n", "missing request body"),
        (b"xyz", "invalid character 'x' looking for beginning of value"),
        (b'{"a":1', "unexpected EOF"),
        (b'{"a":"b', "unexpected EOF"),
        (b'{"a": ', "unexpected EOF"),
        (b"{'a':1}", "invalid character '\\'' looking for beginning of object key string"),
        (b'{"a" 1}', "invalid character '1' after object key"),
        (b'{"a":1 "b":2}', "invalid character '\"' after object key:value pair"),
        (b'{"a":[1 2]}', "invalid character '2' after array element"),
        (b'{"a":[{} {}]}', "invalid character '{' after array element"),
        (b'{"a":1,}', "invalid character '}' looking for beginning of object key string"),
        (b'{"a":[1,]}', "invalid character ']' looking for beginning of value"),
        (b'{"a":"\n"}', "invalid character '\\n' in string literal"),
        (b'{"a":"\\q"}', "invalid character 'q' in string escape code"),
        (b'{"a":NaN}', "invalid character 'N' looking for beginning of value"),
        (b'{"a":1e999}', "json: cannot unmarshal number 1e999 into Go value of type float64"),
        (b"\x1f\x8b", "invalid character '\\x1f' looking for beginning of value"),
        (b"\xef\xbb\xbf{}", "invalid character 'ï' looking for beginning of value"),
        (b"[1]", "json: cannot unmarshal array into Go value of type api.GenerateRequest"),
        (b"true", "json: cannot unmarshal bool into Go value of type api.GenerateRequest"),
        (b'{"stream":"yes"}', "json: cannot unmarshal string into Go struct field GenerateRequest.stream of type bool"),
        (b'{"context":{}}', "json: cannot unmarshal object into Go struct field GenerateRequest.context of type []int"),
        (b'{"context":[1.5]}', "json: cannot unmarshal number 1.5 into Go struct field GenerateRequest.context of type int"),
        (b'{"images":[5]}', "json: cannot unmarshal number into Go struct field GenerateRequest.images of type string"),
        (b'{"options":[]}', "json: cannot unmarshal array into Go struct field GenerateRequest.options of type map[string]interface {}"),
    ],
)
def test_what_is_said_about_a_bad_body(body: bytes, text: str) -> None:
    assert refusal(body) == text


def test_a_number_of_thousands_of_digits_is_refused() -> None:
    assert "of type float64" in refusal(b'{"a":' + b"1" * 5_000 + b"}")


def test_nested_structs_are_checked_and_null_items_pass() -> None:
    assert "ChatRequest.messages of type []api.Message" in refusal(b'{"messages":"hi"}', "ChatRequest")
    assert "messages.content of type string" in refusal(b'{"messages":[{"content":[]}]}', "ChatRequest")
    assert "of type api.Message" in refusal(b'{"messages":[5]}', "ChatRequest")
    assert "api.ToolFunction" in refusal(b'{"tools":[{"function":5}]}', "ChatRequest")
    assert "of type float64" in refusal(b'{"temperature":"hot"}', "ChatCompletionRequest")
    assert "openai.ChatCompletionRequest" in refusal(b"[]", "ChatCompletionRequest")
    assert read_request(b'{"messages":[null,{"ROLE":"user"}]}', "ChatRequest") == {"messages": [{}, {"role": "user"}]}


@pytest.mark.parametrize("depth", [199, 200, 201, 9_990])
def test_deep_nesting_is_read(depth: int) -> None:
    body = b'{"model":"a","zzz":' + b"[" * depth + b"]" * depth + b',"prompt":"b"}'
    assert read_request(body, "GenerateRequest") == {"model": "a", "prompt": "b"}


def test_too_deep_nesting_and_an_open_end_are_refused() -> None:
    assert refusal(b"[" * 10_001) == "invalid character '[' exceeded max depth"
    assert refusal(b'{"zzz":' + b"[" * 5_000) == "unexpected EOF"


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_good_json_means_what_it_means(value: object) -> None:
    assert plain(first_value(json.dumps(value).encode())) == json.loads(
        json.dumps(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    )


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:\\tn1u ', max_size=60).map(str.encode))
def test_no_body_raises_anything_but_a_refusal(body: bytes) -> None:
    try:
        read_request(body, "ChatRequest")
    except Refusal:
        pass


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (5, 5.0),
        (0.5, 0.5),
        (-3, -1.0),
        ("1h30m", 5400.0),
        ("300ms", 0.3),
        ("0", 0.0),
        ("-1s", -1.0),
        ("1.5m", 90.0),
        ("+2s", 2.0),
    ],
)
def test_how_long_to_keep_a_model(value: object, seconds: float | None) -> None:
    assert keep_alive_s(value) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("-1", 'time: missing unit in duration "-1"'),
        ("soon", 'time: invalid duration "soon"'),
        ("", 'time: invalid duration ""'),
        ("5x", 'time: unknown unit "x" in duration "5x"'),
        (True, "Unsupported type: 'bool'"),
        ([], "Unsupported type: 'list'"),
    ],
)
def test_durations_that_are_none(value: object, text: str) -> None:
    with pytest.raises(Refusal) as caught:
        keep_alive_s(value)
    assert caught.value.text == text


@given(st.text(max_size=12))
def test_no_duration_raises_anything_but_a_refusal(text: str) -> None:
    try:
        assert isinstance(duration_s(text), float)
    except Refusal:
        pass


def test_thinking_is_on_off_or_not_said() -> None:
    assert [checked_think(value) for value in (None, True, False, "low")] == [None, True, False, True]
    for value in (5, [], {}):
        with pytest.raises(Refusal, match="think must be a boolean or string"):
            checked_think(value)
