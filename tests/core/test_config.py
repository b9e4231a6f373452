"""A `RouterConfig` that exists is usable."""

import pytest

from core.config import STRATEGIES, RouterConfig
from core.errors import ConfigError

NUMBERS = [name for name in RouterConfig.__struct_fields__ if isinstance(getattr(RouterConfig(), name), (int, float))]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_can_be_chosen(strategy: str) -> None:
    assert RouterConfig(strategy=strategy).strategy == strategy


def test_an_unknown_strategy_is_refused_and_told_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"LOAD_BALANCER_MODE must be one of auto, metrics, least-busy, round-robin, not 'fastest'"):
        RouterConfig(strategy="fastest")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, 0, float("nan")])
def test_no_limit_may_be_nothing(name: str, value: float) -> None:
    if name == "retries_budgeted" and value == 0:
        assert RouterConfig(retries_budgeted=0).retries_budgeted == 0
        return
    with pytest.raises(ConfigError, match=name):
        RouterConfig(**{name: value})


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"pulse_s": 15.0}, "lease_ttl_s must be more than twice pulse_s"),
        ({"busy_pause_s": 9.0}, "first pause"),
        ({"eject_s": 301.0}, "first pause"),
        ({"queue_per_client": 2000}, "ROUTER_QUEUE_PER_CLIENT may not be above ROUTER_QUEUE_MAX"),
    ],
)
def test_limits_must_go_together(changed: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        RouterConfig(**changed)  # type: ignore[arg-type]
