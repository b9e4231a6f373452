"""Records: what is made of drafts, what becomes of bodies and of keys, and what may be kept of what came from elsewhere."""

import msgspec
import pytest

from core.events import Attempt
from core.history import EDGE_NGINX, HistoryRecord, number_of
from core.units import AgentId, UnixMs
from servers.records import restrict
from tests.servers.drafts import NOW, draft, read
from tests.servers.store.databases import record


def test_a_draft_becomes_a_record_where_it_is_read() -> None:
    found = read(draft()).finished()
    assert (found.at_ms, found.completed_at_ms, found.load_ms, found.client, found.key_id) == (NOW, NOW + 5, 2.0, "10.0.0.1", None)
    assert msgspec.json.decode(found.attempts) == [{"node": "node", "outcome": "success", "ms": 5.0}]
    assert (found.request_body, found.response_body, found.bodies) == (b"{}", b'{"done":true}', "whole")
    assert read(draft(usage=None)).finished().prompt_tokens == 0


def test_every_field_is_where_it_belongs() -> None:
    made = draft(predicted_start_ms=1.5, observed_start_ms=2.5, message="why", status=418, duration_ms=6.4, chunks=9, body_bytes=77)
    assert read(made).finished() == HistoryRecord(
        number=number_of(NOW, 0), request_id="id-0", at_ms=NOW, completed_at_ms=UnixMs(NOW + 6), request_type="chat", path="/api/chat",
        model="m", agent_id="a", agent_name="node", client="10.0.0.1", key_id=None, status="success", message="why", http_status=418,
        duration_ms=6.4, queue_ms=0.5, ttft_ms=2.0, predicted_start_ms=1.5, prompt_tokens=3, output_tokens=4, load_ms=2.0,
        attempts=b'[{"node":"node","outcome":"success","ms":5.0}]', edge="embedded", chunks=9, body_bytes=77, request_body=b"{}",
        response_body=b'{"done":true}', bodies="whole", observed_start_ms=2.5,
    )  # fmt: skip


@pytest.mark.parametrize(("told", "kept"), [(0.0, 0.0), (0.0004, 0.0), (0.0006, 0.001), (1234.56789, 1234.568), (1e9 / 3, 333333333.333)])
def test_times_of_attempts_are_rounded_to_microseconds(told: float, kept: float) -> None:
    attempt = Attempt(agent_id=AgentId("a"), agent_name="n", outcome="x", duration_ms=told)
    assert msgspec.json.decode(read(draft(attempts=(attempt,))).finished().attempts) == [{"node": "n", "outcome": "x", "ms": kept}]


def test_a_key_is_told_by_its_id_and_its_address() -> None:
    made = draft(client="key:k1")
    made.key_at = len("key:")
    assert (read(made).finished().client, read(made).finished().key_id) == ("10.0.0.2", "k1")


def test_what_was_captured_elsewhere_or_not_at_all_says_so() -> None:
    off, nginx, cut, secret = draft(), draft(), draft(), draft()
    off.capture.limit_bytes = 0
    nginx.capture.edge = EDGE_NGINX
    cut.capture.is_cut = True
    secret.capture.redact, secret.masks = True, (("done",),)
    assert [read(made).finished().bodies for made in (off, nginx, cut, secret)] == ["off", "not captured", "cut", "redacted"]
    assert read(secret).finished().response_body == b'{"done":"[masked]"}'


def test_a_record_from_elsewhere_keeps_no_more_than_ours_would() -> None:
    kept = {}
    for policy, limit in (("full", 1000), ("full", 4), ("redacted", 1000), ("off", 1000)):
        made = record(request_body=b'{"user":"me"}', response_body=None)
        restrict(made, policy, limit_bytes=limit, masks=(("user",),))
        kept[policy, limit] = (made.bodies, made.request_body)
    assert kept == {
        ("full", 1000): ("whole", b'{"user":"me"}'), ("full", 4): ("cut", b'{"us'),
        ("redacted", 1000): ("redacted", b'{"user":"[masked]"}'), ("off", 1000): ("off", None),
    }  # fmt: skip
