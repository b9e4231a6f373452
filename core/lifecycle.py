"""The states of an agent and the steps between them.

Decides which step an input makes; knows nothing of time, models, requests or sockets. Invariants: `TRANSITIONS` is the only door (nothing
else assigns a state); every pair of state and input is either in it or in `REFUSED`, never in both.

    OFFLINE       not heard in time, or refusing connections. Keeps everything that is known about it.
    INITIALIZING  heard, but it cannot serve yet: no inventory, or its Ollama does not answer.
    READY         may be given requests.
    DRAINING      gets nothing new; what it works on ends first.
    HELD          taken out on purpose; only CONNECT or REBOOTED bring it back, heartbeats do not.
    PENDING       a stranger that an admin has not approved.
"""

import enum
from collections.abc import Mapping
from typing import Final

from core.errors import IllegalTransition


class AgentState(enum.Enum):
    """Where an agent stands; the value is shown as `state`."""

    OFFLINE = "offline"
    INITIALIZING = "initializing"
    READY = "ready"
    DRAINING = "draining"
    HELD = "held"
    PENDING = "pending"


class AgentInput(enum.Enum):
    """What can happen to an agent."""

    HEARD_WELL = "heard well"
    """A sign of life, able to serve: its Ollama answers and its models are known."""

    HEARD_ILL = "heard ill"
    """A sign of life from one that cannot serve now."""

    REBOOTED = "rebooted"
    """Registered with a higher boot than before: whatever was ordered of the earlier run is over."""

    SILENT = "silent"
    """Not heard until its deadline, or no connection to it can be made."""

    DRAIN = "drain"
    """Nothing new, please: an admin's order, or the agent's own when it stops."""

    EMPTIED = "emptied"
    """Nothing is in flight on it any more."""

    HOLD = "hold"
    """Out at once."""

    CONNECT = "connect"
    """May serve again."""

    APPROVE = "approve"
    """An admin, or a proof of trust, lets a stranger in."""


_S = AgentState
_I = AgentInput

TRANSITIONS: Final[Mapping[tuple[AgentState, AgentInput], AgentState]] = {
    (_S.OFFLINE, _I.HEARD_WELL): _S.READY,
    (_S.OFFLINE, _I.HEARD_ILL): _S.INITIALIZING,
    (_S.OFFLINE, _I.REBOOTED): _S.INITIALIZING,
    (_S.OFFLINE, _I.SILENT): _S.OFFLINE,
    (_S.OFFLINE, _I.DRAIN): _S.HELD,
    (_S.OFFLINE, _I.HOLD): _S.HELD,
    (_S.OFFLINE, _I.CONNECT): _S.OFFLINE,
    (_S.INITIALIZING, _I.HEARD_WELL): _S.READY,
    (_S.INITIALIZING, _I.HEARD_ILL): _S.INITIALIZING,
    (_S.INITIALIZING, _I.REBOOTED): _S.INITIALIZING,
    (_S.INITIALIZING, _I.SILENT): _S.OFFLINE,
    (_S.INITIALIZING, _I.DRAIN): _S.DRAINING,
    (_S.INITIALIZING, _I.HOLD): _S.HELD,
    (_S.INITIALIZING, _I.CONNECT): _S.INITIALIZING,
    (_S.READY, _I.HEARD_WELL): _S.READY,
    (_S.READY, _I.HEARD_ILL): _S.INITIALIZING,
    (_S.READY, _I.REBOOTED): _S.INITIALIZING,
    (_S.READY, _I.SILENT): _S.OFFLINE,
    (_S.READY, _I.DRAIN): _S.DRAINING,
    (_S.READY, _I.HOLD): _S.HELD,
    (_S.READY, _I.CONNECT): _S.READY,
    (_S.DRAINING, _I.HEARD_WELL): _S.DRAINING,
    (_S.DRAINING, _I.HEARD_ILL): _S.DRAINING,
    (_S.DRAINING, _I.REBOOTED): _S.INITIALIZING,
    (_S.DRAINING, _I.SILENT): _S.HELD,  # not OFFLINE: the order to stay out outlives the silence
    (_S.DRAINING, _I.DRAIN): _S.DRAINING,
    (_S.DRAINING, _I.EMPTIED): _S.HELD,
    (_S.DRAINING, _I.HOLD): _S.HELD,
    (_S.DRAINING, _I.CONNECT): _S.INITIALIZING,
    (_S.HELD, _I.HEARD_WELL): _S.HELD,
    (_S.HELD, _I.HEARD_ILL): _S.HELD,
    (_S.HELD, _I.REBOOTED): _S.INITIALIZING,
    (_S.HELD, _I.SILENT): _S.HELD,
    (_S.HELD, _I.DRAIN): _S.HELD,
    (_S.HELD, _I.HOLD): _S.HELD,
    (_S.HELD, _I.CONNECT): _S.INITIALIZING,
    (_S.PENDING, _I.HEARD_WELL): _S.PENDING,
    (_S.PENDING, _I.HEARD_ILL): _S.PENDING,
    (_S.PENDING, _I.REBOOTED): _S.PENDING,
    (_S.PENDING, _I.SILENT): _S.PENDING,
    (_S.PENDING, _I.APPROVE): _S.INITIALIZING,
}

REFUSED: Final[frozenset[tuple[AgentState, AgentInput]]] = frozenset(
    {
        # only one that drains can have emptied
        (_S.OFFLINE, _I.EMPTIED),
        (_S.INITIALIZING, _I.EMPTIED),
        (_S.READY, _I.EMPTIED),
        (_S.HELD, _I.EMPTIED),
        (_S.PENDING, _I.EMPTIED),
        # only a stranger can be approved
        (_S.OFFLINE, _I.APPROVE),
        (_S.INITIALIZING, _I.APPROVE),
        (_S.READY, _I.APPROVE),
        (_S.DRAINING, _I.APPROVE),
        (_S.HELD, _I.APPROVE),
        # a stranger is approved or deleted, nothing else can be ordered of it
        (_S.PENDING, _I.DRAIN),
        (_S.PENDING, _I.HOLD),
        (_S.PENDING, _I.CONNECT),
    }
)


def advance(state: AgentState, given: AgentInput) -> AgentState:
    """The state after `given` happened in `state`.

    Raises:
        IllegalTransition: the pair is in `REFUSED`.
    """
    after = TRANSITIONS.get((state, given))
    if after is None:
        raise IllegalTransition(f"an agent that is {state.value} cannot be given {given.value!r}")
    return after
