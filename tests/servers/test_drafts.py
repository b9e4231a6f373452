"""Drafts: what they hold, and what no encoding takes."""

import msgspec
import pytest

from core.events import Usage
from servers.records import Left
from tests.servers.drafts import draft, read


def test_a_row_is_read_field_by_field_as_it_was_left() -> None:
    made = draft(client="key:k1")
    made.key_at, made.masks = len("key:"), (("user",),)
    left, capture = read(made), made.capture
    assert (left.record, left.key_at, left.masks, left.dropped) == (made.record, made.key_at, made.masks, made.dropped)
    for name in ("path", "peer", "number", "limit_bytes", "redact", "stream", "edge", "request_body", "response", "is_cut"):
        assert getattr(left, name) == getattr(capture, name)
    assert len(made.row()) == len(Left.__struct_fields__)


def test_bodies_that_were_dropped_take_no_room_and_the_record_says_so() -> None:
    made = draft(body=b"x" * 100)
    assert made.size_bytes == 113
    made.drop_bodies()
    assert (made.size_bytes, read(made).finished().bodies, read(made).finished().response_body) == (0, "dropped", None)


def test_what_no_encoding_takes_is_tidied() -> None:
    made = draft(client="\udcff", model="a\ud800", agent_name=None, usage=Usage(prompt_tokens=2**70, output_tokens=-1))
    made.capture.path = "/\ud800"
    with pytest.raises((UnicodeEncodeError, OverflowError)):
        msgspec.msgpack.encode(made.row())
    found = msgspec.msgpack.decode(msgspec.msgpack.encode(made.tidied()), type=Left).finished()
    assert (found.client, found.model, found.path, found.agent_name) == ("?", "a?", "/?", None)
    assert (found.prompt_tokens, found.output_tokens) == (2**63 - 1, 0)
    assert draft(usage=None).tidied()[0].usage is None
