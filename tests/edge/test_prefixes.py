"""How a prompt begins, in checksums."""

import pytest

from core.events import Route
from edge import body
from edge.body import inspect
from edge.facts import BodyFacts
from edge.prefixes import PREFIX_MAX_BYTES, prefix_keys

TURN = b'{"role":"user","content":"' + b"word and word " * 100 + b'"}'


def of(route: Route, text: bytes, *, more: bytes = b"", scan: bool = False, monkeypatch: pytest.MonkeyPatch | None = None) -> BodyFacts:
    if monkeypatch is not None:
        monkeypatch.setattr(body, "inspect_ordinary", lambda route, data: None)
    return inspect(route, b'{"model":"m","messages":' + text + more + b"}")


def turns(count: int) -> bytes:
    return b"[" + b",".join([TURN] * count) + b"]"


def test_a_turn_more_keeps_the_keys_of_the_turns_before() -> None:
    short, long = (of(Route.CHAT, turns(count)).prefixes for count in (3, 6))
    assert (len(short), len(long)) == (3, 4)
    assert long[:3] == short
    assert prefix_keys(TURN[:1000]) == ()


def test_another_beginning_or_other_tools_have_other_keys() -> None:
    plain = of(Route.CHAT, turns(3)).prefixes
    assert not set(plain) & set(of(Route.CHAT, turns(3).replace(b"word", b"ward", 1)).prefixes)
    assert not set(plain) & set(of(Route.CHAT, turns(3), more=b',"tools":[{"type":"function"}]').prefixes)
    assert plain == of(Route.CHAT, turns(3), more=b',"options":{"seed":1}').prefixes


def test_both_ways_to_read_a_body_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 3, 47, 60):
        quick = of(Route.V1_CHAT, turns(count), more=b',"stream":true')
        assert of(Route.V1_CHAT, turns(count), more=b',"stream":true', monkeypatch=monkeypatch) == quick
        monkeypatch.undo()
    assert len(of(Route.V1_CHAT, turns(200)).prefixes) == (PREFIX_MAX_BYTES // 1024).bit_length()


def test_embeddings_have_none() -> None:
    text = b'"' + b"word and word " * 200 + b'"'
    for more in (b"", b',"truncate":true'):
        assert inspect(Route.EMBED, b'{"model":"m","input":' + text + more + b"}").prefixes == ()
        assert len(inspect(Route.GENERATE, b'{"model":"m","prompt":' + text + more + b"}").prefixes) == 2
