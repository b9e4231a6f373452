"""Names that stand for a model, or for several in an order of preference (`ROUTER_ALIASES`).

Decides which models a name stands for, which of them is asked for, and how names are listed; never which node serves one. An alias is
compared as a model's name is, and comes before a model of the same name; what it stands for is never looked up as an alias again.

Invariants: a request turns to the next model only when no ready node holds the present one; a list of models never has two rows of one
name.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

from core.names import is_cloud, key_or_none
from core.units import ModelKey

ALIAS_FIELD: Final = "alias_of"
"""In the lists: the models that a name stands for."""

Table = Sequence[tuple[str, Sequence[str]]]


class Aliases:
    """All aliases of one coordinator: (name, the models it stands for), in the operator's order."""

    def __init__(self, table: Table = ()) -> None:
        self._table = [(name, tuple(models)) for name, models in table]
        self._by_key = {key_or_none(name) or name: models for name, models in self._table}

    def __bool__(self) -> bool:
        return bool(self._table)

    def models(self, name: str | None) -> tuple[str, ...]:
        """What `name` stands for; () when it is no alias."""
        return () if name is None else self._by_key.get(key_or_none(name) or name, ())

    def listed(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """`rows` of `/api/tags` with a row for each alias behind that of the model it stands for now; none for one that no row is for."""
        names = {key: row for row in rows if (key := _key_of(row)) is not None}
        behind: dict[ModelKey, list[dict[str, Any]]] = {}
        for name, models in self._table:
            key = next((key for model in models if (key := key_or_none(model)) in names and key is not None), None)
            if key is not None:
                row = {**names[key], "name": name, "model": name, ALIAS_FIELD: list(models)}
                behind.setdefault(key, []).append(row)
        hidden = {key_or_none(name) for name, _ in self._table}
        shown: list[dict[str, Any]] = []
        for row in rows:
            key = _key_of(row)
            if key is None or key not in hidden:
                shown.append(row)
            if key is not None:
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


def _key_of(row: dict[str, Any]) -> ModelKey | None:
    name = row.get("name")
    return key_or_none(name) if isinstance(name, str) else None
