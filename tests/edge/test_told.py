"""What a gateway tells of a failed answer comes back as it was; what contradicts itself is not believed."""

import json
from base64 import b64encode

import pytest

from core.events import Failure, Route
from edge.relay import Failed, Kept
from edge.told import ANSWER_MAX_BYTES, TEXT_MAX_CHARS, telling, told
from edge.wire import ResponseHead

UNFINISHED = b'{"model":"m","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":"%s"},"done":false}'


def kept(status: int, body: bytes, content_type: bytes = b"application/json") -> Kept:
    head = ResponseHead(status, b"X", [(b"Content-Type", content_type)], {b"content-type": content_type}, "length", len(body))
    return Kept(head=head, body=body)


def carried(failed: Failed) -> tuple[int, dict[bytes, bytes]]:
    """As nginx brings it: the status, and the headers."""
    answer = telling(failed)
    return answer.status, {name.lower(): value for name, value in answer.headers}


def back(failed: Failed, route: Route = Route.CHAT) -> Failed | None:
    status, fields = carried(failed)
    return told(route, fields, status)


@pytest.mark.parametrize("failure", sorted(set(Failure) - {Failure.ANSWERED, Failure.INCOMPLETE}, key=lambda failure: failure.value))
def test_the_gateways_own_failures_come_back_with_their_words(failure: Failure) -> None:
    answer = telling(Failed(failure=failure, text="it \u2603 broke"))
    assert answer.status == 502
    assert json.loads(answer.body) == {"error": "it \u2603 broke"}
    assert back(Failed(failure=failure, text="it \u2603 broke")) == Failed(failure=failure, text="it \u2603 broke")


@pytest.mark.parametrize("status", [400, 404, 499, 500, 503, 599])
def test_ollamas_own_answer_comes_back_byte_for_byte(status: int) -> None:
    body = b'{"error":"model \'x\' not found \xe2\x98\x83"}\n'
    failed = back(Failed(failure=Failure.ANSWERED, status=status, text="...", kept=kept(status, body, b"text/plain; charset=x")))
    assert failed is not None
    assert (failed.failure, failed.status, failed.text) == (Failure.ANSWERED, status, "model 'x' not found \u2603")
    assert failed.kept is not None
    assert (failed.kept.head.status, failed.kept.body, failed.kept.head.fields) == (
        status,
        body,
        {b"content-type": b"text/plain; charset=x"},
    )
    assert failed.kept.head.content_length == len(body)


@pytest.mark.parametrize(("said", "guard"), [(b"half an answ", False), (b"word " * 40, True)])
def test_an_unfinished_answer_comes_back_judged(said: bytes, guard: bool) -> None:
    body = UNFINISHED % said
    failed = Failed(failure=Failure.INCOMPLETE, status=200, text="x", repeat_guard=guard, kept=kept(200, body))
    assert telling(failed).status == 502
    found = back(failed)
    assert found is not None
    assert (found.failure, found.repeat_guard) == (Failure.INCOMPLETE, guard)
    assert found.kept is not None
    assert (found.kept.head.status, found.kept.body) == (200, body)


def test_an_odd_content_type_breaks_nothing() -> None:
    failed = Failed(failure=Failure.ANSWERED, status=500, kept=kept(500, b"x", b"text/pl\xe4in"))
    assert telling(failed).content_type == "text/pl?in"
    found = back(failed)
    assert found is not None
    assert found.kept is not None
    assert found.kept.head.fields == {b"content-type": b"text/pl\xe4in"}


def test_what_does_not_fit_is_not_told() -> None:
    long = b"x" * (ANSWER_MAX_BYTES + 1)
    for failure, status in ((Failure.ANSWERED, 500), (Failure.INCOMPLETE, 200)):
        failed = Failed(failure=failure, status=status, kept=kept(status, long))
        assert telling(failed).headers == []
        assert telling(failed).status == (500 if failure is Failure.ANSWERED else 502)
        assert back(failed) is None
    assert back(Failed(failure=Failure.ANSWERED, status=500, kept=kept(500, long[1:]))) is not None
    endless = Failed(failure=Failure.ANSWERED, status=500, text="an error of two megabytes")
    assert (telling(endless).status, telling(endless).headers) == (500, [])
    assert json.loads(telling(endless).body) == {"error": "an error of two megabytes"}
    wordy = back(Failed(failure=Failure.DIED, text="\u2603" * 10_000))
    assert wordy is not None
    assert wordy.text == "\u2603" * TEXT_MAX_CHARS
    assert sum(len(value) for _, value in telling(Failed(failure=Failure.DIED, text="\u2603" * 10_000)).headers) < 2 * ANSWER_MAX_BYTES


def test_a_failure_without_words_gets_some() -> None:
    found = back(Failed(failure=Failure.DIED))
    assert found is not None
    assert found.text == "Ollama failed before it answered"
    assert told(Route.CHAT, {b"x-ollama-router-failure": b"died"}, 502) == Failed(
        failure=Failure.DIED, text="the node failed before it answered"
    )


GOOD = b64encode(b'{"error":"x"}')


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 500),
        ({}, 0),
        ({b"x-ollama-router-failure": b"hunger"}, 502),
        ({b"x-ollama-router-failure": b"answered"}, 502),
        ({b"x-ollama-router-failure": b"incomplete"}, 502),
        ({b"x-ollama-router-failure": b"incomplete", b"x-ollama-router-answer": b64encode(b'{"done":true}')}, 502),
        ({b"x-ollama-router-answer": b"no base64!"}, 500),
        ({b"x-ollama-router-answer": b"YQ"}, 500),
        ({b"x-ollama-router-answer": b"\xff"}, 500),
        ({b"x-ollama-router-answer": GOOD}, 0),
        ({b"x-ollama-router-answer": GOOD}, 200),
        ({b"x-ollama-router-answer": GOOD}, 600),
    ],
)
def test_what_contradicts_itself_is_not_believed(fields: dict[bytes, bytes], status: int) -> None:
    assert told(Route.CHAT, fields, status) is None


def test_an_answer_without_a_type_is_json() -> None:
    found = told(Route.CHAT, {b"x-ollama-router-answer": GOOD}, 500)
    assert found is not None
    assert found.kept is not None
    assert found.kept.head.fields == {b"content-type": b"application/json; charset=utf-8"}
