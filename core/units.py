"""The quantities everything else is counted in.

Decides nothing. Two times exist and never mix: `Instant` is monotonic and orders what happens; `UnixMs` is the calendar's
and appears only in messages and history. Scores are integers (`Micros`), so that two machines always agree on them.
"""

from math import inf
from typing import TYPE_CHECKING, Final, NewType

if TYPE_CHECKING:
    Instant = NewType("Instant", float)
    """Monotonic seconds since an arbitrary start. Only differences mean anything."""
    UnixMs = NewType("UnixMs", int)
    """Milliseconds since 1970 UTC."""
    Micros = NewType("Micros", int)
    """Microseconds of node time: the unit of every score."""
    AgentId = NewType("AgentId", str)
    """A UUID v4, made by a shell. One per node, agentless nodes included."""
    RequestId = NewType("RequestId", str)
    """A UUID v4, made by a shell: one per request of a client."""
    LeaseId = NewType("LeaseId", str)
    """`<request id>/<attempt>`: one per attempt to serve a request on a node."""
    ModelKey = NewType("ModelKey", str)
    """A model's full name, normalised (`core.names`): what two spellings of one model have in common."""
else:  # a call of a NewType is a call of a Python function, and these are made some ten times per request
    Instant = float
    UnixMs = int
    Micros = int
    AgentId = str
    RequestId = str
    LeaseId = str
    ModelKey = str

NEVER: Final = Instant(inf)
"""Later than everything: the deadline of what has none."""

MICROS_PER_S: Final = 1_000_000
MIB: Final = 1 << 20
GIB: Final = 1 << 30


def micros(seconds: float) -> Micros:
    """`seconds` as whole microseconds, rounded to nearest."""
    return Micros(round(seconds * MICROS_PER_S))
