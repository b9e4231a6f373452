"""Where the router's effects go that are about no live request: metrics, the log, the poller, and whoever listens to records.

Decides nothing. On the way of every request; all of it is sync, and none of it may raise.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, Final

import structlog

from core.events import Record
from core.units import AgentId
from edge.proxy import KEYED
from servers.metrics import Metrics

RECORDS_KEPT: Final = 64
"""Records of requests held in memory, newest last."""


class RecordRing:
    """The newest records, for who looks from inside. Listeners are told of each; they must be quick and may not raise."""

    def __init__(self) -> None:
        self.newest: deque[Record] = deque(maxlen=RECORDS_KEPT)
        self.listeners: list[Callable[[Record], None]] = []
        self.of_keys: list[Callable[[Record], None]] = []
        """Told only of requests that came with an API key."""

    def add(self, record: Record) -> None:
        """A request is over."""
        self.newest.append(record)
        if self.of_keys and record.client.startswith(KEYED):
            for listener in self.of_keys:
                listener(record)
        for listener in self.listeners:
            listener(record)


class Sinks:
    """Of one coordinator (`servers.driver.Sinks`)."""

    def __init__(self, metrics: Metrics, records: RecordRing) -> None:
        self._metrics = metrics
        self._records = records
        self._log: Any = structlog.get_logger()
        self.probes: Callable[[AgentId], None] | None = None
        """Asks an agentless node everything, now."""

    def note(self, level: str, event: str, fields: dict[str, Any]) -> None:
        """A line for the log."""
        try:
            getattr(self._log, level)(event, **fields)
        except (OSError, ValueError):  # nobody reads the log any more
            pass

    def count(self, name: str, labels: dict[str, str], by: int) -> None:
        """Add to a counter."""
        self._metrics.count(name, labels, by)

    def record(self, record: Record) -> None:
        """A request is over."""
        self._metrics.observe(record)
        self._records.add(record)

    def probe(self, agent_id: AgentId) -> None:
        """Ask this agentless node everything, now."""
        if self.probes is not None:
            self.probes(agent_id)
