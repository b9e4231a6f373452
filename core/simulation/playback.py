"""Plays a dump of a running router: the same events at the same instants, the invariants on.

Decides whether what comes of each step is what came of it then. Knows the router by its three inputs only.
"""

import hashlib
from collections.abc import Callable
from typing import Any, Final

import msgspec

from core.dump import PLACEMENT, TICK, Dump, event_of, plain_step
from core.router import Router
from core.simulation.shrink import shrink
from core.units import Instant

Invariants = Callable[..., None]

DIFFERENCE_MAX: Final = 2000
"""Characters of what differs that are shown."""


class Played(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. The digests cover every step's effects, now and as recorded."""

    steps: int
    digest: str
    recorded: str
    failure: str = ""
    """What an invariant says, or what was raised that was not then; with the step's number."""
    difference: str = ""
    """The first step whose effects are others."""

    @property
    def same(self) -> bool:
        """Whether it went as it did then, and nothing was broken."""
        return self.digest == self.recorded and not self.failure


def play(dump: Dump, *, invariants: Invariants | None = None) -> Played:
    """Play all of it, to the first failure. Raises RemoteError when the dump cannot be used."""
    router = dump.router()
    hashes = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    difference = failure = ""
    number = 0
    for number, (at, given, recorded) in enumerate(dump.steps, start=1):
        what = event_of(given)
        effects, problem = _step(router, what, at, invariants)
        if problem and recorded is not None:
            failure = f"step {number}: {problem}"
        for digest, part in zip(hashes, (effects, recorded), strict=True):
            digest.update(msgspec.msgpack.encode(part))
        if effects != recorded and not difference:
            difference = f"step {number}, at {at:.6f} s: {str(what)[:DIFFERENCE_MAX]}\n  then: {_cut(recorded)}\n  now:  {_cut(effects)}"
        if failure:
            break
    return Played(steps=number, digest=hashes[0].hexdigest(), recorded=hashes[1].hexdigest(), failure=failure, difference=difference)


def shorten(dump: Dump, played: Played, *, invariants: Invariants | None = None, tries_max: int = 400) -> Dump:
    """`dump` without the steps that its failure does not need."""
    said = played.failure.partition(": ")[2]

    def fails(steps: list[Any]) -> bool:
        again = play(msgspec.structs.replace(dump, steps=steps), invariants=invariants)
        return again.failure.partition(": ")[2] == said

    return msgspec.structs.replace(dump, steps=shrink(dump.steps[: played.steps], fails, tries_max=tries_max))


def _step(router: Router, what: Any, at: Instant, invariants: Invariants | None) -> tuple[Any, str]:
    """(effects in plain form, None when it raised; what was wrong)."""
    try:
        if what == PLACEMENT:
            router.placement()
            effects = []
        else:
            effects = router.tick(now=at) if what == TICK else router.handle(what, now=at)
        if invariants is not None:
            invariants(router, now=at)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    return plain_step(effects), ""


def _cut(effects: Any) -> str:
    return "it raised" if effects is None else str(effects)[:DIFFERENCE_MAX]
