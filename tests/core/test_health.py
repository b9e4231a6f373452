"""Whose fault a failure was, and who is passed over for how long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import RouterConfig
from core.events import Failure
from core.health import Cost, Fault, Health, classify
from core.units import AgentId, Instant, ModelKey, RequestId

NODE = AgentId("node")
A, B = ModelKey("a"), ModelKey("b")
TRY = RequestId("try")


def at(seconds: float) -> Instant:
    return Instant(seconds)


@pytest.mark.parametrize(
    ("failure", "status", "text", "fault", "cost", "own_answer"),
    [
        (Failure.REFUSED, 0, "", Fault.NODE, Cost.FREE, False),
        (Failure.NOT_TAKEN, 0, "", Fault.NODE, Cost.FREE, False),
        (Failure.DIED, 0, "", Fault.MODEL, Cost.BUDGETED, False),
        (Failure.EMPTY, 0, "", Fault.MODEL, Cost.BUDGETED, False),
        (Failure.BLANK, 0, "", Fault.MODEL, Cost.BUDGETED, False),
        (Failure.GARBLED, 0, "", Fault.MODEL, Cost.BUDGETED, False),
        (Failure.TIMEOUT, 0, "", Fault.MODEL, Cost.BUDGETED, False),
        (Failure.VANISHED, 0, "", Fault.NOBODY, Cost.BUDGETED, False),
        (Failure.INCOMPLETE, 0, "", Fault.MODEL, Cost.BUDGETED, True),
        (Failure.ANSWERED, 503, "server busy, please try again.  maximum pending requests exceeded", Fault.SATURATION, Cost.FREE, True),
        (Failure.ANSWERED, 503, "Loading model", Fault.SATURATION, Cost.FREE, True),
        (Failure.ANSWERED, 404, "model 'x' not found", Fault.NOBODY, Cost.FREE, True),
        (Failure.ANSWERED, 404, "404 page", Fault.CLIENT, Cost.FINAL, True),
        (Failure.ANSWERED, 400, '"x" does not support thinking', Fault.NOBODY, Cost.BUDGETED, True),
        (Failure.ANSWERED, 400, "model is required", Fault.CLIENT, Cost.FINAL, True),
        (Failure.ANSWERED, 401, "", Fault.CLIENT, Cost.FINAL, True),
        (Failure.ANSWERED, 413, "", Fault.CLIENT, Cost.FINAL, True),
        (Failure.ANSWERED, 499, "request canceled", Fault.NOBODY, Cost.BUDGETED, True),
        (Failure.ANSWERED, 501, "This server does not support embeddings.", Fault.CLIENT, Cost.FINAL, True),
        (Failure.ANSWERED, 500, "llama-server process no longer running: unknown ", Fault.MODEL, Cost.BUDGETED, True),
        (Failure.ANSWERED, 500, "model runner has unexpectedly stopped", Fault.MODEL, Cost.BUDGETED, True),
        (Failure.ANSWERED, 502, "", Fault.MODEL, Cost.BUDGETED, True),
        (Failure.ANSWERED, 500, 'option "num_ctx" must be of type integer', Fault.CLIENT, Cost.FINAL, True),
        (Failure.ANSWERED, 500, 'invalid format: "yaml"; expected "json" or a valid JSON Schema object', Fault.CLIENT, Cost.FINAL, True),
        (Failure.ANSWERED, 500, "XML syntax error on line 5: unexpected EOF", Fault.CLIENT, Cost.FINAL, True),
        (Failure.ANSWERED, 500, "failed to parse JSON: invalid character", Fault.CLIENT, Cost.FINAL, True),
        (Failure.ANSWERED, 500, 'llama-server returned invalid tool call arguments for "f"', Fault.CLIENT, Cost.FINAL, True),
        (Failure.ANSWERED, 500, "image input is not supported - hint: x", Fault.CLIENT, Cost.FINAL, True),
        (Failure.ANSWERED, 500, "llama-server response stream event exceeded 8 MB limit", Fault.CLIENT, Cost.FINAL, True),
    ],
)
def test_classification(failure: Failure, status: int, text: str, fault: Fault, cost: Cost, own_answer: bool) -> None:
    verdict = classify(failure, status=status, text=text)
    assert (verdict.fault, verdict.cost, verdict.own_answer) == (fault, cost, own_answer)


@given(st.sampled_from(Failure), st.integers(400, 599), st.text(), st.booleans())
def test_every_failure_has_a_verdict(failure: Failure, status: int, text: str, guard: bool) -> None:
    verdict = classify(failure, status=status, text=text, repeat_guard=guard)
    assert verdict.own_answer or 500 <= verdict.refuse_status <= 504
    assert verdict.cost is not Cost.FINAL or verdict.own_answer


def test_details_of_verdicts() -> None:
    assert classify(Failure.INCOMPLETE, repeat_guard=True).cost is Cost.FINAL
    assert classify(Failure.INCOMPLETE, repeat_guard=True).fault is Fault.NOBODY
    assert classify(Failure.ANSWERED, status=404, text="model 'x' not found").lacks_model
    assert classify(Failure.ANSWERED, status=400, text="does not support chat").cannot
    assert classify(Failure.ANSWERED, status=500, text="cudaMalloc failed: out of memory").lost_memory
    assert not classify(Failure.ANSWERED, status=500, text="exit status 1").lost_memory
    assert classify(Failure.TIMEOUT).refuse_status == 504


class Patient:
    """One node's health, told shortly."""

    def __init__(self, **config: float) -> None:
        self.health = Health(RouterConfig(**config))  # type: ignore[arg-type]

    def fail(self, now: float, key: ModelKey | None = A, fault: Fault = Fault.MODEL, times: int = 1) -> int:
        return sum(len(self.health.failed(NODE, key, fault, "died", request_id=TRY, now=at(now))) for _ in range(times))

    def out(self, now: float, key: ModelKey | None = A) -> bool:
        return self.health.ejection(NODE, key, now=at(now)) is not None


