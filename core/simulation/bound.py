"""The most that a fleet of a study can carry: what its loads are measured against.

Decides nothing: `core.placement` searches. The bound is the rate of requests of a mix with every model of a placement warm and every slot
taken, the best placement chosen (routing.md 4). No way of choosing nodes can sustain more, whatever it knows.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from core.placement import Offer, Plan, Supply, plan
from core.simulation.node_words import effective_context, needed_bytes
from core.simulation.study import NodeSpec
from core.simulation.workload import INPUT_MAX, Row

SEARCH_STEPS: Final = 200_000


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of one model: its part of all requests, and their mean lengths."""

    part: float
    input_tokens: float
    output_tokens: float


def demand(rows: Iterable[Row], mixes: Mapping[str, Mapping[str, int]]) -> dict[str, Demand]:
    """What rows of a trace ask of each model, by expectation: no model is drawn."""
    sums: dict[str, list[float]] = {}
    count = 0
    for row in rows:
        count += 1
        mix = mixes[row.kind]
        total = sum(mix.values())
        for model, weight in mix.items():
            of_model = sums.setdefault(model, [0.0, 0.0, 0.0])
            part = weight / total
            of_model[0] += part
            of_model[1] += part * min(row.input_tokens, INPUT_MAX)
            of_model[2] += part * row.output_tokens
    return {
        model: Demand(part=part / count, input_tokens=inputs / part, output_tokens=outputs / part)
        for model, (part, inputs, outputs) in sums.items()
        if part
    }


def supplies(fleet: Sequence[NodeSpec], asked: Mapping[str, Demand]) -> list[Supply]:
    """The nodes as the placement search sees them, their true speeds known; a request takes the time of its part of a full batch."""
    found = []
    for node in fleet:
        timing = node.timing
        offers = {}
        for name, model in node.models.items():
            of_model = asked.get(name)
            if of_model is None:
                continue
            slots = 1 if model.single else timing.slots
            batch = (1 + timing.batch_slope * (slots - 1)) / slots
            offers[name] = Offer(
                size_bytes=needed_bytes(model, effective_context(None, model, timing), slots),
                work_s=of_model.input_tokens / model.prefill_tokens_s + of_model.output_tokens * batch / model.decode_tokens_s,
                load_s=timing.load_base_s + model.size_bytes / timing.load_bytes_s,
            )
        found.append(Supply(name=node.name, memory_bytes=timing.memory_bytes, max_loaded=timing.max_loaded, offers=offers))
    return found


def best_placement(fleet: Sequence[NodeSpec], asked: Mapping[str, Demand], *, rate_per_s: float, steps: int = SEARCH_STEPS) -> Plan:
    """The plan for this fleet at this rate; its `capacity_per_s` and `bound_per_s` are the bound, found and proven."""
    return plan(supplies(fleet, asked), {model: of_model.part * rate_per_s for model, of_model in asked.items()}, steps=steps)
