"""The whole state of a `Router` as data: taken in one quick step, packed later, put back exactly.

Decides what is copied and what is shared; knows no meaning of anything. Whatever a router holds, by whatever attribute, is in it, so a new
field needs no line here. It is not pickle: only classes of the modules below are made, and nothing runs but their bare construction.

`take` is called in the loop, so it copies only what changes. Frozen structs, enumerations and scalars are shared; so are Ollama's rows,
which are kept as they came. Mutable structs are copied with the containers they hold, which are nobody else's. Everything else
(objects, dicts, lists) is a numbered node, so that what was one thing in two places is one thing again; only containers of scalars in
objects with slots that are no parts of the router (`core.parts`) are taken to be their own. Callables tie its parts to each other: they
are left out, and those of a newly made `Router` stay.

Invariants: a restored router given the same events at the same instants has the same effects as the one that was taken; a snapshot
does not change when its router goes on.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import cache
from operator import attrgetter
from typing import Any, Final, get_origin

import msgspec

from core.agents import Agent, blank_agent
from core.errors import LocalError, RemoteError
from core.explained import Explained
from core.learning import Rates, _Pair, _Scaled
from core.leases import Held
from core.parts import Part
from core.requests import Request, blank_request
from core.router import Router
from core.scoring import Ask
from core.units import Instant

NODES_PER_PART: Final = 100
"""So many nodes are packed in one step: well under a millisecond."""

_SHARED: Final = frozenset(("installed_rows", "loaded_rows"))
"""Attributes whose value is replaced as a whole and never changed."""
_KEYS_ONLY: Final = frozenset(("_explained",))
"""Attributes of which only the keys decide anything: explanations themselves are not kept."""
_LEFT_OUT: Final = frozenset(("_boards", "drops"))
"""Attributes that are kept only for speed, and filled anew: they decide nothing."""
_PLAIN: Final = (type(None), bool, int, float, str, bytes)
_COMPILED_NAMES: Final = "__mypyc_attrs__"
"""Where a compiled class (`native`) has the names of its attributes."""
_DICTS: Final = (dict, OrderedDict)
_CONTAINERS: Final = (*_DICTS, list)
_FLAT: Final[dict[type, tuple[str, ...]]] = {_Pair: (), _Scaled: (), Request: ("barred", "busy", "tried")}
"""Objects that stand in one dict each, by the thousands, and hold nothing that changes but these containers of their own."""
_BLANKS: Final[dict[type, Callable[[], Any]]] = {Agent: blank_agent, Request: blank_request}
_FACTS: Final = frozenset((Ask, Held, Rates))
"""Classes whose objects never change: shared."""


class Ref(msgspec.Struct, frozen=True, gc=False):
    """The node of that number."""

    node: int


class Snapshot:
    """A router at one instant. `nodes[0]` is the router: (class, what it holds)."""

    __slots__ = ("nodes", "refs")

    def __init__(self, router: Router) -> None:
        self.nodes: list[Any] = []
        self.refs: dict[int, tuple[Ref, Any]] = {}
        """By the identity of what was copied, which is kept alive with it."""
        _Taker(self).hold(router)


def take(router: Router) -> Snapshot:
    """`router` as it is now."""
    return Snapshot(router)


# ---------------------------------------------------------------- taking


class _Plan(msgspec.Struct, frozen=True):
    """How objects of one class are read: `getter` None where they have a `__dict__`; of a mutable struct only its containers."""

    names: tuple[str, ...]
    getter: Callable[[Any], tuple[Any, ...]] | None


class _Flat(msgspec.Struct, frozen=True):
    """A dict of small objects of one class: their attributes in the order of the class's plan."""

    kind: type
    keys: tuple[Any, ...]
    values: tuple[tuple[Any, ...], ...]


