"""The clock that programs give Trio: the system's steady one, as it is.

Decides nothing. Trio's own adds an offset to it, so that who mixes clocks finds out, in a call that takes longer than to read the clock,
several times a request. Here that is for the tests, whose clock stands. Seconds, from whenever the system likes.
"""

import time

import trio.abc


class SteadyClock(trio.abc.Clock):
    """For `trio.run`."""

    current_time = staticmethod(time.perf_counter)

    def start_clock(self) -> None:
        """Nothing is to be done."""

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Seconds until then."""
        return deadline - time.perf_counter()
