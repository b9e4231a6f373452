"""Many nodes seen as one Ollama: its lists of models, what is loaded, its version.

Decides which of several nodes' rows stands for a model, never which node serves a request. Pure functions of what the nodes said last;
rows are Ollama's own JSON objects and are handed on as they came. They come from outside: any value may have any type.

Invariants: no list has two rows for one model; the order in which nodes are given changes nothing; each row of `merged_tags` is one that
a node sent, untouched.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias

import msgspec

from core import names
from core.units import AgentId, ModelKey

Row: TypeAlias = dict[str, Any]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_NEVER: Final = -(1 << 62)
_ABSENT: Final[list[Any]] = []
STEP_ROWS: Final = 100
"""Rows of work in one step of an update: some 0.3 ms."""
_VERSION = re.compile(r"v?(\d{1,9}+(?:\.\d{1,9}+)*+)(?!\d)").match


class NodeInventory(msgspec.Struct, frozen=True, kw_only=True):
    """What one node said last. `ready`: it counts for the fleet's lists (its owner decides for how long after it was last heard)."""

    agent_id: AgentId
    name: str
    ready: bool
    version: str = ""
    installed: list[Any] = []
    """Rows of `/api/tags`, or bare names."""
    loaded: list[Any] = []
    """Rows of `/api/ps`, or bare names."""


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """One name under which nodes hold different files."""

    model: str
    """As displayed."""
    canonical: str
    """The digest that the fleet's lists show."""
    digests: list[tuple[AgentId, str]]
    """Every holder's digest, by agent id."""


def merged_tags(nodes: Sequence[NodeInventory], *, cloud: bool = False) -> list[Row]:
    """`/api/tags` of the fleet: one row per model, newest first.

    Where digests differ the canonical one is shown: that of most nodes, then the newest. Models in Ollama's cloud only with `cloud`.
    """
    index = TagsIndex(cloud=cloud)
    for _ in index.update(nodes):
        pass
    return [row for _, row in index.rows]


class TagsIndex:
    """`merged_tags` kept up to date from one state of the fleet to the next, in small steps, at the price of what changed.

    Rows that are in no node's list any more leave with the next `update`; an `update` that is not run to its end is made good by the next.
    """

    def __init__(self, *, cloud: bool = False) -> None:
        self.rows: list[tuple[ModelKey, Row]] = []
        """The fleet's list. Replaced, never changed, at the end of an update."""
        self.canonical: dict[ModelKey, str] = {}
        """The digest that is shown of each model."""
        self._cloud = cloud
        self._lists: dict[AgentId, list[Any]] = {}
        """What was absorbed whole of each node."""
        self._keys: dict[AgentId, list[ModelKey]] = {}
        self._held: dict[ModelKey, dict[AgentId, Row]] = {}
        self._dirty: dict[ModelKey, None] = {}
        self._shown: dict[ModelKey, tuple[int, Row]] = {}

    def differs(self, nodes: Sequence[NodeInventory]) -> bool:
        """Whether `update` would have anything to do: lists are compared by identity, since nobody changes one."""
        lists = {node.agent_id: node.installed for node in nodes if node.ready}
        return bool(self._dirty) or lists.keys() != self._lists.keys() or any(self._lists[key] is not rows for key, rows in lists.items())

    def update(self, nodes: Sequence[NodeInventory]) -> Iterator[None]:
        """Absorb what `nodes` say now. Each step of the iterator is some hundred rows of work."""
        lists = {node.agent_id: node.installed for node in nodes if node.ready}
        work = 0
        for agent_id in [agent_id for agent_id in self._keys if self._lists.get(agent_id) is not lists.get(agent_id, _ABSENT)]:
            self._lists.pop(agent_id, None)
            for key in self._keys.pop(agent_id):
                self._held[key].pop(agent_id, None)
                self._dirty[key] = None
                work += 1
                if work % STEP_ROWS == 0:
                    yield
        for agent_id, rows in lists.items():
            if agent_id in self._lists:
                continue
            keys = self._keys.setdefault(agent_id, [])
            for entry in rows:
                found = _keyed(entry)
                if found is not None and agent_id not in (held := self._held.setdefault(found[0], {})):
                    held[agent_id] = found[1]
                    keys.append(found[0])
                    self._dirty[found[0]] = None
                work += 1
                if work % STEP_ROWS == 0:
                    yield
            self._lists[agent_id] = rows
        yield from self._choose()

    def _choose(self) -> Iterator[None]:
        """Decide anew what is shown of each model whose holders changed."""
        work = 0
        for key in list(self._dirty):
            held = sorted(self._held[key].items())
            work += len(held)
            self._shown.pop(key, None)
            self.canonical.pop(key, None)
            if held:
                self.canonical[key] = digest = _canonical(held)
                row, at = held[0][1], _NEVER - 1
                for _, each in held:
                    if _digest(each) == digest and (when := _micros(each.get("modified_at"))) > at:
                        row, at = each, when
                if self._cloud or not (names.is_cloud(key) or row.get("remote_host")):
                    self._shown[key] = (-at, row)
            else:
                del self._held[key]
            del self._dirty[key]
            if work >= STEP_ROWS:
                work = 0
                yield
        order = sorted((at, key) for key, (at, _) in self._shown.items())
        self.rows = [(key, self._shown[key][1]) for _, key in order]


