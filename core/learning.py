"""How fast each node runs each model: learned from the requests that ended well, guessed by size until then.

Decides numbers only; never which node gets a request. Knows nothing of queues or faults.

* Single-stream speeds are slowly decaying maxima: a plain mean would learn contention as slowness.
* Prefill is believed from a request that loaded the model (nothing was cached then); later ones may be cache hits and look too fast.
* A load is learned only from the request that caused it, and only when no other load ran beside it.
* What no token explains (connection, templating, an embedding's fixed part) is the smallest rest that was seen, slowly rising.
* Without data of its own a pair of node and model borrows, scaled by the model's size: from other models on that node, then from the
  fleet, then from the configured priors. Decode, prefill and load times all grow with the bytes of the weights.
* Rates are rounded to about 6 %, so that equal nodes tie and share the work instead of following noise.

Invariants: rates are positive integers; a table never outgrows the nodes and models that are alive plus `MODELS_MAX`.
"""

from typing import Final

from core.config import RouterConfig
from core.parts import Part
from core.structs import Fact, mypyc_attr
from core.units import MICROS_PER_S, AgentId, Instant, ModelKey

MODELS_MAX: Final = 4096
"""Models whose answer length is remembered."""

SIZE_DEFAULT_BYTES: Final = 4_900_000_000
"""The model that the configured priors speak of; also the size of one whose size is not known."""

LOAD_FIXED_S: Final = 1.0
"""What a load takes whatever its size (starting the runner, making room)."""

BATCH_SLOPE: Final = 0.15
"""Slowdown of each stream per stream beside it (routing.md: beta)."""

_PEAK_DECAY: Final = 0.05
_JUMP_MAX: Final = 4.0
_NS_PER_S: Final = 1_000_000_000
_UNKNOWN_S: Final = 1e9
LEARN_EVERY_S: Final = 0.02
"""Of one model on one node. What a hundred requests within a second show, fifty show as well."""

DROPS_MAX: Final = 4096
"""Entries of a model's log of dropped rates; a longer one is begun anew."""

_TOLERANCE: Final = 0.03
"""Changes below this share of a value do not change rates, which are coarser than that."""


class Sample(Fact, frozen=True):
    """What one request that ended well showed. Times in seconds; None or 0 where nothing is known."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    output_told: bool = True
    """Whether `output_tokens` is the node's figure; otherwise it is what was expected."""
    prefill_s: float = 0.0
    decode_s: float = 0.0
    load_s: float | None = None
    """Set only by a request that caused a load with no other load beside it."""
    cold: bool = False
    service_s: float | None = None
    """From forwarding to the end, of a request that caused no load."""


@mypyc_attr(acyclic=True)
class Rates:
    """What a request costs on one node: `overhead_us + prompt tokens * prefill_ns + output tokens * decode_ns`, and a load. `decode_ns` is
    node time per output token: with several slots a token takes its share of the batch. Never changed."""

    __slots__ = ("decode_ns", "load_us", "overhead_us", "prefill_ns")

    def __init__(self, prefill_ns: int, decode_ns: int, overhead_us: int, load_us: int) -> None:
        self.prefill_ns: Final = prefill_ns
        self.decode_ns: Final = decode_ns
        self.overhead_us: Final = overhead_us
        self.load_us: Final = load_us

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rates) and self._all() == other._all()

    def _all(self) -> tuple[int, int, int, int]:
        return self.prefill_ns, self.decode_ns, self.overhead_us, self.load_us


class _Pair:
    """Learned about one model on one node; speeds in tokens/s. `used`: the values that the present rates come from."""

    __slots__ = ("curious_at", "decode", "load_s", "overhead_s", "prefill", "used")

    def __init__(self) -> None:
        self.decode: float | None = None
        self.prefill: float | None = None
        self.load_s: float | None = None
        self.overhead_s = _UNKNOWN_S
        self.curious_at = Instant(0.0)
        self.used = (0.0, 0.0, 0.0, 0.0)


class _Scaled:
    """Speeds times size, of a node or of the fleet: what carries over from model to model; bytes/s."""

    __slots__ = ("decode", "load", "prefill")

    def __init__(self) -> None:
        self.decode: float | None = None
        self.prefill: float | None = None
        self.load: float | None = None


