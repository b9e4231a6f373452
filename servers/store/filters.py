"""Which records are meant by a question or an order, as a value. Knows no database."""

from dataclasses import dataclass

from core.units import UnixMs


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which records. None: any."""

    model: str | None = None
    """A part of the name, in whatever letter case."""
    agent_id: str | None = None
    status: str | None = None
    start: UnixMs | None = None
    end: UnixMs | None = None
    """The first moment that is not meant any more."""
    client: str | None = None
    q: str | None = None
    """Text in a body."""

    def is_empty(self) -> bool:
        """Whether every record is meant."""
        return self == Filters()
