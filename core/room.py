"""What fits into a node's memory beside what is there, and which models must go when it does not.

Decides the victims of a load, the cheapest ones to lose; never whether to load at all (`core.scoring`) or when (`core.dispatch`). Knows
bytes and models of one node, no requests and no time.

A node with an agent tells its GPU memory; then Ollama's own rule is used: a model is loaded beside others only if it fits into 80 % of
what is free, and at most three models per GPU are loaded. Of other nodes two bounds are learned: the most that was seen in memory at
once (it fits), and the least total at which a model was pushed out (it does not). Between them a load is believed to fit: trying is how
the bounds are learned.

Invariants: the victims are resident models, none of them the one that loads; without them it fits, as far as can be known; nothing is a
victim where everything fits.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from core.units import ModelKey

FIT_SHARE: Final = 0.8
"""Ollama loads beside others what fits into this share of the free memory (ollama-wire.md 2.5)."""
LOADED_PER_GPU: Final = 3
"""`OLLAMA_MAX_LOADED_MODELS` by default: so many per GPU."""
RUNNING_SHARE: Final = 1.2
"""A loaded model takes about so much of its size on disk: context and buffers come on top, until a report tells."""


class Room:
    """Memory of one node."""

    __slots__ = ("_evicted_at_bytes", "_held_bytes", "_running_bytes", "loaded_max", "total_bytes")

    def __init__(self) -> None:
        self.total_bytes: int | None = None
        """GPU memory that the agent tells; None: not known."""
        self.loaded_max = LOADED_PER_GPU
        self._held_bytes = 0
        self._evicted_at_bytes: int | None = None
        self._running_bytes: dict[ModelKey, int] = {}

    def told(self, *, total_bytes: int | None, gpus: int | None) -> None:
        """The agent says what the machine has."""
        self.total_bytes = total_bytes or None
        self.loaded_max = LOADED_PER_GPU * max(gpus or 1, 1)

    def saw_rows(self, rows: Mapping[ModelKey, Any]) -> None:
        """What is in memory now: models and their `/api/ps` rows."""
        total = 0
        for key, row in rows.items():
            size = _bytes_of(row)
            if size:
                self._running_bytes[key] = size
                total += size
        self._held_bytes = max(self._held_bytes, total)
        if self._evicted_at_bytes is not None and self._held_bytes >= self._evicted_at_bytes:
            self._evicted_at_bytes = None

    def saw_eviction(self, total_bytes: int) -> None:
        """A model went when the loaded ones came to `total_bytes` with the new one."""
        if total_bytes > self._held_bytes and (self._evicted_at_bytes is None or total_bytes < self._evicted_at_bytes):
            self._evicted_at_bytes = total_bytes

    def seen_bytes(self) -> int:
        """The most that was seen in memory at once: so much it holds, whatever was told."""
        return self._held_bytes

    def running_bytes(self, key: ModelKey, size_bytes: int) -> int:
        """What the model takes in memory; `size_bytes` is its size on disk."""
        return self._running_bytes.get(key) or int(size_bytes * RUNNING_SHARE)

    def victims(
        self, key: ModelKey, resident: Mapping[ModelKey, int], *, size_bytes: int, price: Callable[[ModelKey], int]
    ) -> tuple[ModelKey, ...]:
        """Which of `resident` (model: size on disk) must go for `key`, those of the lowest `price` first; () when it fits."""
        sizes = {other: self.running_bytes(other, size) for other, size in resident.items() if other != key}
        need = self.running_bytes(key, size_bytes)
        if self._fits(need, sum(sizes.values()), len(sizes)):
            return ()
        out: list[ModelKey] = []
        for other in sorted(sizes, key=price):
            out.append(other)
            del sizes[other]
            if self._fits(need, sum(sizes.values()), len(sizes)):
                break
        return tuple(out)

    def _fits(self, need: int, used: int, count: int) -> bool:
        if not count:
            return True  # alone, any model is loaded, with the CPU's help if need be
        if count >= self.loaded_max:
            return False
        if self.total_bytes is not None:
            return need <= FIT_SHARE * (self.total_bytes - used)
        return self._evicted_at_bytes is None or used + need <= self._held_bytes or used + need < self._evicted_at_bytes


def _bytes_of(row: object) -> int:
    if not isinstance(row, dict):
        return 0
    size = row.get("size_vram") or row.get("size")
    return size if isinstance(size, int) and size > 0 else 0
