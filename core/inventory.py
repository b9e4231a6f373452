"""What one node holds and has in memory, by its own reports and by what the router saw itself.

Decides which of two sources to believe; knows nothing of time beyond comparing instants, of requests or of other nodes. Rows are
Ollama's own JSON objects (or bare names from older agents); they come from outside, so any value may have any type.

Rules: a report beats what was known before it was asked for; what the router saw after that beats the report, so an answer that was
under way cannot undo it. A model that is being loaded is absent from `/api/ps`, so its absence there says nothing.
Two names with one digest share one runner: both count as loaded.
Which options a runner has is what it was last loaded with for us; of one that others loaded only its context length is told.
"""

from typing import Any, Final

from core.names import key_or_none
from core.runner_options import context_of, fits, raised_to
from core.structs import Fact
from core.units import Instant, ModelKey

ROWS_MAX: Final = 10_000
"""Rows of one list that are looked at; what is beyond is not known."""

REPORT_AGE_S: Final = 5.0
"""How old a report is taken to be that does not say when it was made (heartbeats): an agent may have waited so long for `/api/ps`."""


class Model(Fact, frozen=True):
    """One installed model. `size_bytes` 0 and `digest` "" when the node did not tell."""

    key: ModelKey
    digest: str
    size_bytes: int
    trained_context: int = 0
    """Tokens; 0 when the node did not tell."""


class Loading(Fact, frozen=True):
    """A load that the router caused and that has not shown an answer yet."""

    since: Instant
    expected_s: float
    options: str = ""
    """Runner options that it will run with."""


class News:
    """What changes in the memory of the nodes that share it, counted."""

    __slots__ = ("changes", "count")

    def __init__(self) -> None:
        self.count = 0
        """How often some model came, or began to come, into some node's memory."""
        self.changes = 0
        """How often anything changed: what is in memory, or on its way, and with which options."""


