"""The computed bound: the known figure for the eight mixed nodes, and what a single machine can do by hand."""

import pytest

from core.placement import Supply
from core.simulation.bound import best_placement, demand, supplies
from core.simulation.hardware import GPUS, MIXED, MODELS, fits, model_timing, node_timing
from core.simulation.study import NodeSpec, mixed_fleet
from core.simulation.workload import CODE_MIX, CONVERSATION_MIX, INPUT_MAX, Row

MIXES = {"code": CODE_MIX, "conversation": CONVERSATION_MIX}
AZURE = [
    *(Row(at_s=0.0, input_tokens=1585, output_tokens=28, kind="code") for _ in range(8819)),
    *(Row(at_s=0.0, input_tokens=1084, output_tokens=211, kind="conversation") for _ in range(19366)),
]
"""As many rows as the Azure 2023 traces have, of their mean lengths after the cut."""


def fleet() -> list[NodeSpec]:
    return mixed_fleet(
        MIXED,
        lambda gpu: {name: model_timing(name, model, GPUS[gpu]) for name, model in MODELS.items() if fits(model, GPUS[gpu])},
        lambda gpu: node_timing(GPUS[gpu]),
    )


def test_the_mixed_fleet_carries_what_an_integer_program_says() -> None:
    """A MILP solver gave 5.15 requests/s, without context in memory; with it, it is a little less."""
    found = best_placement(fleet(), demand(AZURE, MIXES), rate_per_s=1.0)
    assert found.exact
    assert found.capacity_per_s == pytest.approx(5.15, rel=0.02)
    assert not found.unheld


def test_demand_is_by_expectation() -> None:
    rows = [Row(at_s=0, input_tokens=100, output_tokens=10, kind="a"), Row(at_s=1, input_tokens=9999, output_tokens=30, kind="b")]
    asked = demand(rows, {"a": {"x": 1, "y": 1}, "b": {"y": 3, "z": 0}})
    assert set(asked) == {"x", "y"}
    assert (asked["x"].part, asked["x"].input_tokens, asked["x"].output_tokens) == (0.25, 100, 10)
    assert asked["y"].part == 0.75
    assert asked["y"].input_tokens == pytest.approx((0.5 * 100 + INPUT_MAX) / 1.5)


def test_one_machine_by_hand() -> None:
    (node,) = mixed_fleet(
        ["rtx-3090"],
        lambda gpu: {"llama3.1:8b": model_timing("llama3.1:8b", MODELS["llama3.1:8b"], GPUS[gpu])},
        lambda gpu: node_timing(GPUS[gpu], slots=4),
    )
    asked = demand([Row(at_s=0, input_tokens=386, output_tokens=100, kind="k")], {"k": {"llama3.1:8b": 1, "unknown": 0}})
    (supply,) = supplies([node], asked)
    assert isinstance(supply, Supply)
    work_s = 386 / 3865.0 + 100 * (1 + 0.15 * 3) / 4 / 111.7
    assert supply.offers["llama3.1:8b"].work_s == pytest.approx(work_s, rel=1e-3)
    assert supply.offers["llama3.1:8b"].load_s == pytest.approx(1 + 4.9 / 2)
    assert supply.offers["llama3.1:8b"].size_bytes == round(4.9e9) + 128 * 1024 * 4096 * 4
    assert best_placement([node], asked, rate_per_s=1.0).capacity_per_s == pytest.approx(1 / work_s, rel=1e-3)


def test_models_that_nobody_asks_for_are_no_offers() -> None:
    asked = demand([Row(at_s=0, input_tokens=1, output_tokens=1, kind="k")], {"k": {"llama3.2:3b": 1}})
    assert {model for supply in supplies(fleet(), asked) for model in supply.offers} == {"llama3.2:3b"}
