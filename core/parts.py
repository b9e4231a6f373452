"""What the parts of a router have in common.

Decides nothing, knows no part. There is one of each part in a router, made with it. Parts name their attributes in `__slots__`: with every
request some hundred of them are read, and CPython finds those of a slot at once, while it looks up those of an instance's `__dict__` by
name once somebody has asked for that `__dict__` as a whole (up to 3.12), as a snapshot would.
Invariant: what a part holds may be held by other parts too; a snapshot (`core.snapshot`) sees to it that it stays one thing.
"""


class Part:
    """Base of a router's parts."""

    __slots__ = ()
