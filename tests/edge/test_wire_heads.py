"""What heads that differ only in the id that an edge gave them have in common."""

import pytest

from edge.wire import RequestHead, parse_request_head

ID = b"0123abcd-0000-4000-8000-00000000000"


def head_of(*lines: bytes) -> RequestHead:
    return parse_request_head(b"\r\n".join(lines) + b"\r\n\r\n")


def test_the_id_that_another_edge_gave_is_kept_apart() -> None:
    heads = [head_of(b"POST / HTTP/1.1", b"Host: x", b"X-Request-Id: %b%d" % (ID, n), b"A: b") for n in range(3)]
    assert [head.request_id for head in heads] == [ID + b"0", ID + b"1", ID + b"2"]
    assert len({id(head.block) for head in heads}) == 1, "what is equal is read once"
    assert heads[0].headers == [(b"Host", b"x"), (b"A", b"b")]
    assert head_of(b"POST / HTTP/1.1", b"Host: x").request_id == b""
    twice = head_of(b"POST / HTTP/1.1", b"Host: x", b"X-Request-Id: %b0" % ID, b"X-Request-Id: %b1" % ID)
    assert (twice.request_id, twice.fields[b"x-request-id"]) == (ID + b"0", ID + b"1")


@pytest.mark.parametrize("line", [b"X-Request-Id: mine", b"x-request-id: %b0" % ID, b"X-Request-Id:  %b0" % ID, b"X-Request-Id: %b0 " % ID])
def test_an_id_that_a_client_made_is_a_header_like_any_other(line: bytes) -> None:
    head = head_of(b"POST / HTTP/1.1", b"Host: x", line)
    assert (head.request_id, head.fields[b"x-request-id"]) == (b"", line.partition(b":")[2].strip())