def merged_ps(nodes: Sequence[NodeInventory], canonical: Mapping[ModelKey, str] | None = None) -> list[Row]:
    """`/api/ps` of the fleet: one row per model, the one that expires last first.

    `size` and `size_vram` are sums over the nodes, `expires_at` is the latest, `context_length` the smallest. Of differing digests
    the one that `merged_tags` shows (`canonical`, where it is known already), if it is loaded anywhere.
    """
    installed = canonical_digests(nodes) if canonical is None else canonical
    merged = []
    for key, held in _holders(nodes, loaded=True).items():
        digests = {_digest(row): None for _, row in held}
        digest = installed.get(key)
        if digest not in digests:
            digest = _canonical(held, time_field="expires_at")
        row = _sum([row for _, row in held if _digest(row) == digest])
        merged.append((-_micros(row.get("expires_at")), key, row))
    merged.sort(key=lambda entry: entry[:2])
    return [row for _, _, row in merged]


def merged_v1_models(nodes: Sequence[NodeInventory], *, cloud: bool = False) -> list[Row] | None:
    """`data` of `/v1/models`. None, as with Ollama, when there is no model."""
    rows = merged_tags(nodes, cloud=cloud)
    return [v1_model(row) for row in rows] or None


def v1_model(row: Row) -> Row:
    """A row of `/api/tags` as OpenAI's API lists it."""
    name = _name(row) or ""
    at = _micros(row.get("modified_at"))
    return {"id": name, "object": "model", "created": 0 if at == _NEVER else at // 1_000_000, "owned_by": names.namespace(name)}


def lowest_version(nodes: Iterable[NodeInventory], last_known: str) -> str:
    """The lowest version among ready nodes as plain `X.Y.Z`; `last_known` when none told one. A fleet can promise only the least."""
    found = [tuple(int(part) for part in match[1].split(".")) for node in nodes if node.ready and (match := _VERSION(node.version))]
    return ".".join(map(str, min(found))) if found else last_known


def drift(nodes: Sequence[NodeInventory]) -> list[Drift]:
    """The names under which ready nodes hold different files, sorted."""
    return [
        Drift(model=names.display(key), canonical=_canonical(held), digests=[(agent_id, _digest(row)) for agent_id, row in held])
        for key, held in sorted(_holders(nodes).items())
        if len({_digest(row): None for _, row in held}) > 1
    ]


def canonical_digests(nodes: Sequence[NodeInventory]) -> dict[ModelKey, str]:
    """For each model that a ready node holds, the digest that the fleet's lists show ("" when nodes did not tell)."""
    return {key: _canonical(held) for key, held in _holders(nodes).items()}


def _holders(nodes: Sequence[NodeInventory], *, loaded: bool = False) -> dict[ModelKey, list[tuple[AgentId, Row]]]:
    """Per model the rows of ready nodes, by agent id. A node that lists one model twice counts with its first row
    (of `loaded` with each: an updated model may still be in memory in its old version)."""
    found: dict[ModelKey, list[tuple[AgentId, Row]]] = {}
    for node in sorted((node for node in nodes if node.ready), key=lambda node: node.agent_id):
        for entry in node.loaded if loaded else node.installed:
            keyed = _keyed(entry)
            if keyed is None:
                continue
            key, row = keyed
            held = found.setdefault(key, [])
            if loaded or not held or held[-1][0] != node.agent_id:
                held.append((node.agent_id, row))
    return found


def _keyed(entry: Any) -> tuple[ModelKey, Row] | None:
    """An entry of a list as a row, and its key; None when it names no model."""
    name = _name(entry)
    key = names.key_or_none(name) if name is not None else None
    if key is None:
        return None
    return key, entry if isinstance(entry, dict) else {"name": names.display(key), "model": names.display(key)}


def _canonical(held: list[tuple[AgentId, Row]], *, time_field: str = "modified_at") -> str:
    """The digest of most nodes, then of the newest row, then the smallest."""
    digests = [_digest(row) for _, row in held]
    if digests.count(digests[0]) == len(digests):
        return digests[0]
    counts = Counter(digests)
    newest: dict[str, int] = {}
    for _, row in held:
        newest[_digest(row)] = max(newest.get(_digest(row), _NEVER), _micros(row.get(time_field)))
    return min(counts, key=lambda digest: (-counts[digest], -newest[digest], digest))


def _sum(rows: list[Row]) -> Row:
    """One row for a model that is loaded on several nodes."""
    if len(rows) == 1:
        return rows[0]
    row = max(rows, key=lambda row: _micros(row.get("expires_at"))).copy()
    for field in ("size", "size_vram"):
        row[field] = sum(value for each in rows if isinstance(value := each.get(field), int))
    lengths = [value for each in rows if isinstance(value := each.get("context_length"), int)]
    if lengths:
        row["context_length"] = min(lengths)
    return row


def _name(entry: object) -> str | None:
    """The model's name in a row, or in a bare name."""
    if isinstance(entry, dict):
        entry = entry.get("name") or entry.get("model")
    return entry if isinstance(entry, str) else None


def _digest(row: Row) -> str:
    digest = row.get("digest")
    return digest if isinstance(digest, str) else ""


def _micros(text: object) -> int:
    """A time as Ollama writes it, in microseconds since 1970; long ago when it is none."""
    return _read_time(text) if isinstance(text, str) and len(text) <= 40 else _NEVER


@functools.lru_cache(maxsize=4096)
def _read_time(text: str) -> int:
    """Nodes that pulled one model say the same times again and again, so they are remembered."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return _NEVER
    return ((at if at.tzinfo else at.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND
