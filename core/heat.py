"""How often each model is asked for, fleet-wide.

Decides nothing; it is what evicting a model is priced by (`core.room`). Knows models and instants only.
Invariant: a rate never rises by mere waiting; at most `MODELS_MAX` models are remembered, the longest unasked goes first.
"""

from typing import Final

from core.parts import Part
from core.units import Instant, ModelKey

MODELS_MAX: Final = 4096
WINDOW: Final = 60
"""The mean gap is taken over about so many arrivals (routing.md 1.4: the last 60)."""


class Heat(Part):
    """Arrival rates of all models."""

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen: dict[ModelKey, tuple[Instant, float]] = {}
        """Last arrival, and the mean gap before it; a gap of 0 means that there was only one arrival. The longest unasked comes first."""

    def came(self, key: ModelKey, now: Instant) -> None:
        """The model was asked for."""
        seen = self._seen.pop(key, None)
        if seen is None:
            self._seen[key] = (now, 0.0)
            if len(self._seen) > MODELS_MAX:
                del self._seen[next(iter(self._seen))]
            return
        last, mean_s = seen
        gap_s = now - last
        self._seen[key] = (now, gap_s if mean_s == 0.0 else mean_s + (gap_s - mean_s) / WINDOW)

    def per_s(self, key: ModelKey, *, now: Instant) -> float:
        """Requests per second: by the mean gap, or by the time since the last one where that is longer already."""
        seen = self._seen.get(key)
        if seen is None:
            return 0.0
        last, mean_s = seen
        gap_s = max(mean_s, now - last)
        # One request tells no rate: it counts like one in a minute, less as time goes by.
        return 1.0 / max(gap_s, 1e-3) if mean_s > 0.0 else 1.0 / max(gap_s, 60.0)
