"""What is kept of one recent request to explain where it went.

Decides only how. Of thousands of requests, so in as few objects as can be: what lies about in memory until the newest request takes its
place is cold then, and to let go of it costs more than to have made it. Made readable only when somebody asks (`core.dispatch`).
"""

from collections.abc import Mapping
from typing import Final

from core.structs import mypyc_attr
from core.units import AgentId
from core.warm import Glance, Row

DECISIONS_MAX: Final = 16
"""Decisions of one request that are kept."""

Raw = tuple[float, str, list[Row] | Glance, AgentId | None, Mapping[str, str]]
"""A decision as it was made: seconds after the request came, outcome, candidates, the chosen one, why others were out. Made readable only
when somebody asks."""


@mypyc_attr(acyclic=True)
class Explained:
    """Of one request: its model, decisions, and when it was expected to start and did (ms since it came). The first decision, mostly the
    only one, has no object of its own."""

    __slots__ = ("after_s", "chosen", "expected_ms", "later", "model", "observed_ms", "out", "outcome", "rows")

    def __init__(
        self,
        model: str | None = None,
        after_s: float = 0.0,
        outcome: str = "",
        rows: list[Row] | Glance | None = None,
        chosen: AgentId | None = None,
        out: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model
        self.after_s = after_s
        self.outcome = outcome
        self.rows = rows
        """None: no decision is known."""
        self.chosen = chosen
        self.out = out
        self.later: tuple[Raw, ...] | None = None
        """Decisions after the first one."""
        self.expected_ms: float | None = None
        self.observed_ms: float | None = None

    def made(self) -> list[Raw]:
        """All decisions, in order."""
        if self.rows is None:
            return []
        return [(self.after_s, self.outcome, self.rows, self.chosen, self.out or {}), *(self.later or ())]

    def add(self, raw: Raw) -> None:
        """One more decision; those after the first `DECISIONS_MAX` are not kept."""
        if self.rows is None:
            self.after_s, self.outcome, self.rows, self.chosen, self.out = raw
        elif self.later is None:
            self.later = (raw,)
        elif len(self.later) < DECISIONS_MAX - 1:
            self.later += (raw,)
