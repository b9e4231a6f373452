"""What steps of the registry mean for others, from one look to the next.

Decides nothing: `core.registry` says what happened, `core.router` carries it over. Invariant: `any` is set exactly when there is something.
"""

from typing import TypeVar

from core.units import AgentId

K = TypeVar("K")


class Changes:
    """What the steps since the last look mean for others."""

    __slots__ = ("any", "forgotten", "lost", "reborn", "refreshed", "touched")

    def __init__(self) -> None:
        self.any = False
        """Whether there is something to carry over. An attribute, for it is read with every event."""
        self.touched = False
        """Whether somebody may be eligible now who was not, or the other way round."""
        self.lost: list[tuple[AgentId, str]] = []
        """Agents whose requests must be cut, and why."""
        self.forgotten: list[AgentId] = []
        """Agents that were deleted."""
        self.reborn: list[AgentId] = []
        """Agents of which a new run began: nothing that the former one did counts against it."""
        self.refreshed: list[AgentId] = []
        """Agents whose slots or models are others now."""

    def touch(self) -> None:
        """Somebody may be eligible now who was not, or the other way round."""
        self.any = self.touched = True

    def add(self, to: list[K], what: K) -> None:
        """`what` is to be carried over, as one of the list."""
        to.append(what)
        self.any = True
