"""What the router knows of its fleet and its traffic, as a question for `core.placement`.

Decides nothing: it translates learned speeds, learned memory and arrival rates into `Supply`s. Building it is quick; answering it is not,
which is why a shell takes a `Question` off the loop and calls `answer` there.
Invariants: a question holds nothing that changes later; at most `MODELS_MAX` models' prompt lengths are remembered.
"""

from collections.abc import Iterable
from typing import Final

from core.agents import Agent
from core.heat import Heat
from core.learning import Speeds
from core.names import display
from core.parts import Part
from core.placement import ROOM_SHARE, STEPS, Offer, Plan, Supply, plan
from core.structs import Fact
from core.units import MICROS_PER_S, Instant, ModelKey

MODELS_MAX: Final = 4096
WEIGHT: Final = 0.05
"""How much one prompt moves the mean length of a model's prompts."""


class Question(Fact, frozen=True):
    """A fleet and its traffic at one instant."""

    nodes: list[Supply]
    rates_per_s: dict[str, float]
    guessed: list[str]
    """Nodes whose memory was never told: what was seen in it is taken for all of it."""

    def answer(self, *, steps: int = STEPS) -> Plan:
        """The plan: up to seconds of computing."""
        return plan(self.nodes, self.rates_per_s, steps=steps)


class Prompts(Part):
    """Mean length of each model's prompts, in tokens."""

    __slots__ = ("_mean",)

    def __init__(self) -> None:
        self._mean: dict[ModelKey, float] = {}

    def came(self, key: ModelKey, input_tokens: int) -> None:
        """One prompt."""
        mean = self._mean.get(key)
        if mean is None and len(self._mean) >= MODELS_MAX:
            del self._mean[next(iter(self._mean))]
        self._mean[key] = float(input_tokens) if mean is None else mean + (input_tokens - mean) * WEIGHT

    def keys(self) -> list[ModelKey]:
        """Models that were asked for."""
        return list(self._mean)

    def mean(self, key: ModelKey) -> float:
        """Tokens of a prompt; 0 when none came."""
        return self._mean.get(key, 0.0)


def question(agents: Iterable[Agent], speeds: Speeds, heat: Heat, prompts: Prompts, *, now: Instant) -> Question:
    """What should be warm where on these nodes, for what they are asked now?"""
    asked = {key: heat.per_s(key, now=now) for key in prompts.keys()}  # noqa: SIM118 - not a mapping
    nodes, guessed = [], []
    for agent in agents:
        nodes.append(_supply(agent, asked, speeds, prompts))
        if agent.room.total_bytes is None:
            guessed.append(agent.name)
    return Question(nodes=nodes, rates_per_s={display(key): rate for key, rate in asked.items() if rate > 0}, guessed=guessed)


def _supply(agent: Agent, asked: Iterable[ModelKey], speeds: Speeds, prompts: Prompts) -> Supply:
    room, inventory = agent.room, agent.inventory
    offers: dict[str, Offer] = {}
    largest = 0
    for key in dict.fromkeys([*asked, *inventory.resident]):
        model = inventory.installed.get(key)
        if model is None:
            continue
        rates = speeds.rates(agent.id, key, size_bytes=model.size_bytes, slots=agent.slots_for(key))
        work_us = rates.overhead_us + (prompts.mean(key) * rates.prefill_ns + speeds.output_tokens(key) * rates.decode_ns) / 1000 + 1
        size = room.running_bytes(key, model.size_bytes)
        largest = max(largest, size)
        offers[display(key)] = Offer(
            size_bytes=size, work_s=work_us / MICROS_PER_S / (agent.weight or 1.0), load_s=rates.load_us / MICROS_PER_S
        )
    return Supply(
        name=agent.name,
        memory_bytes=room.total_bytes or max(room.seen_bytes(), largest),
        max_loaded=room.loaded_max,
        offers=offers,
        loaded=tuple(display(key) for key in inventory.resident),
        room_share=ROOM_SHARE if room.total_bytes is not None else 1.0,
    )
