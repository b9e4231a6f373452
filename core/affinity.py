"""Which node has read the beginning of a prompt before: where its conversation was last, as far as that saves work.

Decides how many tokens of a prompt a node is believed to know; never where a request goes. It knows no text: an edge tells a checksum of
the first KiB of a prompt, of the first two, of the first four, and so on (`prefix_keys` of `edge.prefixes`), so the longest one that is
known says how much two prompts share, within a factor of two and never too much.

What a runner knows is gone with the runner (ollama-wire.md 2.8): a home counts only while the model has been in memory without a break.
A wrong belief costs nothing but a slightly worse choice: what is known only lowers the work that a node is taken to have with a request.

Invariants: at most `HOMES_MAX` beginnings are remembered, the longest unused goes first; a node is never believed to know a whole prompt.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Final

from core.agents import Agent
from core.parts import Part
from core.structs import Fact
from core.units import AgentId, Instant, ModelKey

HOMES_MAX: Final = 8192
FIRST_BYTES: Final = 1024
"""The first key is that of so many bytes of a prompt; each further one of twice as many."""
BYTES_PER_TOKEN: Final = 4

_NOBODY: Final[Mapping[AgentId, int]] = {}


class Home(Fact, frozen=True):
    """Who read a beginning last, and when."""

    agent_id: AgentId
    at: Instant


class Affinity(Part):
    """Of all prompts. `find`: the node of that id, if there is one."""

    __slots__ = ("_find", "_homes")

    def __init__(self, find: Callable[[AgentId], Agent | None]) -> None:
        self._find = find
        self._homes: OrderedDict[str, Home] = OrderedDict()

    def read(self, agent_id: AgentId, key: ModelKey, prefixes: tuple[int, ...], *, now: Instant) -> None:
        """A node has read a prompt with these beginnings."""
        homes = self._homes
        home = Home(agent_id, now)
        for prefix in prefixes:
            name = f"{key} {prefix}"
            homes[name] = home
            homes.move_to_end(name)
        while len(homes) > HOMES_MAX:
            homes.popitem(last=False)

    def known(self, key: ModelKey, prefixes: tuple[int, ...], input_tokens: int) -> Mapping[AgentId, int]:
        """Nodes that know a beginning of a prompt of `input_tokens`: how many tokens of it."""
        found: dict[AgentId, int] = {}
        for level in range(len(prefixes) - 1, -1, -1):
            home = self._homes.get(f"{key} {prefixes[level]}")
            if home is not None and home.agent_id not in found and self._lasts(home, key):
                found[home.agent_id] = min((FIRST_BYTES << level) // BYTES_PER_TOKEN, input_tokens - 1)
        return found or _NOBODY

    def _lasts(self, home: Home, key: ModelKey) -> bool:
        """Whether the runner that read it is still there."""
        agent = self._find(home.agent_id)
        if agent is None or key not in agent.inventory.resident:
            return False
        loaded_at = agent.inventory.loaded_at.get(key)
        return loaded_at is None or loaded_at <= home.at