@cache
def _plan(kind: Any) -> _Plan:
    if issubclass(kind, msgspec.Struct):
        names = tuple(field.name for field in msgspec.structs.fields(kind) if get_origin(field.type) in (*_DICTS, list))
    elif kind.__dictoffset__ and _COMPILED_NAMES not in vars(kind):
        return _Plan((), None)
    else:  # a base that is not written in Python, as `typing.Generic` from Python 3.12 on, does not say that it has no attributes
        names = tuple(sorted({name for base in kind.__mro__[:-1] for name in _own_names(base)} - {"__dict__"}))
    if len(names) < 2:
        return _Plan(names, lambda value: tuple([getattr(value, name) for name in names]))
    return _Plan(names, attrgetter(*names))


def _own_names(kind: Any) -> Iterable[str]:
    """The attributes of a class with slots, without those of its bases; where it was compiled (`native`) it keeps them elsewhere."""
    own: Iterable[str] = vars(kind).get("__slots__", vars(kind).get(_COMPILED_NAMES, ()))
    return own


def names_of(kind: Any) -> tuple[str, ...]:
    """The attributes of a struct, or of an object with slots, in the order in which they are packed."""
    return kind.__struct_fields__ if issubclass(kind, msgspec.Struct) else _plan(kind).names


def _is_atom(kind: type) -> bool:
    if issubclass(kind, msgspec.Struct):
        return kind.__struct_config__.frozen
    return kind in _FACTS or issubclass(kind, (*_PLAIN, Enum, frozenset))


def _ties(value: Any) -> bool:
    """Whether an attribute ties the router's parts to each other: a callable, or a table of them."""
    if type(value) is dict and value:
        value = next(iter(value.values()))
    return callable(value)


def _cells(kind: type, values: Iterable[Any]) -> list[Any]:
    """Copies of mutable structs of one class, and of the containers in them."""
    names = _plan(kind).names
    copies = []
    for value in values:
        copied = value.__copy__()
        for name in names:
            setattr(copied, name, getattr(value, name).copy())
        copies.append(copied)
    return copies


