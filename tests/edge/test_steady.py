"""The clock of a program's run."""

import time

import trio

from edge.steady import SteadyClock


def test_it_is_the_systems_and_deadlines_come() -> None:
    async def look() -> bool:
        before, now, after = time.perf_counter(), trio.current_time(), time.perf_counter()
        assert before <= now <= after
        with trio.move_on_at(now + 0.001) as scope:
            await trio.sleep_forever()
        assert trio.current_time() >= now + 0.001
        return scope.cancelled_caught

    assert trio.run(look, clock=SteadyClock())


def test_a_deadline_that_has_passed_is_not_waited_for() -> None:
    clock = SteadyClock()
    clock.start_clock()
    assert clock.deadline_to_sleep_time(clock.current_time()) <= 0.0 < clock.deadline_to_sleep_time(clock.current_time() + 60.0) <= 60.0