def test_so_many_failures_in_a_row_eject_the_model_on_the_node_and_only_that() -> None:
    patient = Patient(eject_after=3, eject_s=30)
    assert patient.fail(0, times=2) == 0
    assert patient.fail(0) == 1
    assert patient.out(29.9)
    assert not patient.out(0, B)
    (ejection,) = patient.health.ejections(NODE)
    assert (ejection.key, ejection.until, ejection.why) == (A, 30.0, "died")


def test_a_success_between_starts_the_count_anew() -> None:
    patient = Patient()
    patient.fail(0, times=2)
    patient.health.succeeded(NODE, A)
    assert patient.fail(0, times=2) == 0
    assert patient.health.quiet


def test_several_models_failing_eject_the_node_at_large() -> None:
    patient = Patient()
    assert patient.fail(0, A) + patient.fail(0, B) == 0
    assert patient.fail(0, A) == 1
    assert patient.out(1, ModelKey("third"))
    assert patient.out(1, None)


def test_a_node_that_cannot_be_reached_is_ejected_at_large() -> None:
    patient = Patient()
    assert patient.fail(0, A, Fault.NODE, times=2) == 0
    assert patient.fail(0, B, Fault.NODE) == 1
    assert patient.out(1, None)


@pytest.mark.parametrize("fault", [Fault.NOBODY, Fault.CLIENT, Fault.SATURATION])
def test_what_is_nobodys_fault_never_ejects(fault: Fault) -> None:
    patient = Patient()
    assert patient.fail(0, A, fault, times=50) == 0
    assert not patient.out(0)


def test_requests_that_name_no_model_count_for_the_node_only_together_with_others() -> None:
    patient = Patient()
    assert patient.fail(0, None, times=20) == 0
    assert patient.fail(0, A) == 1


def test_after_the_ejection_one_request_tries_alone() -> None:
    patient = Patient()
    patient.fail(0, times=3)
    assert not patient.out(30)
    patient.health.began(NODE, A, TRY)
    assert patient.out(31), "another one must wait for the trial"
    patient.health.ended(NODE, RequestId("another"))
    assert patient.out(32)
    patient.health.ended(NODE, TRY)
    assert not patient.out(33), "the trial told nothing: the next one tries"


def test_a_trial_that_answers_lifts_the_ejection_and_the_next_failure_brings_it_back() -> None:
    patient = Patient()
    patient.fail(0, times=3)
    patient.health.began(NODE, A, TRY)
    patient.health.delivered(NODE, A, TRY)
    assert patient.health.quiet
    assert patient.fail(31) == 1
    assert patient.out(90)
    assert not patient.out(91), "the second ejection is twice as long"


def test_a_first_byte_of_another_request_does_not_lift_an_ejection() -> None:
    patient = Patient()
    patient.fail(0, times=3)
    patient.health.delivered(NODE, A, RequestId("sent before"))
    assert patient.out(1)


