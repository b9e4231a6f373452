"""Runs of a fleet without faults: the same figures for the same seed, every request ends once, and the known orderings show."""

import math
from collections.abc import Sequence

from core.simulation.baselines import rules
from core.simulation.hardware import GPUS, MODELS, model_timing, node_timing
from core.simulation.node import NodeTiming, Timing
from core.simulation.prng import Prng
from core.simulation.study import Figures, NodeSpec, Outcome, RuleDispatcher, Study, mixed_fleet
from core.simulation.workload import Arrival
from core.units import Instant

NAMES = ("llama3.2:3b", "llama3.1:8b", "gemma3:12b", "qwen2.5:14b", "qwen2.5:32b")


def fleet(*, queue: int = 512) -> list[NodeSpec]:
    def timing(gpu: str) -> NodeTiming:
        plain = node_timing(GPUS[gpu], slots=2, max_loaded=1)
        return NodeTiming(
            slots=plain.slots,
            max_loaded=1,
            max_queue=queue,
            memory_bytes=plain.memory_bytes,
            load_base_s=1.0,
            load_bytes_s=plain.load_bytes_s,
        )

    return mixed_fleet(["rtx-3090"] * 3, lambda gpu: {name: model_timing(name, MODELS[name], GPUS[gpu]) for name in NAMES}, timing)


def workload(count: int = 300, gap_s: float = 1.0) -> list[Arrival]:
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
            )
        )
    return out


def run(name: str, specs: Sequence[NodeSpec] | None = None, arrivals: list[Arrival] | None = None) -> Figures:
    specs = specs or fleet()
    return Study(specs, workload() if arrivals is None else arrivals, lambda: RuleDispatcher(rules()[name](), specs, Prng(4))).run()


def test_every_request_ends_once_and_the_figures_repeat() -> None:
    one, two = run("random"), run("random")
    assert one == two
    assert len(one.outcomes) == 300
    assert all(0 < outcome.ttft_s <= outcome.total_s < math.inf for outcome in one.outcomes)
    assert all(0 <= busy <= one.span_s for busy in one.busy_s)


def test_a_rule_that_prices_loads_beats_one_that_does_not() -> None:
    blind, aware = run("random"), run("lmetric-like")
    assert aware.loads_per_1000() < blind.loads_per_1000() / 2
    assert aware.ttft_s(95) < blind.ttft_s(95)
    assert aware.goodput() > blind.goodput()


def test_what_a_node_refuses_counts_as_infinite() -> None:
    burst = [Arrival(at_s=0.0, model=NAMES[n % 5], input_tokens=10, output_tokens=5) for n in range(60)]
    figures = run("round-robin", fleet(queue=1), burst)
    assert any(outcome.ttft_s == math.inf and outcome.node == -1 for outcome in figures.outcomes)
    assert len(figures.outcomes) == 60


def test_a_run_can_be_ended_early() -> None:
    specs = fleet()
    arrivals = workload(3000, 0.3)
    figures = Study(specs, arrivals, lambda: RuleDispatcher(rules()["random"](), specs, Prng(4))).run(progress=lambda done, _: False)
    assert len(figures.outcomes) < 3000


def test_a_run_is_cut_when_too_many_wait_and_they_count_with_what_they_waited() -> None:
    specs = fleet()
    arrivals = workload(3000, 0.01)
    figures = Study(specs, arrivals, lambda: RuleDispatcher(rules()["random"](), specs, Prng(4)), unanswered_max=50).run()
    assert figures.cut
    assert 51 <= len(figures.outcomes) < 3000
    assert sum(outcome.total_s == figures.span_s - outcome.at_s for outcome in figures.outcomes) == 51
    assert all(outcome.ttft_s <= outcome.total_s for outcome in figures.outcomes)
    assert not run("random").cut


def test_percentiles_of_nothing() -> None:
    empty = Figures(outcomes=[], loads=0, busy_s=[], span_s=0.0)
    assert (empty.ttft_s(50), empty.loads_per_1000(), empty.goodput()) == (0.0, 0.0, 0.0)


def test_percentiles_and_goodput_are_what_they_say() -> None:
    outcomes = [Outcome(model="m", client="", ttft_s=float(n), total_s=n + 1.0, output_tokens=11, node=0, cold=False) for n in range(1, 11)]
    figures = Figures(outcomes=outcomes, loads=1, busy_s=[1.0], span_s=1.0)
    assert (figures.ttft_s(50), figures.ttft_s(99)) == (6.0, 10.0)
    assert figures.goodput(ttft_s=5.0, per_token_s=0.1) == 0.5
    assert figures.loads_per_1000() == 100.0


def test_preloaded_models_cost_no_load_and_no_outcome() -> None:
    specs = fleet()
    arrivals = [Arrival(at_s=20.0 + n, model=NAMES[0], input_tokens=10, output_tokens=5) for n in range(5)]

    def study(preloaded: dict[int, list[str]]) -> Figures:
        return Study(specs, arrivals, lambda: RuleDispatcher(rules()["lmetric-like"](), specs, Prng(4)), preloaded=preloaded).run()

    cold, warm = study({}), study({0: [NAMES[0]], 1: [NAMES[0]], 2: [NAMES[0]]})
    assert cold.loads >= 1
    assert (warm.loads, len(warm.outcomes)) == (0, 5)
    assert warm.ttft_s(50) < cold.ttft_s(99)


def test_busy_spans_add_up_and_outcomes_know_when_they_came() -> None:
    figures = run("random")
    assert [sum(until - since for since, until in spans) for spans in figures.busy_spans] == figures.busy_s
    assert [outcome.at_s for outcome in figures.outcomes] == [arrival.at_s for arrival in workload()]


def test_a_dispatcher_is_woken_at_its_deadline_and_may_have_models_unloaded() -> None:
    """One that holds the second request back until a deadline, and has the first model unloaded before it."""
    specs = fleet()

    class Holds(RuleDispatcher):
        due: Instant | None = None

        def came(self, request: int, arrival: Arrival, *, now: Instant) -> Sequence[tuple[int, int]]:
            if request == 0:
                return [(0, 0)]
            self.due = Instant(now + 50.0)
            return ()

        def tick(self, *, now: Instant) -> Sequence[tuple[int, int]]:
            self.due = None
            return [(1, 0)]

        def next_deadline(self) -> Instant | None:
            return self.due

        def unload_before(self, request: int) -> Sequence[str]:
            return (NAMES[0],) if request == 1 else ()

        def finished(self, request: int, timing: Timing, *, now: Instant) -> Sequence[tuple[int, int]]:
            return ()

    asked = [Arrival(at_s=float(n), model=NAMES[0], input_tokens=10, output_tokens=5) for n in range(2)]
    figures = Study(specs, asked, lambda: Holds(rules()["random"](), specs, Prng(1))).run()
    assert figures.loads == 2, "the model was unloaded between the two"
    assert figures.outcomes[1].ttft_s > 50.0
    assert RuleDispatcher(rules()["random"](), specs, Prng(1)).unload_before(0) == ()