def _rows(kind: type, values: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """The attributes of objects of one class of `_FLAT`, with copies of their containers."""
    names = _plan(kind).names
    rows = map(attrgetter(*names), values)
    own = [names.index(name) for name in _FLAT[kind]]
    if not own:
        yield from rows
        return
    for row in rows:
        copied = list(row)
        for index in own:
            copied[index] = copied[index].copy()
        yield tuple(copied)


class _Taker:
    """One walk over a router."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._nodes, self._refs = snapshot.nodes, snapshot.refs
        self._atoms: set[type] = set(_PLAIN)
        self._care: dict[tuple[type, ...], list[int]] = {}
        """Which attributes of an object are more than an atom, by the types of all of them."""

    def hold(self, value: Any) -> Any:
        """`value` itself where it never changes, a copy of a mutable struct, else the number of its node."""
        kind = type(value)
        atoms = self._atoms
        if kind in atoms:
            return value
        known = self._refs.get(id(value))
        if known is not None:
            return known[0]
        if issubclass(kind, tuple):
            if atoms.issuperset(map(type, value)):
                return value
            parts = [self.hold(part) for part in value]
            return tuple(parts) if kind is tuple else kind(*parts)
        if _is_atom(kind):
            atoms.add(kind)
            return value
        if issubclass(kind, msgspec.Struct):
            return _cells(kind, (value,))[0]
        nodes = self._nodes
        ref = Ref(len(nodes))
        self._refs[id(value)] = (ref, value)
        nodes.append(None)
        nodes[ref.node] = (kind, self._held(kind, value))
        return ref

    def _held(self, kind: type, value: Any) -> Any:
        atoms, hold = self._atoms, self.hold
        if kind is list:
            return value[:] if atoms.issuperset(map(type, value)) else [hold(part) for part in value]
        if kind in _DICTS:
            values = value.values()
            if atoms.issuperset(map(type, values)):
                return dict(value)
            first: Any = type(next(iter(values)))
            if first in _FLAT:
                return _Flat(first, tuple(value), tuple(_rows(first, values)))
            if issubclass(first, msgspec.Struct) and first not in atoms and not first.__struct_config__.frozen:
                return dict(zip(value, _cells(first, values), strict=True))
            return {key: part if type(part) in atoms else hold(part) for key, part in value.items()}
        plan = _plan(kind)
        if plan.getter is None:
            parts: Iterable[tuple[str, Any]] = vars(value).items()
        elif issubclass(kind, Part):
            parts = zip(plan.names, plan.getter(value), strict=True)
        else:
            return self._slots(plan.names, plan.getter(value))
        return {
            name: tuple(dict.__iter__(part)) if name in _KEYS_ONLY else part if type(part) in atoms else hold(part)
            for name, part in parts
            if name not in _LEFT_OUT and not _ties(part)
        }

    def _slots(self, names: tuple[str, ...], values: tuple[Any, ...]) -> list[Any]:
        """The attributes of an object with slots; its containers are its own."""
        kinds = tuple(map(type, values))
        care = self._care.get(kinds)
        if care is None:
            care = self._care[kinds] = [
                index for index, kind in enumerate(kinds) if kind not in self._atoms and names[index] not in _SHARED
            ]
        held = list(values)
        for index in care:
            part, kind = held[index], kinds[index]
            if kind in _CONTAINERS and self._atoms.issuperset(map(type, part if kind is list else part.values())):
                held[index] = part.copy()
            else:
                held[index] = self.hold(part)
        return held


# ---------------------------------------------------------------- packing


def plain(value: Any, refs: dict[int, tuple[Ref, Any]] | None = None) -> Any:
    """`value` made of what msgpack knows; lists that begin with a letter stand for everything else.

    Raises:
        LocalError: it holds something that cannot be in a snapshot.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in (tuple, list):
        return [kind.__name__[0], [plain(part, refs) for part in value]]
    if kind in _DICTS:
        return [kind.__name__[0].lower(), [[plain(key, refs), plain(part, refs)] for key, part in value.items()]]
    if isinstance(value, tuple):
        return ["n", _name(kind), [plain(part, refs) for part in value]]
    if kind is Ref:
        return ["r", value.node]
    if kind is frozenset:
        return ["f", sorted(value)]
    if kind is msgspec.UnsetType:
        return ["u"]
    if kind is _Flat:
        return ["x", _name(value.kind), [plain(key, refs) for key in value.keys], [plain(part, refs) for part in value.values]]
    if isinstance(value, Enum):
        return ["e", _name(kind), value.name]
    if kind in _FACTS or issubclass(kind, msgspec.Struct):
        return ["s", _name(kind), [plain(getattr(value, name), refs) for name in names_of(kind)]]
    if refs is not None and id(value) in refs:
        return ["r", refs[id(value)][0].node]
    raise LocalError(f"a snapshot cannot hold a {kind.__qualname__} here")


def pack(snapshot: Snapshot) -> Iterator[list[Any]]:
    """The snapshot's nodes in plain form, `NODES_PER_PART` in each part: one part is one short step."""
    nodes, refs = snapshot.nodes, snapshot.refs
    for begin in range(0, len(nodes), NODES_PER_PART):
        yield [[_name(kind), plain(held, refs)] for kind, held in nodes[begin : begin + NODES_PER_PART]]


def _name(kind: type) -> str:
    if kind.__module__ in ("builtins", "collections"):
        return kind.__name__
    name = f"{kind.__module__}.{kind.__qualname__}"
    if not name.startswith("core."):
        raise LocalError(f"a snapshot cannot hold a {name}: it is none of the core's own")
    return name


def kind_of(name: str) -> Any:
    """The class of that name: one of the core's, in a module that the router itself has loaded."""
    module, _, own_name = name.rpartition(".")
    found = vars(sys.modules[module])[own_name] if module.startswith("core.") else None
    if not isinstance(found, type) or found.__module__ != module:
        raise ValueError(f"{name[:80]} is no class of the core")
    return found


# ---------------------------------------------------------------- putting back


def value_of(given: Any) -> Any:
    """What `plain` was given, where it held no node. Raises what malformed data leads to: see `unpack`."""
    return _Builder([]).value(given)


def unpack(nodes: list[Any]) -> Router:
    """The router of these nodes.

    Raises:
        RemoteError: they are not what `pack` makes, or not of this version.
    """
    try:
        builder = _Builder(nodes)
        config = builder.value(dict(nodes[0][1][1])["_config"])
        router: Router = builder.build(0, Router(config, now=Instant(0.0)))
        return router
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RecursionError) as error:
        raise RemoteError(
            f"the snapshot is not of this version of the router, or it is damaged ({type(error).__name__}: {error})"
        ) from None


