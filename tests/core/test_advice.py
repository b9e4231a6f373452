"""The question that the router asks about its fleet: what it learned, in the units of the answer."""

import pytest

from core.advice import MODELS_MAX, Prompts
from core.events import Usage
from core.messages import GpuDevice
from core.names import normalise
from core.units import GIB, AgentId
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
