"""A router's parts have their attributes in slots: all of them, whatever the strategy."""

from collections import OrderedDict
from typing import Any

import msgspec
import pytest

from core.parts import Part
from tests.core.routing import World


def reached(value: Any, seen: dict[int, Any]) -> None:
    """Add to `seen` what is held by `value`, and by what that holds."""
    if id(value) in seen or callable(value) or isinstance(value, msgspec.Struct):
        return
    seen[id(value)] = value
    if isinstance(value, dict | OrderedDict):
        held = list(value.values())
    elif isinstance(value, list | tuple):
        held = list(value)
    else:
        names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        held = [getattr(value, name) for name in names]
    for part in held:
        reached(part, seen)


@pytest.mark.parametrize("strategy", ["auto", "metrics", "least-busy", "round-robin"])
def test_no_part_has_a_dict_of_its_own(strategy: str) -> None:
    world = World(strategy=strategy)
    world.backend("n", "m", loaded=("m",))
    world.ask("r1")
    seen: dict[int, Any] = {}
    reached(world.router, seen)
    ours = [value for value in seen.values() if type(value).__module__.startswith("core.")]
    assert [value for value in ours if hasattr(value, "__dict__") and not hasattr(value, "_value_")] == []
    assert sum(isinstance(value, Part) for value in ours) >= 14