class _Builder:
    """Makes values and objects of plain data."""

    def __init__(self, nodes: list[Any]) -> None:
        self._nodes = nodes
        self._built: dict[int, Any] = {}

    def value(self, given: Any, place: Any = None) -> Any:
        """What `given` stands for. `place`: what stands there in a new router."""
        if type(given) is not list:
            return given
        match given:
            case ["r", int(node)]:
                return self._built[node] if node in self._built else self.build(node, place)
            case ["t", parts]:
                return tuple([self.value(part) for part in parts])
            case ["n", name, parts]:
                return kind_of(name)(*map(self.value, parts))
            case ["l", parts]:
                return [self.value(part) for part in parts]
            case ["d", pairs]:
                return {self.value(key): self.value(part) for key, part in pairs}
            case ["o", pairs]:
                return OrderedDict((self.value(key), self.value(part)) for key, part in pairs)
            case ["f", parts]:
                return frozenset(parts)
            case ["u"]:
                return msgspec.UNSET
            case ["e", name, member]:
                return kind_of(name)[member]
            case ["s", name, parts]:
                kind = kind_of(name)
                return kind(**{field: self.value(part) for field, part in zip(names_of(kind), parts, strict=True)})
            case ["x", name, keys, rows]:
                return {
                    self.value(key): self._filled(_made(name), _plan(kind_of(name)).names, map(self.value, row[1]))
                    for key, row in zip(keys, rows, strict=True)
                }
            case _:
                raise ValueError(f"{str(given)[:40]} means nothing")

    def build(self, node: int, place: Any) -> Any:
        """The object of that node: the one at its `place`, if that is of its class and not another node's already."""
        name, held = self._nodes[node]
        if name == "list":
            made = self._built[node] = []
            made += self.value(held)
            return made
        if name in ("dict", "OrderedDict"):
            table = self._built[node] = OrderedDict() if name == "OrderedDict" else {}
            table.update(self.value(held))
            return table
        kind = kind_of(name)
        mine = type(place) is kind and all(place is not other for other in self._built.values())
        target = self._built[node] = place if mine else _made(name)
        if held[0] == "l":
            return self._filled(target, _plan(kind).names, (self.value(part) for part in held[1]))
        # Parts first: where they stand in a new router, they are tied to others.
        for attribute, given in sorted(held[1], key=lambda pair: not isinstance(getattr(target, pair[0], None), Part)):
            if attribute in _KEYS_ONLY:
                setattr(target, attribute, {key: Explained() for key in self.value(given)})
            else:
                setattr(target, attribute, self.value(given, getattr(target, attribute, None)))
        return target

    def _filled(self, target: Any, names: Iterable[str], values: Iterable[Any]) -> Any:
        for name, value in zip(names, values, strict=True):
            setattr(target, name, value)
        return target


def _made(name: str) -> Any:
    """An object of that class, to be filled. A compiled class makes none without what its `__init__` asks for."""
    kind = kind_of(name)
    make = _BLANKS.get(kind)
    return kind.__new__(kind) if make is None else make()
