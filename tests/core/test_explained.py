"""What is kept of one request's decisions."""

from core.explained import DECISIONS_MAX, Explained, Raw
from core.units import AgentId


def decision(number: int) -> Raw:
    return (float(number), f"decision {number}", [], AgentId(f"node {number}"), {"other": "is offline"})


def test_of_a_request_that_was_only_heard_of_no_decision_is_known() -> None:
    assert Explained().made() == []
    assert Explained("m").model == "m"


def test_decisions_are_kept_in_order_up_to_a_bound() -> None:
    known = Explained("m", *decision(0))
    for number in range(1, DECISIONS_MAX + 3):
        known.add(decision(number))
    assert known.made() == [decision(number) for number in range(DECISIONS_MAX)]


def test_the_first_decision_may_come_later() -> None:
    known = Explained()
    for number in range(3):
        known.add(decision(number))
    assert known.made() == [decision(0), decision(1), decision(2)]


def test_when_it_started_is_not_known_before_it_is_told() -> None:
    known = Explained()
    assert (known.expected_ms, known.observed_ms) == (None, None)
