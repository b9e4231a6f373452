"""The ledger against a plain model of it, and deadlines of one length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import LocalError
from core.leases import Expiry, Held, Ledger
from core.units import AgentId, Instant, LeaseId, ModelKey, RequestId

TTL_S = 8.0
IDS = st.sampled_from("abcdef")


def held(name: str, agent: str = "x", key: str | None = "m") -> Held:
    return Held(LeaseId(name), RequestId(name), AgentId(agent), None if key is None else ModelKey(key))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("grant", "renew", "release", "expire")),
            IDS,
            st.sampled_from("xy"),
            st.sampled_from((None, "m", "n")),
            st.integers(0, 12),
        )
    )
)
def test_the_ledger_is_what_a_plain_list_would_be(steps: list[tuple[str, str, str, str | None, int]]) -> None:
    ledger, plain, now = Ledger(TTL_S), {}, 0.0
    for what, name, agent, key, quarters in steps:
        now += quarters / 4
        at = Instant(now)
        if what == "grant" and name not in plain:
            ledger.grant(held(name, agent, key), now=at)
            plain[name] = (agent, key, now + TTL_S)
        elif what == "renew":
            ledger.renew(LeaseId(name), now=at)
            if name in plain:
                plain[name] = (*plain[name][:2], now + TTL_S)
        elif what == "release":
            assert (ledger.release(LeaseId(name)) is not None) == (plain.pop(name, None) is not None)
        elif what == "expire":
            due = sorted((entry[2], index, name) for index, (name, entry) in enumerate(plain.items()) if entry[2] <= now)
            assert {lease.lease_id for lease in ledger.expire(now=at)} == {name for _, _, name in due}
            for _, _, dead in due:
                del plain[dead]
        ledger.check()
        assert len(ledger) == len(plain)
        assert ledger.next_deadline() == min((entry[2] for entry in plain.values()), default=None)
        for each in "xy":
            on = [name for name, entry in plain.items() if entry[0] == each]
            assert ledger.in_flight(AgentId(each)) == len(on)
            assert {lease.lease_id for lease in ledger.on(AgentId(each))} == set(on)
            assert ledger.of_model(ModelKey("m")).get(AgentId(each), 0) == sum(1 for name in on if plain[name][1] == "m")
    assert {lease.lease_id for lease in ledger.all()} == plain.keys()
    assert {agent: len(leases) for agent, leases in ledger.by_agent().items()} == {
        agent: count for agent in "xy" if (count := sum(1 for entry in plain.values() if entry[0] == agent))
    }


def test_a_lease_ends_exactly_at_its_deadline_and_not_before() -> None:
    ledger = Ledger(TTL_S)
    ledger.grant(held("a"), now=Instant(0.0))
    ledger.renew(LeaseId("a"), now=Instant(4.0))
    assert ledger.until(LeaseId("a")) == 12.0
    assert ledger.expire(now=Instant(11.999)) == []
    assert [lease.lease_id for lease in ledger.expire(now=Instant(12.0))] == ["a"]
    assert LeaseId("a") not in ledger
    assert ledger.until(LeaseId("a")) is None
    ledger.renew(LeaseId("a"), now=Instant(13.0))
    assert len(ledger) == 0


def test_the_earliest_expires_first() -> None:
    ledger = Ledger(TTL_S)
    for at, name in enumerate("abc"):
        ledger.grant(held(name), now=Instant(at))
    ledger.renew(LeaseId("a"), now=Instant(3.0))
    assert [lease.lease_id for lease in ledger.expire(now=Instant(100.0))] == ["b", "c", "a"]


def test_no_lease_is_granted_twice() -> None:
    ledger = Ledger(TTL_S)
    ledger.grant(held("a"), now=Instant(0.0))
    with pytest.raises(LocalError, match="granted twice"):
        ledger.grant(held("a"), now=Instant(0.0))
    assert len(ledger) == 1


def test_a_request_without_a_model_counts_on_its_agent_only() -> None:
    ledger = Ledger(TTL_S)
    given = held("a", key=None)
    ledger.grant(given, now=Instant(0.0))
    assert ledger.in_flight(AgentId("x")) == 1
    assert ledger.of_model(None) == {}
    assert ledger.release(LeaseId("a")) is given
    ledger.check()


@pytest.mark.parametrize("part", ["_on", "_of"])
def test_the_check_finds_counts_that_differ(part: str) -> None:
    ledger = Ledger(TTL_S)
    ledger.grant(held("a"), now=Instant(0.0))
    getattr(ledger, part).clear()
    with pytest.raises(AssertionError, match="R7"):
        ledger.check()


def test_deadlines_of_one_length() -> None:
    expiry: Expiry[str] = Expiry(2.0)
    assert expiry.next_deadline() is None
    expiry.set("a", now=Instant(0.0))
    expiry.set("b", now=Instant(1.0))
    expiry.set("a", now=Instant(1.5))
    assert (len(expiry), "a" in expiry, expiry.until("a"), expiry.next_deadline()) == (2, True, 3.5, 3.0)
    assert expiry.due(now=Instant(3.0)) == ["b"]
    expiry.discard("a")
    expiry.discard("a")
    assert expiry.due(now=Instant(9.0)) == []
