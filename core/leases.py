"""The ledger of work in flight, and deadlines that all last equally long.

Decides when a lease is over; never who gets one. In flight is not a number that is kept in step: it is the size of what the ledger
holds. Invariants: R7 every count is recomputable from the leases alone; R8 a lease ends at the latest `ttl_s` after it was granted or
renewed last; a lease that was released or has expired is gone, and saying so again changes nothing.
"""

from collections.abc import Hashable, Mapping
from itertools import takewhile
from typing import Final, Generic, TypeVar

from core.errors import LocalError
from core.parts import Part
from core.structs import mypyc_attr
from core.units import NEVER, AgentId, Instant, LeaseId, ModelKey, RequestId

K = TypeVar("K", bound=Hashable)

NONE: Final[dict[AgentId, int]] = {}
"""Nobody has any. Never changed."""


class Wake:
    """When to look at some clocks, in one number: never later than the earliest of their deadlines. Each lowers it when it sets an earlier
    one; a deadline that falls away leaves it, for somebody looks too early then, finds nothing due, and sets it anew."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = NEVER


class Expiry(Generic[K]):
    """Deadlines of one common length. As `now` never goes back, the last one set is the last one due: all steps are O(1), but to ask for
    the earliest after many are gone."""

    __slots__ = ("ttl_s", "until_of", "wake")

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self.wake = Wake()
        """Lowered by what is set."""
        self.until_of: dict[K, Instant] = {}
        """All deadlines, the earliest first."""

    @property
    def earliest(self) -> Instant:
        """The earliest deadline."""
        return next(iter(self.until_of.values()), NEVER)

    def __len__(self) -> int:
        return len(self.until_of)

    def __contains__(self, key: K) -> bool:
        return key in self.until_of

    def set(self, key: K, *, now: Instant) -> None:
        """`key` is due at `now + ttl_s`, whatever was set before."""
        until, due = self.until_of, Instant(now + self.ttl_s)
        if key in until:
            del until[key]  # it goes to the end
        until[key] = due
        if due < self.wake.at:
            self.wake.at = due

    def until(self, key: K) -> Instant | None:
        """When `key` is due; None when it is not here."""
        return self.until_of.get(key)

    def discard(self, key: K) -> None:
        """`key` is never due."""
        self.until_of.pop(key, None)

    def next_deadline(self) -> Instant | None:
        """The earliest deadline."""
        return next(iter(self.until_of.values()), None)

    def due(self, *, now: Instant) -> list[K]:
        """Take out what is due at `now`, the earliest first."""
        taken = [key for key, _ in takewhile(lambda entry: entry[1] <= now, self.until_of.items())]
        for key in taken:
            del self.until_of[key]
        return taken


@mypyc_attr(acyclic=True)
class Held:
    """One live lease. `key` is None when the request does not run a model. Never changed."""

    __slots__ = ("agent_id", "key", "lease_id", "request_id")

    def __init__(self, lease_id: LeaseId, request_id: RequestId, agent_id: AgentId, key: ModelKey | None) -> None:
        self.lease_id: Final = lease_id
        self.request_id: Final = request_id
        self.agent_id: Final = agent_id
        self.key: Final = key


_Facts = tuple[LeaseId, RequestId, AgentId, ModelKey | None]


def _facts(held: Held) -> _Facts:
    """What a lease says: in a router that was put back from a snapshot it is said by more than one object."""
    return held.lease_id, held.request_id, held.agent_id, held.key


class Ledger(Part):
    """All live leases."""

    __slots__ = ("_expiry", "_held", "_of", "_on")

    def __init__(self, ttl_s: float) -> None:
        self._held: dict[LeaseId, Held] = {}
        self._on: dict[AgentId, dict[LeaseId, Held]] = {}
        self._of: dict[ModelKey, dict[AgentId, int]] = {}
        self._expiry: Expiry[LeaseId] = Expiry(ttl_s)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, lease_id: LeaseId) -> bool:
        return lease_id in self._held

    def grant(self, held: Held, now: Instant) -> int:
        """`held` lives from now on. Returns how many leases of its model live on its agent then; 0 when it runs none.

        Raises:
            LocalError: a lease of that id lives already.
        """
        lease_id, agent_id, key = held.lease_id, held.agent_id, held.key
        if lease_id in self._held:
            raise LocalError(f"lease {lease_id} was granted twice")
        self._held[lease_id] = held
        on = self._on.get(agent_id)
        if on is None:
            on = self._on[agent_id] = {}
        on[lease_id] = held
        expiry = self._expiry
        until = expiry.until_of[lease_id] = Instant(now + expiry.ttl_s)  # `set` of a new key, without its call
        if until < expiry.wake.at:
            expiry.wake.at = until
        if key is None:
            return 0
        of = self._of.get(key)
        if of is None:
            of = self._of[key] = {}
        count = of[agent_id] = of.get(agent_id, 0) + 1
        return count

    def renew(self, lease_id: LeaseId, *, now: Instant) -> None:
        """A shell still works on it; nothing happens when it does not live any more."""
        if lease_id in self._held:
            self._expiry.set(lease_id, now=now)

    def release(self, lease_id: LeaseId) -> Held | None:
        """End the lease; None when it does not live (any more)."""
        held = self._held.pop(lease_id, None)
        if held is None:
            return None
        del self._expiry.until_of[lease_id]
        agent_id, key = held.agent_id, held.key
        on = self._on[agent_id]
        del on[lease_id]
        if not on:
            del self._on[agent_id]
        if key is not None:
            of = self._of[key]
            left = of[agent_id] - 1
            if left:
                of[agent_id] = left
            else:
                del of[agent_id]
                if not of:
                    del self._of[key]
        return held

    def expire(self, *, now: Instant) -> list[Held]:
        """Release the leases whose deadline has come, the earliest first."""
        due = [lease_id for lease_id, until in takewhile(lambda entry: entry[1] <= now, self._expiry.until_of.items())]
        return [held for lease_id in due if (held := self.release(lease_id)) is not None]

    def next_deadline(self) -> Instant | None:
        """When the next lease expires."""
        return self._expiry.next_deadline()

    @property
    def deadlines(self) -> Expiry[LeaseId]:
        """Of all leases. The ledger's own: read it."""
        return self._expiry

    def until(self, lease_id: LeaseId) -> Instant | None:
        """When this lease expires; None when it does not live."""
        return self._expiry.until(lease_id)

    def in_flight(self, agent_id: AgentId) -> int:
        """Live leases on an agent."""
        return len(self._on.get(agent_id, ()))

    def by_agent(self) -> dict[AgentId, dict[LeaseId, Held]]:
        """Live leases per agent; agents without any are absent. The ledger's own: read it, do not keep it."""
        return self._on

    def by_model(self) -> dict[ModelKey, dict[AgentId, int]]:
        """`of_model` of all models that have any. The ledger's own: read it, do not keep it."""
        return self._of

    def of_model(self, key: ModelKey | None) -> Mapping[AgentId, int]:
        """Live leases per agent for one model; agents without any are absent. The ledger's own: read it, do not keep it."""
        return NONE if key is None else self._of.get(key, NONE)

    def on(self, agent_id: AgentId) -> list[Held]:
        """Live leases on an agent, the oldest first."""
        return list(self._on.get(agent_id, {}).values())

    def all(self) -> list[Held]:
        """All live leases, the oldest first."""
        return list(self._held.values())

    def check(self) -> None:
        """Recompute what is kept for speed (R7).

        Raises:
            AssertionError: it differs.
        """
        on: dict[AgentId, dict[LeaseId, _Facts]] = {}
        of: dict[ModelKey, dict[AgentId, int]] = {}
        for lease_id, held in self._held.items():
            on.setdefault(held.agent_id, {})[lease_id] = _facts(held)
            if held.key is not None:
                counts = of.setdefault(held.key, {})
                counts[held.agent_id] = counts.get(held.agent_id, 0) + 1
        kept = {agent_id: {lease_id: _facts(held) for lease_id, held in of_it.items()} for agent_id, of_it in self._on.items()}
        assert on == kept, "R7: leases per agent are not what the ledger holds"
        assert of == self._of, "R7: leases per model are not what the ledger holds"
        assert len(self._expiry) == len(self._held), "R8: a lease without a deadline, or a deadline without a lease"