def test_ejections_grow_up_to_the_longest_and_are_forgotten_after_a_good_while() -> None:
    patient = Patient(eject_s=30, eject_max_s=70)
    lengths, now = [], 0.0
    patient.fail(now, times=2)
    for _ in range(4):
        patient.fail(now)
        (ejection,) = patient.health.ejections(NODE)
        lengths.append(ejection.length_s)
        now = ejection.until
        patient.health.began(NODE, A, TRY)
    assert lengths == [30, 60, 70, 70]
    patient.health.succeeded(NODE, A)
    patient.fail(now + 71, times=3)
    assert patient.health.ejections(NODE)[0].length_s == 30


def test_failures_during_an_ejection_do_not_lengthen_it() -> None:
    patient = Patient()
    patient.fail(0, times=3)
    assert patient.fail(5, times=5) == 0
    assert not patient.out(30)


def test_a_failed_trial_of_a_node_at_large_ejects_it_again() -> None:
    patient = Patient()
    patient.fail(0, A, Fault.NODE, times=3)
    patient.health.began(NODE, B, TRY)
    assert patient.fail(31, B) == 1
    assert patient.out(60, A)


def test_one_success_clears_node_and_model_and_leaves_other_models() -> None:
    patient = Patient()
    patient.fail(0, A, times=3)
    patient.fail(0, B, times=3)
    patient.health.succeeded(NODE, A)
    assert not patient.out(1, A)
    assert patient.out(1, B)
    patient.health.succeeded(NODE, B)
    assert patient.health.quiet


def test_a_busy_node_is_paused_twice_as_long_each_time() -> None:
    patient = Patient(busy_pause_s=1, busy_pause_max_s=4)
    ends, now = [], 0.0
    for _ in range(4):
        patient.fail(now, fault=Fault.SATURATION, times=3)
        until = patient.health.paused_until(NODE, A, now=at(now))
        assert until is not None
        ends.append(until - now)
        now = until
    assert ends == [1, 2, 4, 4]
    assert patient.health.paused_until(NODE, A, now=at(now)) is None
    assert patient.health.paused_until(NODE, B, now=at(0)) is None
    patient.health.delivered(NODE, A, TRY)
    assert patient.health.quiet
    patient.health.pause(NODE, A, now=at(50))
    patient.health.pause(NODE, B, now=at(50))
    assert patient.health.paused_until(NODE, A, now=at(50)) == 51
    patient.health.succeeded(NODE, A)
    assert patient.health.paused_until(NODE, B, now=at(50)) == 51


def test_ends_of_pauses_and_ejections_wake_once_each() -> None:
    patient = Patient(busy_pause_s=1)
    assert patient.health.next_deadline() is None
    assert not patient.health.woken(now=at(0))
    patient.fail(0, times=3)
    patient.health.pause(NODE, B, now=at(0))
    assert patient.health.next_deadline() == 1
    assert not patient.health.woken(now=at(0.9))
    assert patient.health.woken(now=at(1))
    assert patient.health.next_deadline() == 30
    assert patient.health.woken(now=at(40))
    assert not patient.health.woken(now=at(40))
    assert patient.health.next_deadline() is None


def test_a_forgotten_node_starts_clean() -> None:
    patient = Patient()
    patient.fail(0, times=3)
    patient.health.forget(NODE)
    assert patient.health.quiet
    assert patient.fail(0, times=2) == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("fail", "busy", "begin", "deliver", "succeed", "end", "wait")),
            st.sampled_from((A, B, None)),
            st.integers(0, 40),
        )
    )
)
def test_counts_never_keep_what_has_succeeded_and_wakes_lie_ahead(steps: list[tuple[str, ModelKey | None, int]]) -> None:
    patient, now = Patient(), 0.0
    health = patient.health
    for what, key, seconds in steps:
        match what:
            case "fail":
                patient.fail(now, key)
            case "busy":
                patient.fail(now, key, Fault.SATURATION)
            case "begin":
                health.began(NODE, key, TRY)
            case "deliver":
                health.delivered(NODE, key, TRY)
            case "succeed":
                health.succeeded(NODE, key)
                assert not patient.out(now, key)
                assert health.paused_until(NODE, key, now=at(now)) is None
            case "end":
                health.ended(NODE, TRY)
            case _:
                now += seconds
                health.woken(now=at(now))
                deadline = health.next_deadline()
                assert deadline is None or deadline > now
        for ejection in health.ejections(NODE):
            assert ejection.length_s <= 300
