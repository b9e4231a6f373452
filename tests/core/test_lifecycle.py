"""The table of steps: complete, the only door, and what the words of each state promise."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import IllegalTransition
from core.lifecycle import REFUSED, TRANSITIONS, AgentInput, AgentState, advance

PAIRS = list(itertools.product(AgentState, AgentInput))
ALIVE = (AgentInput.HEARD_WELL, AgentInput.HEARD_ILL)


@pytest.mark.parametrize(("state", "given_input"), PAIRS)
def test_every_pair_is_a_step_or_refused_never_both(state: AgentState, given_input: AgentInput) -> None:
    pair = (state, given_input)
    assert (pair in TRANSITIONS) != (pair in REFUSED)
    if pair in TRANSITIONS:
        assert advance(state, given_input) is TRANSITIONS[pair]
    else:
        with pytest.raises(IllegalTransition, match=state.value):
            advance(state, given_input)


def test_nothing_else_is_in_the_tables() -> None:
    assert TRANSITIONS.keys() | REFUSED == set(PAIRS)


@pytest.mark.parametrize(
    ("state", "given_input", "after"),
    [
        (AgentState.OFFLINE, AgentInput.HEARD_WELL, AgentState.READY),
        (AgentState.READY, AgentInput.SILENT, AgentState.OFFLINE),
        (AgentState.READY, AgentInput.HEARD_ILL, AgentState.INITIALIZING),
        (AgentState.READY, AgentInput.DRAIN, AgentState.DRAINING),
        (AgentState.DRAINING, AgentInput.EMPTIED, AgentState.HELD),
        (AgentState.DRAINING, AgentInput.SILENT, AgentState.HELD),
        (AgentState.DRAINING, AgentInput.CONNECT, AgentState.INITIALIZING),
        (AgentState.HELD, AgentInput.REBOOTED, AgentState.INITIALIZING),
        (AgentState.PENDING, AgentInput.APPROVE, AgentState.INITIALIZING),
    ],
)
def test_steps_that_users_rely_on(state: AgentState, given_input: AgentInput, after: AgentState) -> None:
    assert advance(state, given_input) is after


@given(st.lists(st.sampled_from(AgentInput)))
def test_a_stranger_stays_pending_until_it_is_approved(inputs: list[AgentInput]) -> None:
    state = AgentState.PENDING
    for given_input in inputs:
        if given_input is AgentInput.APPROVE or (state, given_input) in REFUSED:
            continue
        state = advance(state, given_input)
        assert state is AgentState.PENDING


@given(st.lists(st.sampled_from(AgentInput)))
def test_what_is_held_comes_back_only_by_connect_or_reboot(inputs: list[AgentInput]) -> None:
    state = AgentState.HELD
    for given_input in inputs:
        if given_input in (AgentInput.CONNECT, AgentInput.REBOOTED) or (state, given_input) in REFUSED:
            continue
        state = advance(state, given_input)
        assert state is AgentState.HELD


@pytest.mark.parametrize("state", AgentState)
def test_only_what_is_heard_well_becomes_ready(state: AgentState) -> None:
    for given_input in AgentInput:
        if TRANSITIONS.get((state, given_input)) is AgentState.READY and state is not AgentState.READY:
            assert given_input is AgentInput.HEARD_WELL
