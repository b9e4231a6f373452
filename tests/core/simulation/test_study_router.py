"""The real router in a study: it keeps models where they are, it queues and refuses within its limits, and runs repeat."""

import math

from core.config import RouterConfig
from core.simulation.baselines import rules
from core.simulation.hardware import GPUS, MODELS, model_timing, node_timing
from core.simulation.node import NodeTiming, Timing
from core.simulation.prng import Prng
from core.simulation.study import Figures, NodeSpec, RuleDispatcher, Study, mixed_fleet
from core.simulation.study_router import BUSY_CPU_PERCENT, IDLE_CPU_PERCENT, RouterDispatcher
from core.simulation.workload import Arrival
from core.units import Instant, RequestId

NAMES = ("llama3.2:3b", "llama3.1:8b", "gemma3:12b", "qwen2.5:14b", "qwen2.5:32b")


def fleet(*, max_queue: int = 512, max_loaded: int = 1) -> list[NodeSpec]:
    def timing(gpu: str) -> NodeTiming:
        plain = node_timing(GPUS[gpu], slots=2, max_loaded=max_loaded)
        return NodeTiming(
            slots=plain.slots,
            max_loaded=plain.max_loaded,
            max_queue=max_queue,
            memory_bytes=plain.memory_bytes,
            load_base_s=1.0,
            load_bytes_s=plain.load_bytes_s,
        )

    return mixed_fleet(["rtx-3090"] * 3, lambda gpu: {name: model_timing(name, MODELS[name], GPUS[gpu]) for name in NAMES}, timing)


def workload(count: int, *, gap_s: float, client: str = "somebody") -> list[Arrival]:
    dice = Prng("work")
    clock, out = 0.0, []
    for _ in range(count):
        clock += dice.exponential_s(gap_s)
        out.append(
            Arrival(
                at_s=clock,
                model=NAMES[dice.weighted([3, 2, 1])],
                input_tokens=dice.between(10, 900),
                output_tokens=dice.between(1, 60),
                client=client,
            )
        )
    return out


def run(
    config: RouterConfig, arrivals: list[Arrival], *, specs: list[NodeSpec] | None = None, with_metrics: bool = False
) -> tuple[Figures, RouterDispatcher]:
    specs = fleet() if specs is None else specs
    made: list[RouterDispatcher] = []

    def make() -> RouterDispatcher:
        made.append(RouterDispatcher(config, specs, with_metrics=with_metrics))
        return made[-1]

    figures = Study(specs, arrivals, make).run()
    return figures, made[-1]


def test_every_request_is_served_and_runs_repeat() -> None:
    arrivals = workload(300, gap_s=1.0)
    (one, dispatcher), (two, _) = (run(RouterConfig(), arrivals) for _ in range(2))
    assert one == two
    assert len(one.outcomes) == 300
    assert all(outcome.ttft_s < math.inf for outcome in one.outcomes)
    statistics = dispatcher.router.statistics()
    assert (statistics.in_flight, statistics.waiting, statistics.requests_total) == (0, 0, 300)


def test_auto_loads_less_and_answers_sooner_than_chance() -> None:
    arrivals, specs = workload(300, gap_s=1.0), fleet()
    auto, _ = run(RouterConfig(), arrivals, specs=specs)
    blind = Study(specs, arrivals, lambda: RuleDispatcher(rules()["random"](), specs, Prng(4))).run()
    assert auto.loads_per_1000() < blind.loads_per_1000() / 4
    assert auto.ttft_s(95) < blind.ttft_s(95)


def test_what_the_queue_cannot_hold_is_refused() -> None:
    burst = [Arrival(at_s=0.0, model=NAMES[0], input_tokens=500, output_tokens=200, client="one") for _ in range(40)]
    figures, dispatcher = run(RouterConfig(queue_max=4, queue_per_client=4), burst)
    refused = [outcome for outcome in figures.outcomes if outcome.node == -1]
    assert len(figures.outcomes) == 40
    assert refused
    assert all(outcome.ttft_s == math.inf for outcome in refused)
    assert dispatcher.router.statistics().requests_total == 40


def test_who_waits_too_long_is_refused_by_a_deadline() -> None:
    burst = [Arrival(at_s=0.0, model=NAMES[4], input_tokens=3000, output_tokens=900, client=f"client-{n}") for n in range(40)]
    figures, _ = run(RouterConfig(queue_timeout_s=5.0), burst)
    assert any(outcome.node == -1 for outcome in figures.outcomes)
    assert len(figures.outcomes) == 40


def test_a_node_that_says_busy_is_not_the_end() -> None:
    burst = [Arrival(at_s=n * 0.01, model=NAMES[n % 5], input_tokens=100, output_tokens=20, client=f"client-{n}") for n in range(60)]
    figures, _ = run(RouterConfig(strategy="round-robin"), burst, specs=fleet(max_queue=2))
    assert len(figures.outcomes) == 60
    assert any(outcome.node >= 0 for outcome in figures.outcomes)


def test_metrics_sees_synthetic_processors() -> None:
    figures, dispatcher = run(RouterConfig(strategy="metrics"), workload(60, gap_s=1.0), with_metrics=True)
    assert len(figures.outcomes) == 60
    assert {agent.cpu_usage for agent in dispatcher.router.agents()} <= {BUSY_CPU_PERCENT, IDLE_CPU_PERCENT}


def test_what_a_load_pushes_out_is_unloaded_by_name_and_a_first_token_counts_once() -> None:
    _, dispatcher = run(RouterConfig(), [], specs=fleet()[:1])
    unloaded: list[str] = []
    loaded: list[str] = []
    for number, model in enumerate([*dispatcher._fleet[0].models] * 2):
        now = Instant(number * 100.0)
        dispatcher.polled(0, loaded, 0, now=now)
        arrival = Arrival(at_s=now, model=model, input_tokens=5, output_tokens=5, client="c")
        ((request, node),) = dispatcher.came(number, arrival, now=now)
        unloaded += dispatcher.unload_before(request)
        assert [dispatcher.first_token(request, now=now) for _ in range(2)] == [[], []]
        end = Timing(
            came=now, obtained=now, started=now, first=now, finished=Instant(now + 1.0), prompt_tokens=5, cached_tokens=0, output_tokens=5
        )
        dispatcher.finished(request, end, now=Instant(now + 1.0))
        loaded = [model]
        assert node == 0
    assert unloaded
    assert set(unloaded) <= set(dispatcher._fleet[0].models)


def test_what_a_request_allows_reaches_the_decision() -> None:
    scores = []
    for limit in (None, 1):
        dispatcher = RouterDispatcher(RouterConfig(), fleet())
        arrival = Arrival(at_s=1.0, model=NAMES[0], input_tokens=10, output_tokens=1, output_limit=limit)
        dispatcher.came(0, arrival, now=Instant(1.0))
        why = dispatcher.router.why(RequestId("0"))
        assert why is not None
        scores.append(why.decisions[0].candidates[0].score)
    assert scores[1] < scores[0]