class Speeds(Part):
    """Of the whole fleet."""

    __slots__ = ("_expected", "_fleet", "_nodes", "_output", "_pairs", "_prior", "_prior_output", "drops", "known")

    def __init__(self, config: RouterConfig) -> None:
        self._prior_output = config.output_prior_tokens
        self._prior = _Scaled()
        self._prior.decode = config.decode_prior_tok_s * SIZE_DEFAULT_BYTES
        self._prior.prefill = config.prefill_prior_tok_s * SIZE_DEFAULT_BYTES
        self._prior.load = config.load_bytes_per_s
        self._fleet = _Scaled()
        self._nodes: dict[AgentId, _Scaled] = {}
        self._pairs: dict[AgentId, dict[ModelKey, _Pair]] = {}
        self._output: dict[ModelKey, float] = {}
        self._expected: dict[ModelKey, int] = {}
        """The same, rounded."""
        self.known: dict[ModelKey, dict[AgentId, Rates]] = {}
        """What `rates` told, as long as it holds: for who asks so often that a call counts."""
        self.drops: dict[ModelKey, list[AgentId]] = {}
        """Logs of what was dropped from `known`: see `log_of`."""

    def rates(self, agent_id: AgentId, key: ModelKey, *, size_bytes: int, slots: int) -> Rates:
        """The rates of `key` on a node. Kept until something is learned that changes them, or `refresh`."""
        of_model = self.known.get(key)
        if of_model is None:
            of_model = self.known[key] = {}
        rates = of_model.get(agent_id)
        if rates is None:
            rates = of_model[agent_id] = self._compute(agent_id, key, size_bytes or SIZE_DEFAULT_BYTES, slots)
        return rates

    def log_of(self, key: ModelKey) -> list[AgentId]:
        """The nodes whose rates for the model are dropped from now on, in order: who keeps something made of rates reads on where it was.
        Where `drops` has another list for the model, or none, everything may be another one."""
        return self.drops.setdefault(key, [])

    def output_tokens(self, key: ModelKey) -> int:
        """Expected length of an answer of this model."""
        return self._expected.get(key, self._prior_output)

    def refresh(self, agent_id: AgentId) -> None:
        """A node's slots or models changed: compute its rates anew."""
        for key in self.known:
            self._drop(agent_id, key)
        for key in [key for key, of_model in self.known.items() if not of_model]:
            del self.known[key]

    def forget(self, agent_id: AgentId) -> None:
        """The node is gone for good."""
        self.refresh(agent_id)
        self._pairs.pop(agent_id, None)
        self._nodes.pop(agent_id, None)

    def curious(self, agent_id: AgentId, key: ModelKey, now: Instant) -> bool:
        """Whether another request that ended well is worth learning from. Who asks must do so then."""
        of_node = self._pairs.get(agent_id)
        pair = None if of_node is None else of_node.get(key)
        if pair is None:
            return True
        if now < pair.curious_at:
            return False
        pair.curious_at = Instant(now + LEARN_EVERY_S)
        return True

    def learn(self, agent_id: AgentId, key: ModelKey, sample: Sample, *, size_bytes: int) -> None:
        """One request ended well. On the way of every request: what hardly changes is not spread, and rates stay as they are."""
        size = size_bytes or SIZE_DEFAULT_BYTES
        pairs = self._pairs.get(agent_id)
        if pairs is None:
            pairs = self._pairs[agent_id] = {}
        pair = pairs.get(key)
        if pair is None:
            pair = pairs[key] = _Pair()
        self._learn_pair(agent_id, pair, sample, size)
        if sample.output_told and sample.output_tokens > 0:
            self._learn_output(key, sample.output_tokens)
        decode, prefill, load_s, overhead_s = pair.used
        if (
            _moved(decode, pair.decode)
            or _moved(prefill, pair.prefill)
            or _moved(load_s, pair.load_s)
            or abs(overhead_s - pair.overhead_s) > max(overhead_s * _TOLERANCE, 0.001)
        ):
            pair.used = (pair.decode or 0.0, pair.prefill or 0.0, pair.load_s or 0.0, pair.overhead_s)
            for name, value in (("decode", pair.decode), ("prefill", pair.prefill)):
                if value is not None:
                    self._spread(agent_id, name, value * size)
            if pair.load_s is not None:
                self._spread(agent_id, "load", size / max(pair.load_s - LOAD_FIXED_S, 0.1))
            self._drop(agent_id, key)

    def _drop(self, agent_id: AgentId, key: ModelKey) -> None:
        """Its rates are to be computed anew."""
        known, log = self.known.get(key), self.drops.get(key)
        if known is None or known.pop(agent_id, None) is None or log is None:
            return
        log.append(agent_id)
        if len(log) > DROPS_MAX:
            del self.drops[key]

    def _learn_pair(self, agent_id: AgentId, pair: _Pair, sample: Sample, size: int) -> None:
        if sample.output_tokens > 0 and sample.decode_s > 0:
            pair.decode = _peak(pair.decode, min(sample.output_tokens / sample.decode_s, 1e5))
        if sample.prompt_tokens > 0 and sample.prefill_s > 0:
            speed = min(sample.prompt_tokens / sample.prefill_s, 1e6)
            if sample.cold or speed <= 2 * self._speed(agent_id, pair.prefill, "prefill", size):
                pair.prefill = _peak(pair.prefill, speed)
        if sample.load_s is not None:
            pair.load_s = sample.load_s if pair.load_s is None else (pair.load_s + sample.load_s) / 2
        if sample.service_s is not None:
            rest = max(sample.service_s - sample.prefill_s - sample.decode_s, 0.0)
            known = pair.overhead_s
            pair.overhead_s = rest if rest < known else known + (rest - known) * _PEAK_DECAY

    def _learn_output(self, key: ModelKey, tokens: int) -> None:
        mean = self._output.get(key)
        if mean is None and len(self._output) >= MODELS_MAX:
            oldest = next(iter(self._output))
            del self._output[oldest], self._expected[oldest]
        mean = self._output[key] = float(tokens) if mean is None else mean + (tokens - mean) * 0.1
        self._expected[key] = round(mean)

    def _spread(self, agent_id: AgentId, name: str, scaled: float) -> None:
        """Let other models on the node, and other nodes, profit. Their rates are computed anew when the rounded value moves."""
        node = self._nodes.setdefault(agent_id, _Scaled())
        for holder, weight in ((node, 0.3), (self._fleet, 0.1)):
            before = getattr(holder, name)
            after = scaled if before is None else before + (scaled - before) * weight
            setattr(holder, name, after)
            if before is None or _coarse(round(before)) != _coarse(round(after)):
                if holder is node:
                    self.refresh(agent_id)
                else:
                    self.known.clear()
                    self.drops.clear()

    def _speed(self, agent_id: AgentId, own: float | None, name: str, size: int) -> float:
        """Tokens/s: the pair's own, else borrowed by size."""
        return own if own is not None else self._scaled(agent_id, name) / size

    def _scaled(self, agent_id: AgentId, name: str) -> float:
        for holder in (self._nodes.get(agent_id), self._fleet, self._prior):
            value: float | None = getattr(holder, name, None)
            if value is not None:
                return value
        raise AssertionError("the priors know everything")

    def _compute(self, agent_id: AgentId, key: ModelKey, size: int, slots: int) -> Rates:
        pair = self._pairs.get(agent_id, {}).get(key) or _Pair()
        decode = self._speed(agent_id, pair.decode, "decode", size)
        prefill = self._speed(agent_id, pair.prefill, "prefill", size)
        load_s = pair.load_s if pair.load_s is not None else LOAD_FIXED_S + size / self._scaled(agent_id, "load")
        share = (1 + BATCH_SLOPE * (slots - 1)) / slots
        return Rates(
            prefill_ns=_coarse(round(_NS_PER_S / prefill)),
            decode_ns=_coarse(round(_NS_PER_S * share / decode)),
            overhead_us=0 if pair.overhead_s == _UNKNOWN_S else _coarse(round(pair.overhead_s * MICROS_PER_S)),
            load_us=_coarse(round(load_s * MICROS_PER_S)),
        )


def _peak(known: float | None, sample: float) -> float:
    """A slowly decaying maximum; one sample may not raise it by more than a factor, so that one absurd figure cannot poison it."""
    if known is None:
        return sample
    if sample >= known:
        return min(sample, known * _JUMP_MAX)
    return known + (sample - known) * _PEAK_DECAY


def _moved(used: float, value: float | None) -> bool:
    return value is not None and abs(value - used) > used * _TOLERANCE


def _coarse(value: int) -> int:
    """`value`, at least 1, with its four leading bits only."""
    value = max(value, 1)
    shift = max(value.bit_length() - 4, 0)
    return value >> shift << shift
