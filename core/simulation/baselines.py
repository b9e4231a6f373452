"""Simple rules for choosing a node, to hold `auto` against (routing.md 1.1, 1.2, 6.1): they forward at once, without queue or limit.

Each sees what a router of its kind would see: its own in-flight counts, and which models a node has loaded, as last polled.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from core.simulation.prng import Prng
from core.simulation.workload import Arrival


class Seen:
    """What a rule knows of one node."""

    __slots__ = ("in_flight", "in_flight_of", "index", "loaded", "speed")

    def __init__(self, index: int, speed: float) -> None:
        self.index = index
        self.speed = speed
        self.in_flight = 0
        self.in_flight_of: dict[str, int] = {}
        self.loaded: frozenset[str] = frozenset()


Rule = Callable[[Arrival, Sequence[Seen], Prng], Seen]
"""Which of the candidates (never empty) the request goes to."""

SPILL_ABOVE: Final = 4
COLD_FACTOR: Final = 5


class RoundRobin:
    """Each candidate in turn."""

    def __init__(self) -> None:
        self._turn = 0

    def __call__(self, arrival: Arrival, nodes: Sequence[Seen], prng: Prng) -> Seen:
        self._turn += 1
        return nodes[self._turn % len(nodes)]


def at_random(arrival: Arrival, nodes: Sequence[Seen], prng: Prng) -> Seen:
    """Any candidate."""
    return prng.pick(nodes)


def least_outstanding(arrival: Arrival, nodes: Sequence[Seen], prng: Prng) -> Seen:
    """The candidate with the fewest requests in flight; ties at random."""
    fewest = min(node.in_flight for node in nodes)
    return prng.pick([node for node in nodes if node.in_flight == fewest])


def two_choices(arrival: Arrival, nodes: Sequence[Seen], prng: Prng) -> Seen:
    """The better of two drawn at random (Mitzenmacher)."""
    one, two = prng.pick(nodes), prng.pick(nodes)
    return one if one.in_flight <= two.in_flight else two


def warm_and_spill(arrival: Arrival, nodes: Sequence[Seen], prng: Prng) -> Seen:
    """The least loaded node that has the model in memory; any node once all of those have more than `SPILL_ABOVE` in flight."""
    warm = [node for node in nodes if arrival.model in node.loaded and node.in_flight <= SPILL_ABOVE]
    return least_outstanding(arrival, warm or nodes, prng)


def lmetric_like(arrival: Arrival, nodes: Sequence[Seen], prng: Prng) -> Seen:
    """New prefill tokens x batch size (LMetric, arXiv 2603.15202), a node without the model counted `COLD_FACTOR` times."""
    scores = [(node.in_flight + 1) * (1 if arrival.model in node.loaded else COLD_FACTOR) for node in nodes]
    best = min(scores)
    return prng.pick([node for node, score in zip(nodes, scores, strict=True) if score == best])


def rules() -> Mapping[str, Callable[[], Rule]]:
    """The rules by name, each made anew for a run."""
    return {
        "random": lambda: at_random,
        "round-robin": RoundRobin,
        "least-outstanding": lambda: least_outstanding,
        "p2c": lambda: two_choices,
        "warm+spill": lambda: warm_and_spill,
        "lmetric-like": lambda: lmetric_like,
    }
