"""An edge that sees no bytes: leases that are given back before the end is told, and those that heartbeats keep."""

import pytest

from core.config import RouterConfig
from core.events import Command, Count, Cut, Ending, Failure, Forward, Record
from core.leases import Held
from tests.core.routing import World, node_of, of, one, usage

REPORT_S = RouterConfig().report_s


def test_a_lease_that_is_given_back_makes_room_before_the_end_is_told() -> None:
    world = World()
    node = world.backend("one", "m", loaded=("m",))
    world.ask("r1")
    world.ask("r2")
    world.now += 2
    effects = world.free("r1", delivered=True, ttft_ms=500.0)
    assert node_of(effects, "r2") == node
    assert world.router.statistics().in_flight == 1
    world.now += 1
    record = one(world.settle("r1", usage=usage(), body_bytes=70), Record)
    assert (record.ending, record.duration_ms, record.ttft_ms) == (Ending.SUCCESS, 2000.0, 500.0)
    assert [(attempt.outcome, attempt.duration_ms) for attempt in record.attempts] == [("success", 2000.0)]
    assert record.usage == usage()


def test_what_the_node_tells_is_truer_than_what_the_edge_saw() -> None:
    world = World()
    world.backend("one", "m", loaded=("m",))
    world.ask("r")
    world.now += 3
    world.free("r", delivered=True, ttft_ms=900.0)
    world.now += 1
    record = one(world.settle("r", ttft_ms=750.0, duration_ms=2500.0), Record)
    assert (record.ttft_ms, record.duration_ms) == (750.0, 2500.0)


def test_an_end_that_was_never_told_is_unknown() -> None:
    world = World()
    world.backend("one", "m")
    world.ask("r")
    world.now += 2
    world.free("r")
    assert of(world.wait(REPORT_S - 0.1), Record) == []
    effects = world.wait(0.1)
    record = one(effects, Record)
    assert (record.ending, [attempt.outcome for attempt in record.attempts]) == (Ending.UNKNOWN, ["unknown"])
    assert record.attempts[0].duration_ms == 2000.0
    assert of(effects, Cut) == []
    assert world.router._requests == {}


def test_a_pulse_does_not_bring_back_what_was_given_back() -> None:
    world = World()
    world.backend("one", "m")
    world.ask("r")
    world.free("r")
    world.wait(REPORT_S / 2)
    world.pulse("r")
    assert one(world.wait(REPORT_S / 2), Record).ending is Ending.UNKNOWN


def test_a_draining_node_is_empty_when_its_last_lease_is_given_back() -> None:
    world = World()
    node = world.agent_with("one", "m")
    world.ask("r")
    world.order(node, Command.DRAIN)
    assert world.state(node) == "draining"
    world.free("r", delivered=True)
    assert world.state(node) == "held"
    assert one(world.settle("r"), Record).ending is Ending.SUCCESS


@pytest.mark.parametrize("delivered", [True, False])
def test_a_load_that_is_through_is_known_whether_its_bytes_were_seen_at_once_or_later(delivered: bool) -> None:
    world = World()
    node = world.backend("one", "m")
    world.ask("r")
    world.now += 5
    world.free("r", delivered=delivered)
    world.settle("r", usage=usage(load_s=3.0))
    inventory = world.inventory(node)
    assert (list(inventory.resident), inventory.loading) == (["registry.ollama.ai/library/m:latest"], {})


def test_a_client_that_left_is_no_sign_of_a_loaded_model() -> None:
    world = World()
    node = world.backend("one", "m")
    world.ask("r")
    world.free("r")
    world.settle("r", Ending.CANCELLED)
    assert (world.inventory(node).resident, world.inventory(node).loading) == ({}, {})


def test_what_is_freed_late_or_twice_changes_nothing() -> None:
    world = World()
    world.backend("one", "m")
    world.ask("waits", "nosuch")
    for request_id in ("nobody", "waits"):
        assert [count.labels for count in of(world.free(request_id), Count)] == [{"kind": "freed"}]
    world.ask("r")
    world.free("r")
    assert one(world.free("r"), Count).name == "late_reports_total"


def test_bytes_are_told_late_by_who_saw_none() -> None:
    world = World()
    world.backend("one", "m", loaded=("m",))
    world.ask("r")
    world.now += 4
    record = one(world.settle("r", ttft_ms=250.0, duration_ms=3000.0, usage=usage()), Record)
    assert (record.ttft_ms, record.duration_ms) == (250.0, 3000.0)
    assert record.observed_start_ms == 150.0


def test_a_told_end_lies_between_the_first_byte_and_now() -> None:
    world = World()
    world.backend("one", "m", loaded=("m",))
    world.ask("r")
    world.now += 1
    assert one(world.settle("r", ttft_ms=500.0, duration_ms=100.0), Record).duration_ms == 500.0
    world.ask("s")
    world.now += 1
    assert one(world.settle("s", ttft_ms=5000.0, duration_ms=9000.0), Record).duration_ms == 1000.0


def test_facts_of_an_attempt_mean_nothing_where_there_is_none() -> None:
    world = World()
    world.ask("r", "nosuch")
    world.now += 1
    record = one(world.settle("r", Ending.ERROR, ttft_ms=5.0, duration_ms=6.0), Record)
    assert (record.ttft_ms, record.duration_ms) == (None, 1000.0)


# ---------------------------------------------------------------- heartbeats


def test_heartbeats_keep_the_leases_of_what_is_inside_the_gateway() -> None:
    world = World(lease_ttl_s=30, agent_timeout_s=1000)
    node = world.agent_with("one", "m", slots=3)
    world.agent_with("two", "n")
    for request_id in ("kept", "lost"):
        world.ask(request_id)
    world.ask("elsewhere", "n")
    world.wait(20)
    world.beat(node, sequence=2, in_flight=["kept", "elsewhere", "a stranger's"])
    ended = of(world.wait(10), Record)
    assert [record.request_id for record in ended] == ["lost", "elsewhere"]
    assert one(world.wait(20), Record).request_id == "kept"


def test_an_old_heartbeat_keeps_nothing() -> None:
    world = World(lease_ttl_s=30, agent_timeout_s=1000)
    node = world.agent_with("one", "m")
    world.ask("r")
    world.wait(20)
    world.beat(node, sequence=1, in_flight=["r"])
    assert one(world.wait(10), Record).request_id == "r"


def test_an_agent_that_counts_no_heartbeats_keeps_its_leases_too() -> None:
    world = World(lease_ttl_s=30, agent_timeout_s=1000)
    node = world.agent_with("one", "m")
    world.ask("r")
    world.wait(20)
    world.beat(node, in_flight=["r"])
    assert of(world.wait(20), Record) == []


def test_what_was_given_back_is_not_kept_by_a_heartbeat() -> None:
    world = World()
    node = world.agent_with("one", "m")
    world.ask("r")
    world.free("r")
    world.beat(node, sequence=2, in_flight=["r"])
    assert world.router._ledger.all() == []


def test_a_failed_attempt_is_renewed_on_its_next_node_only() -> None:
    world = World(lease_ttl_s=30, agent_timeout_s=1000)
    first = world.agent_with("one", "m")
    second = world.agent_with("two", "m")
    world.ask("r")
    effects = world.fail("r", Failure.REFUSED)
    (held,) = world.router._ledger.all()
    assert isinstance(held, Held)
    tried = second if held.agent_id == first else first
    assert of(effects, Forward)
    world.wait(20)
    world.beat(tried, sequence=2, in_flight=["r"])
    assert one(world.wait(10), Record).request_id == "r"
