"""The placement policy: which node should hold which model, and what is to be done about it (contract 5).

Decides which models are missing where, and which of those it placed itself are wanted no more. Nothing else places models. Never knows a
socket or a task; it is told which nodes there are, what is being done already, and how its own wishes ended. What should be *warm* is
`core.placement`'s question, not this one's.

Invariants: it never deletes what it did not place; a user's own Ollama is given nothing that no rule names; a wish that failed rests for
`REST_S`; the same facts make the same wishes, in the same order.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import msgspec

from core.errors import RemoteError
from core.names import display, is_cloud, normalise
from core.units import AgentId, Instant, ModelKey

REST_S: Final = 600.0
"""After a wish failed or was cancelled, before it is wished again."""
RULES_MAX: Final = 1_000
NODES_MAX: Final = 4_096

GB: Final = 10**9
DEFAULT_MODELS: Final = ((16 * GB, "gpt-oss:20b"), (8 * GB, "qwen3:8b"), (9 * GB // 2, "llama3.2:3b"), (0, "llama3.2:1b"))
"""The default rule: memory from which a node without any model gets this one."""
SPARE: Final = 2
"""The default rule wants so many times the model's size free on the disk."""


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One model: on these `nodes` (names or ids), on those with this `tag`, on `count` of them; nothing said: on all."""

    model: str
    nodes: tuple[str, ...] | None = None
    tag: str | None = None
    count: int | None = None


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What should be where."""

    models: tuple[Rule, ...] = ()


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """A node as the policy sees it. `memory_bytes`: of its GPUs; None: none, or not known."""

    agent_id: AgentId
    name: str
    ready: bool
    holds: Collection[ModelKey] = ()
    tags: Collection[str] = ()
    managed: bool = False
    """Its agent installed its Ollama."""
    memory_bytes: int | None = None
    disk_free_bytes: int | None = None


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What should be done. `delete`: else it is a download. `origin`: `policy`, or `default rule`."""

    agent_id: AgentId
    model: str
    delete: bool = False
    origin: str = "policy"


def checked(policy: Policy, sites: Sequence[Site]) -> Policy:
    """`policy`, when it can be meant.

    Raises:
        RemoteError: 400 a name or number that cannot be, 404 nodes that nobody knows (all of them are named).
    """
    if len(policy.models) > RULES_MAX:
        raise RemoteError(f"models may have {RULES_MAX} entries at most", status=400)
    seen: dict[ModelKey, None] = {}
    unknown: dict[str, None] = {}
    for rule in policy.models:
        key = normalise(rule.model)
        if is_cloud(key):
            raise RemoteError(f"{rule.model} is a model of Ollama's cloud: no node can hold it", status=400)
        if key in seen:
            raise RemoteError(f"models names {display(key)} twice: put all of its nodes into one entry", status=400)
        seen[key] = None
        if rule.count is not None and not 1 <= rule.count <= NODES_MAX:
            raise RemoteError(f"count must be a whole number from 1 to {NODES_MAX}", status=400)
        if rule.nodes is not None and not rule.nodes:
            raise RemoteError(f"nodes of {rule.model} is empty: name nodes, or leave it out to mean all", status=400)
        known = {name for site in sites for name in (site.agent_id, site.name)}
        unknown |= dict.fromkeys(name for name in rule.nodes or () if name not in known)
    if unknown:
        raise RemoteError(f"there is no node {', '.join(unknown)}", status=404)
    return policy


def sites_for(rule: Rule, sites: Sequence[Site]) -> list[Site]:
    """The nodes that should hold the rule's model. For a count: those that hold it, then those with most memory; an offline holder counts,
    so that a node that is away for a while moves nothing."""
    key = normalise(rule.model)
    found = [
        site
        for site in sites
        if (rule.nodes is None or site.name in rule.nodes or site.agent_id in rule.nodes) and (rule.tag is None or rule.tag in site.tags)
    ]
    found.sort(key=lambda site: (key not in site.holds, not site.ready, -(site.memory_bytes or 0), site.agent_id))
    return found if rule.count is None else found[: rule.count]


def default_model(memory_bytes: int | None) -> str:
    """What the default rule gives a node with so much memory."""
    return next(model for least, model in DEFAULT_MODELS if (memory_bytes or 0) >= least)


class Keeper:
    """Keeps one fleet as its policy says. `default_rule`: `ROUTER_AUTO_DISTRIBUTE`."""

    def __init__(self, *, default_rule: bool) -> None:
        self.policy = Policy()
        self.placed: dict[tuple[AgentId, ModelKey], None] = {}
        """What it had downloaded itself."""
        self.default_rule = default_rule
        self._rests: dict[tuple[AgentId, ModelKey], Instant] = {}

    def wants(self, key: ModelKey) -> bool:
        """Whether a rule names the model, so that it would come back when it is deleted."""
        return any(normalise(rule.model) == key for rule in self.policy.models)

    def adopt(self, policy: Policy) -> None:
        """Keep to this policy from now on. What failed under the former one is tried again at once."""
        self.policy = policy
        self._rests.clear()

    def over(self, wish: Wish, *, succeeded: bool, now: Instant) -> None:
        """A wish was carried out, or was not."""
        place = (wish.agent_id, normalise(wish.model))
        if not succeeded:
            self._rests[place] = Instant(now + REST_S)
        elif wish.delete:
            self.placed.pop(place, None)
        else:
            self.placed[place] = None

    def wishes(
        self,
        sites: Sequence[Site],
        *,
        busy: Collection[tuple[AgentId, ModelKey]],
        sizes: Mapping[ModelKey, int],
        now: Instant,
    ) -> list[Wish]:
        """What is to be done now. `busy`: models on nodes about which something is done already; `sizes` in bytes, as far as known."""
        self._rests = {place: until for place, until in self._rests.items() if until > now}
        wanted: dict[tuple[AgentId, ModelKey], None] = {}
        found: list[Wish] = []
        for rule in self.policy.models:
            key = normalise(rule.model)
            for site in sites_for(rule, sites):
                wanted[site.agent_id, key] = None
                if key not in site.holds and self._may(site, key, busy) and _fits(site, sizes.get(key)):
                    found.append(Wish(agent_id=site.agent_id, model=rule.model))
        by_id = {site.agent_id: site for site in sites}
        for agent_id, key in self.placed:
            place = by_id.get(agent_id)
            named = (agent_id, key) in wanted or self._is_default(place, key)
            if place is not None and not named and key in place.holds and self._may(place, key, busy):
                found.append(Wish(agent_id=agent_id, model=display(key), delete=True))
        if self.default_rule:
            found += self._defaults(sites, found, busy, sizes)
        return found

    def _is_default(self, site: Site | None, key: ModelKey) -> bool:
        return site is not None and site.managed and key == normalise(default_model(site.memory_bytes))

    def _may(self, site: Site, key: ModelKey, busy: Collection[tuple[AgentId, ModelKey]]) -> bool:
        place = (site.agent_id, key)
        return site.ready and place not in busy and place not in self._rests

    def _defaults(
        self, sites: Sequence[Site], wished: Sequence[Wish], busy: Collection[tuple[AgentId, ModelKey]], sizes: Mapping[ModelKey, int]
    ) -> list[Wish]:
        """A node whose Ollama the agent installed and that has nothing gets one model that its memory can take."""
        taken = {wish.agent_id for wish in wished} | {agent_id for agent_id, _ in busy}
        found = []
        for site in sites:
            model = default_model(site.memory_bytes)
            key = normalise(model)
            size = sizes.get(key)
            empty = site.managed and not site.holds and site.agent_id not in taken
            roomy = site.disk_free_bytes is not None and size is not None and SPARE * size <= site.disk_free_bytes
            if empty and roomy and self._may(site, key, busy):
                found.append(Wish(agent_id=site.agent_id, model=model, origin="default rule"))
        return found


def _fits(site: Site, size_bytes: int | None) -> bool:
    """Whether the disk can take it, as far as is known."""
    return site.disk_free_bytes is None or size_bytes is None or size_bytes <= site.disk_free_bytes
