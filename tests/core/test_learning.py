"""Speeds: priors by size, what one sample may teach, what carries over, and that equal nodes tie."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import RouterConfig
from core.learning import LEARN_EVERY_S, LOAD_FIXED_S, MODELS_MAX, SIZE_DEFAULT_BYTES, Rates, Sample, Speeds
from core.units import AgentId, Instant, ModelKey

NODE, OTHER = AgentId("node"), AgentId("other")
M, N = ModelKey("m"), ModelKey("n")
SIZE = SIZE_DEFAULT_BYTES


def rates(speeds: Speeds, node: AgentId = NODE, key: ModelKey = M, size: int = SIZE, slots: int = 1) -> Rates:
    return speeds.rates(node, key, size_bytes=size, slots=slots)


def decode_tok_s(found: Rates) -> float:
    return 1e9 / found.decode_ns


def sample(**fields: object) -> Sample:
    return Sample(**{"prompt_tokens": 100, "output_tokens": 100, "prefill_s": 0.1, "decode_s": 2.0, **fields})  # type: ignore[arg-type]


def test_priors_are_those_of_the_config_for_their_model_size() -> None:
    found = rates(Speeds(RouterConfig()))
    assert decode_tok_s(found) == pytest.approx(60, rel=0.13)
    assert 1e9 / found.prefill_ns == pytest.approx(1500, rel=0.13)
    assert found.load_us / 1e6 == pytest.approx(LOAD_FIXED_S + SIZE / 1.5e9, rel=0.13)
    assert found.overhead_us == 0


def test_bigger_models_are_slower_and_an_unknown_size_is_the_usual_one() -> None:
    speeds = Speeds(RouterConfig())
    small, big = rates(speeds, key=M, size=SIZE // 4), rates(speeds, key=N, size=SIZE * 4)
    assert small.decode_ns < big.decode_ns
    assert small.prefill_ns < big.prefill_ns
    assert small.load_us < big.load_us
    assert rates(speeds, key=ModelKey("z"), size=0) == rates(speeds, key=ModelKey("y"), size=SIZE)


def test_several_slots_share_a_batch() -> None:
    one, four = rates(Speeds(RouterConfig())), rates(Speeds(RouterConfig()), slots=4)
    assert one.decode_ns / four.decode_ns == pytest.approx(4 / 1.45, rel=0.2)


def test_a_sample_replaces_the_prior() -> None:
    speeds = Speeds(RouterConfig())
    rates(speeds)
    speeds.learn(NODE, M, sample(decode_s=10.0), size_bytes=SIZE)
    assert decode_tok_s(rates(speeds)) == pytest.approx(10, rel=0.13)


def test_requests_that_end_at_the_same_time_are_not_all_learned_from() -> None:
    speeds = Speeds(RouterConfig())
    assert all(speeds.curious(NODE, M, now=Instant(5.0)) for _ in range(2)), "nothing was learned yet"
    speeds.learn(NODE, M, sample(), size_bytes=SIZE)
    found = [speeds.curious(NODE, M, now=Instant(5.0 + part * LEARN_EVERY_S)) for part in (0.0, 0.9, 1.1, 1.5, 9.0)]
    assert found == [True, False, True, False, True]
    assert speeds.curious(NODE, N, now=Instant(5.0))


def test_contention_does_not_pass_for_slowness_and_a_lasting_change_is_learned() -> None:
    speeds = Speeds(RouterConfig())
    speeds.learn(NODE, M, sample(decode_s=1.0), size_bytes=SIZE)
    for _ in range(3):
        speeds.learn(NODE, M, sample(decode_s=4.0), size_bytes=SIZE)
    assert decode_tok_s(rates(speeds)) > 80
    for _ in range(100):
        speeds.learn(NODE, M, sample(decode_s=4.0), size_bytes=SIZE)
    assert decode_tok_s(rates(speeds)) == pytest.approx(25, rel=0.2)


def test_one_absurd_figure_does_not_poison() -> None:
    speeds = Speeds(RouterConfig())
    speeds.learn(NODE, M, sample(decode_s=1.0), size_bytes=SIZE)
    speeds.learn(NODE, M, sample(decode_s=1e-9), size_bytes=SIZE)
    assert decode_tok_s(rates(speeds)) <= 460


def test_a_cache_hit_does_not_pass_for_fast_prefill() -> None:
    speeds = Speeds(RouterConfig())
    before = rates(speeds).prefill_ns
    speeds.learn(NODE, M, sample(prompt_tokens=10_000, prefill_s=0.01), size_bytes=SIZE)
    assert rates(speeds).prefill_ns == before
    speeds.learn(NODE, M, sample(prompt_tokens=10_000, prefill_s=0.5, cold=True), size_bytes=SIZE)
    assert 1e9 / rates(speeds).prefill_ns == pytest.approx(20_000, rel=0.15)


def test_loads_are_averaged_and_only_from_who_caused_one() -> None:
    speeds = Speeds(RouterConfig())
    speeds.learn(NODE, M, sample(load_s=8.0, cold=True), size_bytes=SIZE)
    speeds.learn(NODE, M, sample(load_s=4.0, cold=True), size_bytes=SIZE)
    speeds.learn(NODE, M, sample(), size_bytes=SIZE)
    assert rates(speeds).load_us == pytest.approx(6e6, rel=0.13)


def test_what_tokens_do_not_explain_is_the_smallest_rest_slowly_rising() -> None:
    speeds = Speeds(RouterConfig())
    for service_s in (5.0, 2.6, 9.0):
        speeds.learn(NODE, M, sample(service_s=service_s), size_bytes=SIZE)
    assert rates(speeds).overhead_us == pytest.approx(0.5e6 + 0.05 * 6.4e6, rel=0.15)


def test_what_is_learned_carries_over_by_size() -> None:
    speeds = Speeds(RouterConfig())
    rates(speeds, OTHER)
    speeds.learn(NODE, M, sample(decode_s=0.5, prefill_s=0.05, cold=True, load_s=2.0), size_bytes=SIZE)
    on_node, elsewhere = rates(speeds, key=N, size=SIZE * 2), rates(speeds, OTHER)
    assert decode_tok_s(on_node) == pytest.approx(100, rel=0.13)
    assert decode_tok_s(elsewhere) == pytest.approx(200, rel=0.13)
    assert on_node.load_us == pytest.approx(3e6, rel=0.13)


def test_answer_lengths_are_a_slow_mean_of_what_nodes_told() -> None:
    speeds = Speeds(RouterConfig(output_prior_tokens=33))
    assert speeds.output_tokens(M) == 33
    speeds.learn(NODE, M, sample(output_tokens=100), size_bytes=SIZE)
    speeds.learn(NODE, M, sample(output_tokens=200), size_bytes=SIZE)
    speeds.learn(NODE, M, sample(output_tokens=9999, output_told=False), size_bytes=SIZE)
    assert speeds.output_tokens(M) == 110


def test_the_table_of_lengths_is_bounded() -> None:
    speeds = Speeds(RouterConfig(output_prior_tokens=33))
    for number in range(MODELS_MAX + 2):
        speeds._learn_output(ModelKey(f"m{number}"), 5)
    assert len(speeds._output) == MODELS_MAX
    assert (speeds.output_tokens(ModelKey("m0")), speeds.output_tokens(ModelKey("m2"))) == (33, 5)


def test_forgetting_and_refreshing() -> None:
    speeds = Speeds(RouterConfig())
    speeds.learn(NODE, M, sample(decode_s=0.5), size_bytes=SIZE)
    learned = rates(speeds)
    speeds.refresh(NODE)
    assert rates(speeds) == learned
    assert rates(speeds, slots=4) == learned, "rates stay until they are refreshed"
    speeds.refresh(NODE)
    assert rates(speeds, slots=4).decode_ns < learned.decode_ns
    speeds.forget(NODE)
    assert rates(speeds, slots=1).decode_ns == learned.decode_ns, "the fleet still knows"
    assert speeds._pairs == {}


def test_nodes_that_differ_by_noise_have_equal_rates_most_of_the_time() -> None:
    speeds = Speeds(RouterConfig())
    for node, decode_s in ((NODE, 2.0), (OTHER, 2.02)):
        for _ in range(5):
            speeds.learn(node, M, sample(decode_s=decode_s, service_s=decode_s + 0.1), size_bytes=SIZE)
    assert rates(speeds, NODE).decode_ns == rates(speeds, OTHER).decode_ns


@given(
    st.lists(
        st.builds(
            Sample,
            prompt_tokens=st.integers(0, 10**6),
            output_tokens=st.integers(0, 10**6),
            prefill_s=st.floats(0, 1e4),
            decode_s=st.floats(0, 1e4),
            load_s=st.none() | st.floats(0, 1e4),
            cold=st.booleans(),
            service_s=st.none() | st.floats(0, 1e4),
        ),
        max_size=20,
    ),
    st.integers(0, 10**12),
    st.integers(1, 64),
)
def test_rates_are_positive_integers_whatever_was_learned(samples: list[Sample], size: int, slots: int) -> None:
    speeds = Speeds(RouterConfig())
    for each in samples:
        speeds.learn(NODE, M, each, size_bytes=size)
        found = rates(speeds, size=size, slots=slots)
        assert min(found.prefill_ns, found.decode_ns, found.load_us) >= 1
        assert found.overhead_us >= 0
        assert all(isinstance(value, int) for value in (found.prefill_ns, found.decode_ns, found.load_us, found.overhead_us))


def test_who_keeps_something_made_of_rates_can_read_which_were_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.learning.DROPS_MAX", 2)
    speeds = Speeds(RouterConfig())
    one, two = AgentId("one"), AgentId("two")
    log = speeds.log_of(M)
    assert speeds.log_of(M) is log
    speeds.refresh(one)
    assert log == [], "nothing was known, so nothing was dropped"
    for node in (one, two):
        speeds.rates(node, M, size_bytes=1, slots=1)
    speeds.refresh(two)
    assert (log, speeds.drops) == ([two], {M: log})
    speeds.rates(two, M, size_bytes=1, slots=1)
    speeds.learn(one, M, Sample(service_s=2.0), size_bytes=1)
    assert log == [two, one]
    speeds.refresh(two)
    assert speeds.drops == {}, "it has become too long"
    log = speeds.log_of(M)
    speeds.learn(one, M, Sample(output_tokens=9, decode_s=1.0), size_bytes=1)
    assert speeds.known == {}
    assert speeds.drops == {}, "the fleet's speeds are others: all of them"
