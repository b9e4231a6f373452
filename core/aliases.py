"""Names that stand for a model, or for several in an order of preference (`ROUTER_ALIASES`).

Decides which models a name stands for, which of them is asked for, and how names are listed; never which node serves one. An alias is
compared as a model's name is, and comes before a model of the same name; what it stands for is never looked up as an alias again.

Invariants: a request turns to the next model only when no ready node holds the present one; a list of models never has two rows of one
name.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import msgspec

from core.names import is_cloud, key_or_none, normalise
from core.registry import Registry
from core.requests import Request
from core.units import ModelKey

ALIAS_FIELD: Final = "alias_of"
"""In the lists: the models that a name stands for."""

Table: TypeAlias = Sequence[tuple[str, Sequence[str]]]
Listed: TypeAlias = tuple[ModelKey, dict[str, Any]]
"""A row of a list of models, by its model's key."""


class Aliases:
    """All aliases of one coordinator: (name, the models it stands for), in the operator's order."""

    def __init__(self, table: Table = ()) -> None:
        self._table = [(name, tuple(models)) for name, models in table]
        self._by_key = {_key(name): models for name, models in self._table}

    def __bool__(self) -> bool:
        return bool(self._table)

    def models(self, name: str | None) -> tuple[str, ...]:
        """What `name` stands for; () when it is no alias."""
        return () if name is None else self._by_key.get(_key(name), ())

    def listed(self, rows: Sequence[Listed]) -> list[Listed]:
        """`rows` of `/api/tags` with a row for each alias behind that of the model it stands for now; none for one that no row is for."""
        known = dict(rows)
        behind: dict[ModelKey, list[Listed]] = {}
        for name, models in self._table:
            key = next((key for model in models if (key := key_or_none(model)) is not None and key in known), None)
            if key is not None:
                row = {**known[key], "name": name, "model": name, ALIAS_FIELD: list(models)}
                behind.setdefault(key, []).append((_key(name), row))
        shown: list[Listed] = []
        for key, row in rows:
            if key not in self._by_key:
                shown.append((key, row))
            shown += behind.pop(key, ())
        return shown


def turn(
    present: ModelKey | None, others: Sequence[str], *, held: Callable[[ModelKey], bool], listed: Callable[[ModelKey], bool]
) -> int | None:
    """Which of `others` to ask for when no ready node holds `present`: the first that one holds, else, when nobody ever listed
    `present`, the first that somebody did. None: stay with `present`, whose absence is the clearer answer.
    """
    keys = [(at, key) for at, name in enumerate(others) if (key := key_or_none(name)) is not None and not is_cloud(key)]
    found = next((at for at, key in keys if held(key)), None)
    if found is None and (present is None or not listed(present)):
        found = next((at for at, key in keys if listed(key)), None)
    return found


def turned(request: Request, registry: Registry) -> bool:
    """Whether no ready node holds the request's model, and it asks for another one from now on that will do as well."""
    came, key = request.came, request.key
    if request.resumed or (key is not None and registry.holders(key)):
        return False
    at = turn(key, came.others, held=lambda key: bool(registry.holders(key)), listed=lambda key: bool(registry.listed_by(key)))
    if at is None:
        return False
    request.renamed = came.others[at]
    request.key = normalise(request.renamed)
    request.came = msgspec.structs.replace(came, model=request.renamed, others=came.others[at + 1 :])
    request.ask = request.ask.of(request.key if came.route.runs_model else None)
    request.tried, request.busy = dict.fromkeys(came.excluded, 2), {}
    return True


def _key(name: str) -> ModelKey:
    """What an alias is looked up by: any text may be one."""
    return key_or_none(name) or ModelKey(name)
