"""Bases of the small values that the parts of the core hand each other.

Decides nothing. What msgspec is told with the words behind a structure's bases, mypyc does not pass on (`native`); but what a base was told
its heirs inherit. So in a module that is compiled a structure has one of these for its base. What is read most often there, and encoded
nowhere, is no structure but a class with slots: compiled code reads the attributes of its own classes at once.
"""

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr as mypyc_attr
else:

    def mypyc_attr(*_: Any, **__: Any) -> Any:
        """Tells mypyc of a class (`acyclic`: never part of a cycle, so the collector need not look at it); nothing in itself."""
        return lambda kind: kind


class Fact(msgspec.Struct, frozen=True, gc=False):
    """Never changed, never part of a cycle. Its heirs say `frozen=True` too, for type checkers."""


class Entry(msgspec.Struct, gc=False):
    """Changed by its owner, never part of a cycle."""


class Ordered(msgspec.Struct, frozen=True, order=True):
    """A fact that is compared by its fields, in their order."""
