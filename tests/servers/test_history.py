"""From a request's end to its draft: whose it is, what of its bodies is kept, and when its draft is made."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest

from core.events import Record, Route
from core.history import Numbers
from core.units import RequestId, UnixMs
from servers import history as module
from servers.drafts import Draft
from servers.history import History
from servers.records import Left
from tests.servers.drafts import NOW, draft, read

BODY, ANSWER = b'{"model":"m"}', b'{"done":true}'


@dataclass(frozen=True)
class Caller:
    """A connection, and what is asked on it."""

    peer_host: str = "10.0.0.9"
    peer_port: int = 1
    path: str = "/api/chat"
    fields: Mapping[bytes, bytes] = field(default_factory=dict)


def record(name: str = "r", **fields: Any) -> Record:
    return msgspec.structs.replace(draft(**fields).record, request_id=RequestId(name))


class Kept:
    """A history, and the drafts that it put."""

    def __init__(self, bodies: str = "full", body_max_bytes: int = 1 << 20) -> None:
        self.drafts: list[Draft] = []
        self.history: Any = History(
            put=self.drafts.append, bodies=bodies, body_max_bytes=body_max_bytes, numbers=Numbers(), clock=lambda: UnixMs(NOW)
        )

    def leave(
        self, caller: Caller = Caller(), name: str = "r", *, route: Route = Route.CHAT, answer: bytes = ANSWER, **fields: Any
    ) -> None:
        self.history.record(record(name, **fields))
        self.history.leave(RequestId(name), caller, caller, route, False, self.history.number(), BODY, answer)

    def left(self) -> list[Left]:
        self.history.gather()
        return [read(made) for made in self.drafts]


def test_a_request_that_was_left_is_as_one_that_was_captured() -> None:
    kept, caller = Kept(), Caller()
    number = kept.history.number()
    capture = kept.history.open(RequestId("r"), caller, caller, Route.CHAT, False, number)
    capture.hold_request(BODY)
    capture.take(ANSWER)
    kept.history.record(record())
    kept.leave()
    captured, left = kept.left()
    assert left == msgspec.structs.replace(captured, number=left.number)
    assert left.number > captured.number == number
    assert (left.peer, left.path, left.request_body, left.response, left.limit_bytes) == ("10.0.0.9", "/api/chat", BODY, [ANSWER], 1 << 20)


def test_drafts_are_made_some_at_once_or_when_they_are_asked_for_or_large() -> None:
    kept = Kept()
    for number in range(module.TOGETHER - 1):
        kept.leave(name=str(number))
    assert kept.drafts == []
    kept.leave(name="last")
    assert [made.record.request_id for made in kept.drafts] == [*map(str, range(module.TOGETHER - 1)), "last"]
    kept.leave(name="small")
    kept.leave(name="large", answer=b"x" * (module.LARGE_BYTES + 1))
    assert [made.record.request_id for made in kept.drafts[module.TOGETHER :]] == ["small", "large"]
    kept.leave(name="more")
    assert len(kept.left()) == len(kept.left()) == module.TOGETHER + 3


@pytest.mark.parametrize(
    ("bodies", "wish", "kept_as"),
    [
        ("full", None, "whole"), ("full", b"redacted", "redacted"), ("full", b" OFF ", "off"), ("full", b"what", "off"),
        ("redacted", b"full", "redacted"), ("off", b"full", "off"), ("off", None, "off"),
    ],
)  # fmt: skip
def test_a_wish_only_lessens_what_is_kept_and_is_nobody_elses(bodies: str, wish: bytes | None, kept_as: str) -> None:
    kept, plain = Kept(bodies), Caller()
    wishing = replace(plain, fields={} if wish is None else {b"x-router-history": wish})
    for caller in (plain, wishing, plain):
        kept.leave(caller)
    before, found, after = (left.finished() for left in kept.left())
    assert found.bodies == kept_as
    assert (found.request_body, found.response_body) == ((None, None) if kept_as == "off" else (BODY, ANSWER))
    assert before.bodies == after.bodies == {"full": "whole"}.get(bodies, bodies)


def test_whose_it_is_goes_by_its_own_connection_and_headers() -> None:
    kept = Kept()
    kept.history.client_address = lambda conn, head: head.fields.get(b"x-real-ip", conn.peer_host.encode()).decode()
    same: dict[bytes, bytes] = {}
    for caller in (
        Caller("10.0.0.1", fields=same),
        Caller("10.0.0.2", fields=same),
        Caller("10.0.0.2", fields={b"x-real-ip": b"10.0.0.3"}),
    ):
        kept.leave(caller, client="key:k1")
    assert [(left.finished().client, left.finished().key_id) for left in kept.left()] == [(f"10.0.0.{n}", "k1") for n in (1, 2, 3)]


def test_what_asks_no_model_or_was_not_told_of_is_not_recorded() -> None:
    kept, caller = Kept(), Caller()
    kept.leave(route=Route.SHOW)
    kept.history.leave(RequestId("r"), caller, caller, Route.CHAT, False, kept.history.number(), BODY, ANSWER)
    kept.history.record(record("another"))
    kept.history.leave(RequestId("r"), caller, caller, Route.CHAT, False, kept.history.number(), BODY, ANSWER)
    assert kept.history.open(RequestId("r"), caller, caller, Route.SHOW, False, kept.history.number()) is None
    assert kept.left() == []


def test_a_mistake_is_its_own_requests_and_takes_no_other_with_it() -> None:
    kept = Kept()
    told = iter([1, 0, 1])
    kept.history.client_address = lambda *_: f"10.0.0.{1 // next(told)}"
    kept.leave(Caller(), "first")
    failing = Caller()
    with pytest.raises(ZeroDivisionError):
        kept.leave(failing, "second")
    kept.leave(failing, "third")
    assert [(left.record.request_id, left.peer) for left in kept.left()] == [("first", "10.0.0.1"), ("third", "10.0.0.1")]


def test_where_no_bodies_are_kept_none_waits() -> None:
    kept = Kept("off")
    kept.leave()
    assert BODY.decode() not in repr(kept.history._left)
    assert ANSWER.decode() not in repr(kept.history._left)
