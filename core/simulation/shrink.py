"""Makes a failing list shorter while it still fails: delta debugging (Zeller and Hildebrandt 2002, ddmin), with a limit on tries.

Decides which parts to leave out; knows nothing of what the items mean. Invariants: what is returned fails, and is a subsequence of what
was given; with tries to spare, leaving out any single item of it makes it pass.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def shrink(items: Sequence[T], fails: Callable[[list[T]], bool], *, tries_max: int = 2000) -> list[T]:
    """The shortest failing subsequence that `tries_max` calls of `fails` find. `items` itself must fail."""
    left = list(items)
    tries = 0
    parts = 2
    while left and tries < tries_max:
        size = -(-len(left) // parts)
        start = 0
        smaller = False
        while start < len(left) and tries < tries_max:
            candidate = left[:start] + left[start + size :]
            tries += 1
            if fails(candidate):
                left, smaller = candidate, True
            else:
                start += size
        if smaller:
            parts = max(2, min(parts, len(left)))
        elif size == 1:
            break
        else:
            parts = min(len(left), parts * 2)
    return left
