"""How many requests one loaded model serves at once on a node that did not say so: learned from requests that ran side by side.

Decides a limit per (node, model) and when one more may be tried; who is sent where is `core.scoring`'s business. Knows no time but
instants, and of a request only how many of its model were on the node with it, and what its answer told.

* Where nothing was told it begins with `slots_default`, 1: Ollama's own default. An optimistic start would make a node with one slot
  look four times as fast as it is, so that requests wait in its memory instead of going to an idle node: scale-out held back. Too low
  a start costs one probe.
* One request too many is sent as a probe as soon as the limit is reached. If it answers while all those before it are still being
  answered, the limit is one higher, and the next probe may go. If it waited for a slot, there is a pause, twice as long each time.
* The final chunk tells the wait for a slot: total - load - prompt - eval. Requests that waited although the limit was kept, `STRIKES`
  in a row, lower it: families that are forced to one slot come out, whatever the node's setting.

Invariants: a limit is at least 1, at most what the node told, or `LEARNED_MAX` where it told nothing; at most one probe is under way.
"""

from collections.abc import Iterable
from itertools import takewhile
from typing import Final

import msgspec

from core.agents import Agent
from core.events import Usage
from core.leases import Held
from core.units import Instant, ModelKey, RequestId

LEARNED_MAX: Final = 8
STRIKES: Final = 2
WAITED_S: Final = 0.2
WAITED_SHARE: Final = 0.05
"""More than this, and than this share of the whole, is no templating and no health ping, but a wait for a slot."""
PAUSE_S: Final = 30.0
PAUSE_MAX_S: Final = 3600.0
_NS_PER_S: Final = 1_000_000_000
_WAITED_NS: Final = int(WAITED_S * _NS_PER_S)


class Pair(msgspec.Struct):
    """Learned about one model on one node."""

    pause_s: float = PAUSE_S
    probe_at: Instant = Instant(0.0)
    """From then on one request too many may be sent."""
    strikes: int = 0
    lower: int = LEARNED_MAX
    """The limit that the strikes speak for."""


def waited_s(usage: Usage | None) -> float | None:
    """How long the request waited for a slot; None when its answer does not tell."""
    if usage is None or not usage.total_ns or not usage.eval_ns:
        return None
    return max(usage.total_ns - usage.load_ns - usage.prompt_ns - usage.eval_ns, 0) / _NS_PER_S


def sent(agent: Agent, key: ModelKey, beside: int, *, now: Instant) -> None:
    """A request was sent; `beside`: how many of its model are on the node now."""
    limit = agent.slots_for(key)
    if beside < limit or limit >= _ceiling(agent):
        return
    pair = agent.learned.get(key)
    if pair is None:
        if agent.slots_told:
            return
        pair = agent.learned[key] = Pair()
    if beside > limit:
        agent.probes.pop(key, None)
        pair.probe_at = Instant(now + pair.pause_s)
    elif now >= pair.probe_at:
        agent.probes[key] = None


def answered(agent: Agent, key: ModelKey, request_id: RequestId, beside: int, live: Iterable[Held], *, now: Instant) -> bool:
    """A request that was one too many begins to answer; `live`: what is on the node, the oldest first. If all those of its model that came
    before it are still there, they are served at once. Returns whether that raises the limit."""
    if beside <= agent.slots_for(key) or key not in agent.learned:
        return False
    older = takewhile(lambda held: held.request_id != request_id, live)
    if sum(held.key == key for held in older) + 1 < beside:
        return False
    agent.limits[key] = min(beside, _ceiling(agent))
    pair = agent.learned[key]
    pair.pause_s, pair.strikes, pair.probe_at = PAUSE_S, 0, now
    if agent.limits[key] < _ceiling(agent):
        agent.probes[key] = None
    return True


def ended(agent: Agent, key: ModelKey, beside: int, usage: Usage | None, now: Instant) -> bool:
    """A request ended well that had `beside` of its model on the node when it came. Returns whether that lowers the limit."""
    if usage is None or beside < 2:
        return False
    if not agent.learned and usage.total_ns - usage.load_ns - usage.prompt_ns - usage.eval_ns <= _WAITED_NS:
        return False  # as below, and most of all
    wait_s = waited_s(usage)
    if wait_s is None or agent.beyond:
        return False
    limit, pair = agent.limits.get(key, agent.slots), agent.learned.get(key)
    if wait_s <= max(WAITED_S, usage.total_ns / _NS_PER_S * WAITED_SHARE):
        if pair is not None:
            pair.strikes, pair.lower = 0, LEARNED_MAX
        return False
    if pair is None:
        pair = agent.learned[key] = Pair()
    if beside > limit:  # a probe that had to wait
        pair.pause_s = min(pair.pause_s * 2, PAUSE_MAX_S)
        pair.probe_at = Instant(now + pair.pause_s)
        return False
    pair.strikes += 1
    pair.lower = min(pair.lower, beside - 1)
    if pair.strikes < STRIKES:
        return False
    agent.limits[key] = max(pair.lower, 1)
    agent.probes.pop(key, None)
    pair.strikes, pair.lower, pair.probe_at = 0, LEARNED_MAX, Instant(now + pair.pause_s)
    return True


def _ceiling(agent: Agent) -> int:
    return agent.slots if agent.slots_told else max(LEARNED_MAX, agent.slots)
