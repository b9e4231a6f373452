"""Turns on a runner: how long it is kept for its own kind, and the alarm that ends a turn."""

from core.inventory import Inventory
from core.names import normalise
from core.turns import HOLD_LOADS, HOLD_MAX_S, LINGER_LOADS, LINGER_S, Alarm, kept_until
from core.units import NEVER, Instant

M = normalise("m")


def loaded(at_s: float) -> Inventory:
    inventory = Inventory()
    inventory.report_installed([{"name": "m"}])
    inventory.saw_loaded(M, "num_ctx=1", now=Instant(at_s))
    return inventory


def test_a_busy_runner_is_kept_for_some_loads_time_and_never_for_long() -> None:
    assert kept_until(loaded(100.0), M, load_s=4.0, busy=True) == 100.0 + HOLD_LOADS * 4.0
    assert kept_until(loaded(100.0), M, load_s=400.0, busy=True) == 100.0 + HOLD_MAX_S


def test_an_idle_runner_is_kept_for_a_moment_after_its_last_request() -> None:
    inventory = loaded(100.0)
    assert kept_until(inventory, M, load_s=2.0, busy=False) == 100.0 + LINGER_LOADS * 2.0, "none has ended yet"
    inventory.used_at[M] = Instant(103.0)
    assert kept_until(inventory, M, load_s=2.0, busy=False) == 103.0 + LINGER_LOADS * 2.0
    assert kept_until(inventory, M, load_s=60.0, busy=False) == 103.0 + LINGER_S
    inventory.used_at[M] = Instant(106.0)
    assert kept_until(inventory, M, load_s=2.0, busy=False) == 100.0 + HOLD_LOADS * 2.0, "lingering does not lengthen the turn"


def test_a_runner_that_others_loaded_has_had_its_turn() -> None:
    inventory = Inventory()
    inventory.report_installed([{"name": "m"}])
    inventory.report_loaded([{"name": "m"}], asked_at=Instant(1.0), now=Instant(1.0))
    assert kept_until(inventory, M, load_s=5.0, busy=True) == 0.0


def test_the_alarm_rings_once_at_the_earliest_deadline() -> None:
    alarm = Alarm()
    assert not alarm.rings(now=Instant(1e9))
    alarm.set(Instant(5.0))
    alarm.set(Instant(9.0))
    assert alarm.earliest == 5.0
    assert not alarm.rings(now=Instant(4.9))
    assert alarm.rings(now=Instant(5.0))
    assert not alarm.rings(now=Instant(99.0))
    alarm.set(Instant(3.0))
    alarm.clear()
    assert alarm.earliest == NEVER
