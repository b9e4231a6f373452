"""Clocks that run wrong, and alarms that ring at the instant set last."""

import math

from hypothesis import given
from hypothesis import strategies as st

from core.events import RequestCame, Route
from core.simulation.actors import Alarm, Clock, Connection
from core.simulation.script import Ask
from core.units import RequestId
from tests.core.simulation.worlds import played


@given(st.lists(st.tuples(st.floats(0.001, 1000), st.sampled_from([0.0, 0.02, 0.5, 1.0, 1.2])), max_size=20))
def test_local_time_never_goes_back_and_deadlines_convert(turns: list[tuple[float, float]]) -> None:
    clock, now, shown = Clock(now=0.0), 0.0, 0.0
    for gap, rate in turns:
        now += gap
        assert clock.local(now=now) >= shown - 1e-9
        clock.turn(rate, now=now)
        shown = clock.local(now=now)
        assert clock.when(shown + 1.0) == math.inf if rate == 0 else abs(clock.local(now=clock.when(shown + 1.0)) - shown - 1.0) < 1e-6


def test_a_true_clock_is_exact() -> None:
    clock = Clock(now=0.0)
    assert clock.local(now=12.345678) == 12.345678
    assert clock.when(12.345678) == 12.345678


def test_a_connection_begins_open_with_nothing_under_way() -> None:
    came = RequestCame(request_id=RequestId("r"), route=Route.CHAT, model="m")
    connection = Connection("r/1", 3, Ask(request=0), came, via_gateway=True)
    assert (connection.key, connection.node, connection.via_gateway) == ("r/1", 3, True)
    assert not connection.client_closed
    assert connection.arrives_up == connection.arrives_down == 0.0


def test_an_alarm_rings_once_at_the_instant_set_last() -> None:
    world = played([])
    rung: list[float] = []
    alarm = Alarm(world, rung.append)
    alarm.set(5.0)
    alarm.set(3.0)
    alarm.set(3.0)
    alarm.set(4.0)
    before = world.steps
    world.run(10_000)
    assert rung == [4.0]
    assert world.steps > before
    alarm.set(world.now + 1)
    alarm.set(math.inf)
    assert rung == [4.0]
