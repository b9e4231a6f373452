"""The question that the router asks about its fleet: what it learned, in the units of the answer."""

import pytest

from core.advice import MODELS_MAX, Prompts
from core.events import Usage
from core.messages import GpuDevice
from core.names import normalise
from core.units import GIB
from tests.core.routing import World, row


def test_prompts_have_a_mean_that_follows() -> None:
    prompts = Prompts()
    key = normalise("m")
    assert prompts.mean(key) == 0.0
    prompts.came(key, 100)
    assert prompts.mean(key) == 100.0
    prompts.came(key, 200)
    assert prompts.mean(key) == pytest.approx(105.0)
    assert prompts.keys() == [key]


def test_prompts_of_endless_names_have_a_limit() -> None:
    prompts = Prompts()
    for n in range(MODELS_MAX + 10):
        prompts.came(normalise(f"m{n}"), 1)
    assert len(prompts.keys()) == MODELS_MAX
    assert prompts.mean(normalise("m0")) == 0.0


def test_an_idle_fleet_asks_for_nothing() -> None:
    world = World()
    world.backend("a", "m")
    found = world.router.placement()
    assert found.rates_per_s == {}
    assert found.answer().placed == []


def test_what_is_asked_for_and_loaded_is_in_the_question() -> None:
    world = World()
    world.backend("b", "idle")
    world.backend("a", "m", "other", "idle", loaded=("other",), slots=4)
    for n in range(10):
        world.ask(f"r{n}", input_tokens=1000)
        world.serve(f"r{n}", 0.5, usage=Usage(prompt_tokens=1000, output_tokens=50, prompt_ns=10**8, eval_ns=10**9))
    found = world.router.placement()
    assert found.rates_per_s == {"m:latest": pytest.approx(2.0, rel=0.1)}
    assert found.guessed == ["b", "a"]
    other, node = found.nodes
    assert other.offers == {}
    assert set(node.offers) == {"m:latest", "other:latest"}
    assert node.loaded == ("other:latest", "m:latest")
    assert node.room_share == 1.0
    assert 0.1 < node.offers["m:latest"].work_s < 2.0
    assert node.offers["m:latest"].size_bytes == pytest.approx(4.9e9 * 1.2)


def test_memory_that_was_never_told_is_what_was_seen_in_it() -> None:
    world = World()
    node = world.backend("a", "m", "n")
    world.ask("r", "m")
    world.settle("r")
    world.ask("s", "n")
    (alone,) = world.router.placement().nodes
    assert alone.memory_bytes == alone.offers["m:latest"].size_bytes
    world.poll(node, loaded=[row("m", size=6_000_000_000), row("n", size=7_000_000_000)])
    (both,) = world.router.placement().nodes
    assert both.memory_bytes == 13_000_000_000
    assert both.fits(["m:latest", "n:latest"])


def test_an_agent_tells_its_memory() -> None:
    world = World()
    world.agent_with("a", "m", gpu_devices=[GpuDevice(model="RTX", count=2, memory=12 * GIB)])
    world.ask("r", "m")
    found = world.router.placement()
    assert found.guessed == []
    assert (found.nodes[0].memory_bytes, found.nodes[0].max_loaded, found.nodes[0].room_share) == (24 * GIB, 6, 0.8)


def test_the_answer_names_the_models_as_people_do() -> None:
    world = World()
    world.agent_with("a", "m:latest", gpu_devices=[GpuDevice(model="RTX", count=1, memory=12 * GIB)])
    world.ask("r", "m")
    plan = world.router.placement().answer(steps=100)
    assert [(placed.node, placed.model) for placed in plan.placed] == [("a", "m:latest")]
