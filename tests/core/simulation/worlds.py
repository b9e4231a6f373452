"""Small worlds for the tests."""

from collections.abc import Sequence
from typing import Any

import msgspec

from core.config import RouterConfig
from core.simulation.options import Options, swarm
from core.simulation.prng import Prng
from core.simulation.script import Action, Ask, Timed
from core.simulation.world import World

CALM = Options(nodes=2, homogeneous=True, models=2, clients=2, slots=2, gap_s=1.0, heartbeat_s=2.0)
"""Two equal nodes that hold both models; nothing goes wrong."""


def drawn(seed: int, **given: Any) -> World:
    """A world of the swarm."""
    return World(seed, swarm(Prng(seed).split("options")), **given)


def played(actions: Sequence[tuple[float, Action]], options: Options = CALM, **given: Any) -> World:
    """A world that these actions befall."""
    return World(7, options, actions=[Timed(at_s, action) for at_s, action in sorted(actions, key=lambda entry: entry[0])], **given)


def asks(count: int, *, start_s: float = 5.0, gap_s: float = 0.5, **fields: Any) -> list[tuple[float, Action]]:
    """Requests in an even rhythm."""
    return [(start_s + gap_s * index, Ask(request=index, client=index % 3, **fields)) for index in range(count)]


def with_config(options: Options = CALM, **fields: Any) -> Options:
    """Options whose router has these settings."""
    config: RouterConfig = msgspec.structs.replace(options.config, **fields)
    return msgspec.structs.replace(options, config=config)
