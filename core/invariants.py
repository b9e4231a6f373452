"""What must hold of a router after every step, by number.

Decides nothing; reads what the parts keep inside and recomputes it. Run by tests and by the simulator at each step; never in production,
for it looks at everything. The oracles that watch from outside (what clients saw, what nodes were sent) belong to those who drive it.

    R1  conservation: every live request is new to nobody: it waits, is on a node, is done there, or is answered
    R3  an attempt budget is kept
    R5  a request on a node has a lease there, and a waiting, done or answered one has none
    R6  a report is never older than the boot it belongs to
    R7  in flight is what the ledger holds; an agent's capacity is kept where the strategy holds back
    R8  every lease has a deadline, at most its time to live away
    R11 the queue keeps its limits, its order is that of the places, and nobody waits beyond the deadline
    R12 what waiting requests plan for is what is counted as planned
    R13 the next deadline is later than now, and the router wakes by then
    R15 an agent that is held, and one that has been emptied, drains no more
    R18 display names are unique, and an agent that may be given requests can be heard to fall silent
    R19 what is kept of nodes for the next choice is what would be found anew
"""

from core.agents import CHOSEN_BITS
from core.lifecycle import AgentState
from core.requests import Phase
from core.router import Router
from core.scoring import Auto
from core.units import Instant


def check(router: Router, *, now: Instant) -> None:
    """Assert all of them, of a router that has just handled an event or a tick at `now`.

    Raises:
        AssertionError: it names the number.
    """
    _check_requests(router)
    router._ledger.check()
    router._queue.check()
    router._dispatcher.check()
    _check_times(router, now)
    _check_agents(router)
    strategy = router._dispatcher._strategy
    if isinstance(strategy, Auto):
        strategy.check(router._registry.holders, router._registry.news.changes)


def _check_requests(router: Router) -> None:
    ledger, queue, answered, owed = router._ledger, router._queue, router._dispatcher.answered, router._dispatcher.owed
    for request in router._requests.values():
        on_node = request.phase in (Phase.TRYING, Phase.STREAMING)
        waits = request.phase is Phase.WAITING
        assert on_node or waits or request.phase in (Phase.ANSWERED, Phase.FREED), f"R1: request {request.id} is {request.phase.value}"
        assert waits == (request.id in queue), f"R1: request {request.id} is {request.phase.value} and the queue disagrees"
        assert (request.phase is Phase.ANSWERED) == (request.id in answered), f"R1: request {request.id} and its answer disagree"
        assert (request.phase is Phase.FREED) == (request.id in owed), f"R1: request {request.id} and what is owed for it disagree"
        assert on_node == (request.lease_id is not None), f"R5: request {request.id} is {request.phase.value} with lease {request.lease_id}"
        assert request.lease_id is None or request.lease_id in ledger, f"R5: the lease of request {request.id} does not live"
        assert request.spent <= router._config.retries_budgeted + 1, f"R3: request {request.id} spent {request.spent} attempts"
        assert waits or request.plan is None, f"R12: request {request.id} plans and does not wait"
    assert len(ledger) + len(queue) + len(answered) + len(owed) == len(router._requests), (
        "R1: something is held for a request that does not live"
    )
    again = sum(1 for request in router._requests.values() if request.attempt)
    assert len(queue) <= router._config.queue_max + again, "R11: the queue is too long"


def _check_times(router: Router, now: Instant) -> None:
    deadline = router.next_deadline()
    assert deadline is None or deadline > now, f"R13: the next deadline {deadline} is not after {now}"
    assert deadline is None or router.wake.at <= deadline, f"R13: the next deadline is {deadline}, and it wakes at {router.wake.at}"
    for held in router._ledger.all():
        until = router._ledger.until(held.lease_id)
        assert until is not None, f"R8: lease {held.lease_id} has no deadline"
        assert now < until <= now + router._config.lease_ttl_s, f"R8: lease {held.lease_id} lives until {until} at {now}"
    waits_until = router._queue.next_deadline()
    assert waits_until is None or waits_until > now, f"R11: somebody waits since {waits_until} for nothing"


def _check_agents(router: Router) -> None:
    names = [agent.name for agent in router._registry.all()]
    assert len(set(names)) == len(names), f"R18: names are not unique: {names}"
    for agent in router._registry.all():
        in_flight = router._ledger.in_flight(agent.id)
        rank = (in_flight + agent.beyond + 1 << CHOSEN_BITS) + agent.last_chosen
        assert (agent.in_flight, agent.rank) == (in_flight, rank), (
            f"R7: {agent.name} has {agent.in_flight} requests written down, the ledger {in_flight}"
        )
        assert agent.last_report >= (agent.boot, -1) or agent.last_report[0] == 0, f"R6: {agent.name} reported before its boot"
        if agent.state is AgentState.DRAINING:
            assert in_flight > 0, f"R15: {agent.name} drains and is empty"
        if agent.state in (AgentState.READY, AgentState.INITIALIZING, AgentState.DRAINING):
            assert router._registry.heard_until(agent.id) is not None, f"R18: {agent.name} is {agent.state.value} and has no deadline"
        if agent.state is AgentState.READY:
            assert agent.inventory.known, f"R5: {agent.name} is ready and its models are not known"
        assert agent in router._registry.ready() or agent.state is not AgentState.READY, f"R5: {agent.name} is ready and not listed"
    for agent in router._registry.ready():
        assert agent.state is AgentState.READY, f"R5: {agent.name} is listed as ready and is {agent.state.value}"
