"""The size of a runner, its context, and the time of a load."""

from core.simulation.node_words import ModelTiming, NodeTiming, effective_context, needed_bytes

MODEL = ModelTiming(weights="a", size_bytes=4_000_000_000, prefill_tokens_s=1, decode_tokens_s=1, context_bytes=1000, trained_context=8192)


def test_a_load_takes_a_start_and_the_reading_of_the_weights() -> None:
    assert NodeTiming(load_base_s=0.5, load_bytes_s=2e9).load_s(MODEL) == 2.5


def test_the_context_is_the_request_s_or_the_node_s_but_never_more_than_the_model_was_trained_for() -> None:
    node = NodeTiming(context=4096)
    assert [effective_context(asked, MODEL, node) for asked in (None, 512, 100_000)] == [4096, 512, 8192]


def test_a_runner_holds_the_weights_and_every_slot_s_context() -> None:
    assert needed_bytes(MODEL, 100, 4) == 4_000_400_000
