"""What one node holds and has in memory, by its own reports and by what the router saw itself.

Decides which of two sources to believe; knows nothing of time beyond comparing instants, of requests or of other nodes. Rows are
Ollama's own JSON objects (or bare names from older agents); they come from outside, so any value may have any type.

Rules: a report beats what was known before it was asked for; what the router saw after that beats the report, so an answer that was
under way cannot undo it. A model that is being loaded is absent from `/api/ps`, so its absence there says nothing.
Two names with one digest share one runner: both count as loaded.
"""

from typing import Any, Final

import msgspec

from core.names import key_or_none
from core.units import Instant, ModelKey

ROWS_MAX: Final = 10_000
"""Rows of one list that are looked at; what is beyond is not known."""

REPORT_AGE_S: Final = 5.0
"""How old a report is taken to be that does not say when it was made (heartbeats): an agent may have waited so long for `/api/ps`."""


class Model(msgspec.Struct, frozen=True, gc=False):
    """One installed model. `size_bytes` 0 and `digest` "" when the node did not tell."""

    key: ModelKey
    digest: str
    size_bytes: int


class Loading(msgspec.Struct, frozen=True, gc=False):
    """A load that the router caused and that has not shown an answer yet."""

    since: Instant
    expected_s: float


class Inventory:
    """Of one node."""

    __slots__ = (
        "_reported",
        "_reported_digests",
        "_seen",
        "installed",
        "installed_rows",
        "known",
        "loaded_rows",
        "loading",
        "options",
        "resident",
    )

    def __init__(self) -> None:
        self.known = False
        """Whether the node ever said what it holds."""
        self.installed: dict[ModelKey, Model] = {}
        self.installed_rows: list[Any] = []
        self.loaded_rows: list[Any] = []
        self.resident: dict[ModelKey, None] = {}
        """Models in memory; a dict for its order."""
        self.options: dict[ModelKey, str] = {}
        """Runner options that a resident model was last seen to run with."""
        self.loading: dict[ModelKey, Loading] = {}
        self._reported: dict[ModelKey, None] = {}
        self._reported_digests: dict[str, None] = {}
        self._seen: dict[ModelKey, tuple[Instant, bool]] = {}

    def report_installed(self, rows: list[Any]) -> bool:
        """The node says what it holds. Returns whether that differs from before."""
        rows = rows[:ROWS_MAX]
        if self.known and rows == self.installed_rows:
            return False
        self.known = True
        self.installed_rows = rows
        self.installed = {}
        for row in rows:
            key = _key(row)
            if key is not None and key not in self.installed:
                self.installed[key] = Model(key, _digest(row), _size(row))
        for key in [key for key in self._seen if key not in self.installed]:
            del self._seen[key]
        for key in [key for key in self.loading if key not in self.installed]:
            del self.loading[key]
        self._settle()
        return True

    def report_loaded(self, rows: list[Any], *, asked_at: Instant | None, now: Instant) -> dict[ModelKey, Any]:
        """The node says what it has in memory; it was asked at `asked_at` (None: not known). Returns the row of each model."""
        since = Instant(now - REPORT_AGE_S) if asked_at is None else asked_at
        self._seen = {key: seen for key, seen in self._seen.items() if seen[0] >= since}
        rows = rows[:ROWS_MAX]
        self.loaded_rows = rows
        by_key = {key: row for row in rows if (key := _key(row)) is not None}
        self._reported = dict.fromkeys(by_key)
        self._reported_digests = {digest: None for row in rows if (digest := _digest(row))}
        self._settle()
        return by_key

    def saw_loaded(self, key: ModelKey, options: str, *, now: Instant) -> None:
        """A byte of an answer came from this model: it is in memory, with these runner options. One that was deleted meanwhile counts for
        nothing: it will be used no more."""
        if key not in self.installed:
            return
        self._seen[key] = (now, True)
        self.resident[key] = None
        self.options[key] = options
        if self.loading:
            self.loading.pop(key, None)

    def saw_unloaded(self, key: ModelKey, *, now: Instant) -> None:
        """The node was told to unload it, or its runner is known to be gone."""
        self._seen[key] = (now, False)
        self.resident.pop(key, None)
        self.options.pop(key, None)

    def forget_loaded(self, *, now: Instant) -> None:
        """Nothing is in memory any more (the node restarted, or ran out of memory, which expires all models)."""
        for key in list(self.resident):
            self.saw_unloaded(key, now=now)
        self.loading.clear()

    def needs_reload(self, key: ModelKey, options: str) -> bool:
        """Whether the resident model is known to run with other options than these."""
        known = self.options.get(key)
        return known is not None and known != options

    def _settle(self) -> None:
        """Recompute `resident` from the reports and what was seen since."""
        resident: dict[ModelKey, None] = {}
        for key, model in self.installed.items():
            seen = self._seen.get(key)
            if seen[1] if seen else (key in self._reported or (model.digest != "" and model.digest in self._reported_digests)):
                resident[key] = None
                if self.loading:
                    self.loading.pop(key, None)
        self.resident = resident
        if self.options:
            self.options = {key: options for key, options in self.options.items() if key in resident}


def _key(row: object) -> ModelKey | None:
    name = (row.get("name") or row.get("model")) if isinstance(row, dict) else row
    return key_or_none(name) if isinstance(name, str) else None


def _digest(row: object) -> str:
    digest = row.get("digest") if isinstance(row, dict) else None
    return digest if isinstance(digest, str) else ""


def _size(row: object) -> int:
    size = row.get("size") if isinstance(row, dict) else None
    return size if isinstance(size, int) and size > 0 else 0