class Inventory:
    """Of one node."""

    __slots__ = (
        "_reported",
        "_reported_digests",
        "_seen",
        "contexts",
        "installed",
        "installed_rows",
        "known",
        "loaded_at",
        "loaded_rows",
        "loading",
        "news",
        "options",
        "raises",
        "resident",
        "used_at",
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
        self.contexts: dict[ModelKey, int] = {}
        """Context lengths that the node told of resident models since they were loaded."""
        self.loaded_at: dict[ModelKey, Instant] = {}
        """When a resident model answered first after a load that the router caused."""
        self.used_at: dict[ModelKey, Instant] = {}
        """When the last of our requests for a model ended."""
        self.raises = False
        """`ROUTER_RAISE_CONTEXT`: a request for a smaller context than the loaded one is raised to it."""
        self.loading: dict[ModelKey, Loading] = {}
        self.news = News()
        """The fleet's, once the node belongs to one."""
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
                self.installed[key] = Model(key, _digest(row), _size(row), _context(row.get("details")) if isinstance(row, dict) else 0)
        for key in [key for key in self._seen if key not in self.installed]:
            del self._seen[key]
        for table in (self.loading, self.used_at):
            for key in [key for key in table if key not in self.installed]:
                del table[key]
        self.news.changes += 1
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
        for key in self.resident:
            told = _context(by_key.get(key))
            before = self.contexts.get(key)
            if told and told != before:
                self.contexts[key] = told
                if before:  # somebody else loaded it with other options
                    self.options.pop(key, None)
                    self.news.changes += 1
        return by_key

    def saw_loaded(self, key: ModelKey, options: str, now: Instant) -> bool:
        """A byte of an answer came from this model: it is in memory, with these runner options. One that was deleted meanwhile counts for
        nothing: it will be used no more. Returns whether that is new: it was not known to be in memory with these, or was being loaded."""
        new = key not in self.resident or self.options.get(key) != options or (bool(self.loading) and key in self.loading)
        if key not in self.installed:
            return new
        self._seen[key] = (now, True)
        if new:
            self._is_loaded(key, options, now)
        return new

    def _is_loaded(self, key: ModelKey, options: str, now: Instant) -> None:
        if self.options.get(key) != options:
            self._other_options(key, options, now)
        if key not in self.resident:
            self.resident[key] = None
            self.news.count += 1
            self.news.changes += 1
        if self.loading.pop(key, None) is not None:
            self.news.changes += 1

    def begins(self, key: ModelKey, loading: Loading) -> None:
        """The router makes it load the model."""
        self.loading[key] = loading
        self.news.count += 1
        self.news.changes += 1

    def saw_unloaded(self, key: ModelKey, *, now: Instant) -> None:
        """The node was told to unload it, or its runner is known to be gone."""
        self._seen[key] = (now, False)
        self.resident.pop(key, None)
        self._forget_runner(key)
        self.news.changes += 1

    def forget_loaded(self, *, now: Instant) -> None:
        """Nothing is in memory any more (the node restarted, or ran out of memory, which expires all models)."""
        for key in list(self.resident):
            self.saw_unloaded(key, now=now)
        self.loading.clear()
        self.news.changes += 1

    def breaks_off(self, key: ModelKey) -> None:
        """The load that is under way ends without the model in memory."""
        del self.loading[key]
        self.news.changes += 1

    def needs_reload(self, key: ModelKey, options: str) -> bool:
        """Whether the resident model is known to run with options that a request with these cannot share."""
        known = self.options.get(key)
        if known == options:
            return False
        context = self.contexts.get(key)
        if known is None:  # others loaded it: its context is all that can be told of it
            wanted = context_of(options)
            return wanted is not None and context is not None and not (wanted == context or (self.raises and wanted < context))
        return not fits(options, known, context, raises=self.raises)

    def joins(self, key: ModelKey, options: str) -> bool:
        """Whether the load of the model that is under way serves a request with these options too."""
        return fits(options, self.loading[key].options, None, raises=self.raises)

    def raised(self, key: ModelKey, options: str) -> int | None:
        """To which context length a request with these options is to be raised there; None: it goes as it is."""
        if not self.raises or not options:
            return None
        loading = self.loading.get(key)
        if loading is not None:
            return raised_to(options, loading.options, None)
        return raised_to(options, self.options.get(key, ""), self.contexts.get(key)) if key in self.resident else None

    def _other_options(self, key: ModelKey, options: str, now: Instant) -> None:
        """An answer came for other options than those known: from a new runner, unless the one that is there serves both."""
        if key in self.resident and key in self.options and not self.needs_reload(key, options):
            return
        if key not in self.resident or self.needs_reload(key, options):
            self.loaded_at[key] = now
            self.contexts.pop(key, None)
        self.options[key] = options
        self.news.changes += 1

    def _forget_runner(self, key: ModelKey) -> None:
        for table in (self.options, self.contexts, self.loaded_at):
            table.pop(key, None)

    def _settle(self) -> None:
        """Recompute `resident` from the reports and what was seen since."""
        resident: dict[ModelKey, None] = {}
        for key, model in self.installed.items():
            seen = self._seen.get(key)
            if seen[1] if seen else (key in self._reported or (model.digest != "" and model.digest in self._reported_digests)):
                resident[key] = None
                if self.loading and self.loading.pop(key, None) is not None:
                    self.news.changes += 1
        for key in self.resident:
            if key not in resident:
                self._forget_runner(key)
        if resident.keys() != self.resident.keys():
            self.news.changes += 1
        if not resident.keys() <= self.resident.keys():
            self.news.count += 1
        self.resident = resident


def _key(row: object) -> ModelKey | None:
    name = (row.get("name") or row.get("model")) if isinstance(row, dict) else row
    return key_or_none(name) if isinstance(name, str) else None


def _digest(row: object) -> str:
    digest = row.get("digest") if isinstance(row, dict) else None
    return digest if isinstance(digest, str) else ""


def _size(row: object) -> int:
    size = row.get("size") if isinstance(row, dict) else None
    return size if isinstance(size, int) and size > 0 else 0


def _context(row: object) -> int:
    context = row.get("context_length") if isinstance(row, dict) else None
    return context if isinstance(context, int) and context > 0 else 0
