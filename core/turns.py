"""Whose turn it is on a runner that is wanted with different options, and when to look again.

Decides how long a runner is kept for the requests that fit it while others wait for one with other options; never which node those wait
for (`core.scoring`) nor how the runner is emptied (`core.dispatch`). Knows instants and one node's inventory.

Alternating would cost a load per request. So a runner that was just loaded serves its own kind for `HOLD_LOADS` times what its load took,
`HOLD_MAX_S` at most, and then lets the others have their turn; when it is idle it waits only `LINGER_S` for the next request of its own
kind, for a client that asks again takes a moment to do so.

The bound: with n kinds of options on one node, nobody waits longer than n - 1 times (a turn, what is in flight at its end, and a load),
and his own load.
"""

from typing import Final

from core.inventory import Inventory
from core.leases import Wake
from core.units import NEVER, Instant, ModelKey

HOLD_LOADS: Final = 3.0
"""At most a quarter of a contended runner's time goes into loads (while those take up to a third of `HOLD_MAX_S`)."""
HOLD_MAX_S: Final = 30.0
LINGER_LOADS: Final = 0.25
LINGER_S: Final = 1.0
"""An idle runner is kept for a quarter of a load, and no longer than this."""


def kept_until(inventory: Inventory, key: ModelKey, *, load_s: float, busy: bool) -> Instant:
    """Until when the resident runner of `key` is kept for those who fit it; an instant that has passed: the others may have it."""
    loaded_at = inventory.loaded_at.get(key)
    if loaded_at is None:  # somebody else loaded it, or long ago: its turn is over
        return Instant(0.0)
    until = loaded_at + min(HOLD_LOADS * load_s, HOLD_MAX_S)
    if not busy:
        until = min(until, inventory.used_at.get(key, loaded_at) + min(LINGER_LOADS * load_s, LINGER_S))
    return Instant(until)


class Alarm:
    """One deadline: the earliest of those that were set."""

    __slots__ = ("earliest", "wake")

    def __init__(self) -> None:
        self.earliest = NEVER
        self.wake = Wake()
        """Lowered by what is set."""

    def set(self, at: Instant) -> None:
        """Ring at `at`, unless it rings before."""
        self.earliest = min(self.earliest, at)
        self.wake.at = min(self.wake.at, at)

    def clear(self) -> None:
        """Ring not at all."""
        self.earliest = NEVER

    def rings(self, *, now: Instant) -> bool:
        """Whether a deadline has come; said once."""
        if self.earliest > now:
            return False
        self.clear()
        return True
