"""Dice for the simulated world: one seed, many independent streams.

Decides nothing. Only `getrandbits` of the source is used, the one method of `random.Random` whose values are promised to stay the same
between Pythons. Children are derived by name, so that one more draw in the network does not reshuffle the clients.
Invariant: the same seed and the same calls give the same values, on every Python, under every hash seed.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

T = TypeVar("T")

_UNIT = 1 << 53


class Bits(Protocol):
    """What `random.Random` offers and the core may use."""

    def getrandbits(self, k: int, /) -> int: ...


class Ratio(NamedTuple):
    """A probability as integers: `numerator` in `denominator` times."""

    numerator: int
    denominator: int


NEVER = Ratio(0, 1)


class Lcg:
    """A `Bits` without the standard library's `random`: SplitMix64 (Steele, Lea, Flood 2014), 64 bits a draw."""

    __slots__ = ("_state",)

    def __init__(self, seed: int) -> None:
        self._state = seed & 0xFFFFFFFFFFFFFFFF

    def getrandbits(self, k: int, /) -> int:
        out = 0
        for shift in range(0, k, 64):
            self._state = (self._state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
            z = self._state
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
            out |= (z ^ (z >> 31)) << shift
        return out & ((1 << k) - 1)


class Prng:
    """A stream of draws. Integers and ratios for decisions; floats only for durations."""

    __slots__ = ("_bits", "_seed")

    def __init__(self, seed: int | str, bits: Bits | None = None) -> None:
        self._seed = str(seed)
        self._bits = bits if bits is not None else Lcg(int.from_bytes(hashlib.blake2b(self._seed.encode(), digest_size=8).digest()))

    def split(self, name: str) -> "Prng":
        """An independent stream, the same for the same seed and name whatever was drawn before."""
        return Prng(f"{self._seed}/{name}")

    def below(self, bound: int) -> int:
        """A whole number from 0 to `bound` - 1, all equally likely."""
        assert bound > 0
        bits = bound.bit_length()
        while (drawn := self._bits.getrandbits(bits)) >= bound:
            pass
        return drawn

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both possible."""
        return low + self.below(high - low + 1)

    def chance(self, ratio: Ratio) -> bool:
        """True `ratio` of the time."""
        return ratio.numerator > 0 and self.below(ratio.denominator) < ratio.numerator

    def pick(self, items: Sequence[T]) -> T:
        """One of `items`, all equally likely."""
        return items[self.below(len(items))]

    def weighted(self, weights: Sequence[int]) -> int:
        """An index, as likely as its weight."""
        drawn = self.below(sum(weights))
        for index, weight in enumerate(weights):
            drawn -= weight
            if drawn < 0:
                return index
        raise AssertionError("weights changed while drawing")

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """`items` in a random order (Fisher and Yates)."""
        out = list(items)
        for last in range(len(out) - 1, 0, -1):
            other = self.below(last + 1)
            out[last], out[other] = out[other], out[last]
        return out

    def unit(self) -> float:
        """A float from 0 up to, not including, 1."""
        return self._bits.getrandbits(53) / _UNIT

    def uniform_s(self, low: float, high: float) -> float:
        """A duration between `low` and `high`."""
        return low + (high - low) * self.unit()

    def exponential_s(self, mean: float) -> float:
        """A duration with this mean, memoryless: gaps of a Poisson process."""
        return -mean * math.log(1.0 - self.unit())
