"""One live request: its record, what it teaches, and the words that its client reads."""

from typing import Any

import pytest

from core.agents import Agent
from core.events import AttemptEnded, Ending, Failure, Record, RequestCame, Route, Settled, Upstream
from core.health import classify
from core.lifecycle import AgentState
from core.names import key_or_none, normalise
from core.requests import Request, begin, cloud_off, expected_output, gave_up, not_found
from core.scoring import Ask
from core.units import AgentId, Instant, RequestId, UnixMs
from tests.core.routing import World, one, usage

M = normalise("m")


def came(route: Route = Route.CHAT, model: str | None = "m", **fields: object) -> RequestCame:
    return RequestCame(request_id=RequestId("r"), route=route, model=model, **fields)  # type: ignore[arg-type]


def request(*, output: int = 150, cold: bool = False, first: float | None = 11.0, **fields: object) -> Request:
    """One that came at 10 and was forwarded at once."""
    asked = Ask(M, options=str(fields.get("runner_options", "")), input_tokens=5, output_tokens=output, needs_slot=True)
    made = begin(came(**fields), M, asked, number=1, now=Instant(10.0))  # type: ignore[arg-type]
    made.agent = Agent(AgentId("a"), Upstream(host="h", port=1), state=AgentState.READY, now_unix=UnixMs(0))
    made.agent.name = "node"
    made.cold = made.alone = cold
    made.first_byte_at = None if first is None else Instant(first)
    return made


def settled(**fields: object) -> Settled:
    return Settled(request_id=RequestId("r"), ending=Ending.SUCCESS, **fields)  # type: ignore[arg-type]


# ---------------------------------------------------------------- its record


def test_the_record_of_an_answer_of_two_nodes_counts_both_parts() -> None:
    told = usage(prompt=17, output=30)
    for before, given, prompt, output in ((7, told, 10, 37), (0, told, 17, 30), (20, told, 0, 50)):
        found = request().record(Ending.SUCCESS, settled(usage=given, tokens_before=before), now=Instant(12.0)).usage
        assert found is not None
        assert (found.prompt_tokens, found.output_tokens, found.eval_ns) == (prompt, output, told.eval_ns)
    assert request().record(Ending.SUCCESS, settled(tokens_before=7), now=Instant(12.0)).usage is None
    assert request().sample(settled(usage=told, tokens_before=7), now=Instant(12.0)).output_tokens == 30, "its node said no more"


def test_when_it_ended_is_what_its_node_says_or_when_its_lease_was_given_back() -> None:
    now = Instant(20.0)
    one = request()
    assert one.ended_at(settled(), now=now) == 20.0
    one.freed_at = Instant(15.0)
    assert one.ended_at(settled(), now=now) == 15.0
    assert one.ended_at(settled(duration_ms=3000.0), now=now) == 13.0
    assert one.ended_at(settled(duration_ms=99_000.0), now=now) == 20.0
    assert one.ended_at(settled(duration_ms=10.0), now=now) == 11.0, "not before its first byte"
    assert request(first=None).ended_at(settled(duration_ms=10.0), now=now) == pytest.approx(10.01)


# ---------------------------------------------------------------- what it teaches


def test_a_nodes_own_figures_are_believed() -> None:
    sample = request(stream=True).sample(
        settled(usage=usage(prompt=20, output=50, load_s=0.01, prompt_s=0.1, eval_s=0.9)), now=Instant(12.0)
    )
    assert (sample.prompt_tokens, sample.output_tokens, sample.output_told) == (20, 50, True)
    assert (sample.prefill_s, sample.decode_s, sample.service_s) == (0.1, 0.9, 2.0)
    assert sample.load_s is None, "it caused no load"


def test_a_load_is_the_nodes_figure_else_the_time_to_the_first_byte() -> None:
    told = request(cold=True).sample(settled(usage=usage(load_s=4.0)), now=Instant(16.0))
    assert (told.load_s, told.service_s, told.cold) == (4.0, None, True)
    seen = request(cold=True, first=15.0).sample(settled(), now=Instant(16.0))
    assert seen.load_s == 5.0
    beside = request(cold=True)
    beside.alone = False
    assert beside.sample(settled(usage=usage(load_s=4.0)), now=Instant(16.0)).load_s is None
    assert request(cold=True, first=None).sample(settled(), now=Instant(16.0)).load_s is None


def test_without_figures_a_stream_counts_its_chunks() -> None:
    sample = request(stream=True).sample(settled(chunks=40), now=Instant(15.0))
    assert (sample.output_tokens, sample.output_told, sample.decode_s) == (40, True, 4.0)


def test_without_anything_the_expected_length_took_as_long_as_it_took() -> None:
    sample = request(stream=False).sample(settled(chunks=1), now=Instant(15.0))
    assert (sample.output_tokens, sample.output_told, sample.decode_s) == (150, False, 5.0)
    cold = request(stream=False, cold=True).sample(settled(), now=Instant(15.0))
    assert cold.decode_s == 0.0, "the load is in it"


def test_an_embedding_is_all_prompt() -> None:
    told = usage(prompt=64, output=0, prompt_s=0.0, eval_s=0.0)
    sample = request(output=0, route=Route.EMBED).sample(settled(usage=told), now=Instant(10.5))
    assert (sample.output_tokens, sample.decode_s, sample.prefill_s) == (0, 0.0, 0.5)


@pytest.mark.parametrize(
    ("route", "limit", "tokens"),
    [
        (Route.CHAT, None, 150), (Route.V1_CHAT, 10, 10), (Route.CHAT, 1000, 150), (Route.EMBED, None, 0), (Route.V1_EMBEDDINGS, 10, 0),
    ],
)  # fmt: skip
def test_expected_length(route: Route, limit: int | None, tokens: int) -> None:
    assert expected_output(route, limit, 150) == tokens
    assert expected_output(route, limit, 0) == 0


@pytest.mark.parametrize(
    ("fields", "tokens"), [({"output_limit": 9}, 9), ({"load_only": True}, 0), ({"route": Route.SHOW}, 0), ({"route": Route.EMBED}, 0)]
)
def test_no_answer_is_expected_where_nothing_is_to_be_made(fields: dict[str, Any], tokens: int) -> None:
    world = World()
    world.backend("n", "m", loaded=("m",))
    world.ask("r", **fields)
    assert world.router._requests[RequestId("r")].ask.output_tokens == tokens


# ---------------------------------------------------------------- what is told


def test_a_record_tells_it_all() -> None:
    one = request(client="c", stream=True)
    one.end_attempt("died", now=Instant(10.5))
    one.waited_s, one.predicted_ms = 0.25, 7.0
    record = one.record(Ending.SUCCESS, settled(status=200, usage=usage(), body_bytes=9, chunks=3), now=Instant(14.0))
    assert (record.agent_name, record.client, record.status, record.ending) == ("node", "c", 200, Ending.SUCCESS)
    assert (record.duration_ms, record.queue_ms, record.ttft_ms, record.predicted_start_ms) == (4000, 250, 1000, 7.0)
    assert [(attempt.outcome, attempt.duration_ms) for attempt in record.attempts] == [("died", 500)]
    assert (record.body_bytes, record.chunks, record.usage) == (9, 3, usage())


def test_a_record_of_what_was_never_reported() -> None:
    one = request(first=None)
    one.agent = None
    record = one.record(Ending.UNKNOWN, None, now=Instant(40.0))
    assert (record.agent_id, record.ttft_ms, record.status, record.usage, record.message) == (
        None,
        None,
        0,
        None,
        "its end was never reported",
    )


def test_kinds_are_equal_when_nodes_and_costs_are() -> None:
    one, other = request(), request()
    assert one.kind == other.kind
    one.tried.update({AgentId("a"): 1, AgentId("b"): 1})
    other.tried[AgentId("b")] = 1
    other.busy[AgentId("a")] = None
    assert one.kind == other.kind
    assert request(runner_options="num_ctx=1").kind != request().kind
    assert request(excluded=(AgentId("x"),)).tried == {"x": 2}


@pytest.mark.parametrize(
    ("event", "status", "text"),
    [
        (came(Route.CHAT, "x"), 404, "model 'x' not found"),
        (came(Route.GENERATE, "X:Tag"), 404, "model 'X:Tag' not found"),
        (came(Route.SHOW, "x"), 404, "model 'x:latest' not found"),
        (came(Route.V1_MODEL, "x"), 404, "model 'x:latest' not found"),
        (came(Route.SHOW, "registry.ollama.ai/library/X:Tag"), 404, "model 'X:Tag' not found"),
        (came(Route.SHOW, " X "), 404, "model 'X:latest' not found"),
        (came(Route.SHOW, "X:8b:local"), 404, "model 'x:8b' not found"),
        (came(Route.EMBED, "x"), 404, 'model "x" not found, try pulling it first'),
        (came(Route.EMBEDDINGS, "x"), 404, 'model "x" not found, try pulling it first'),
        (came(Route.V1_EMBEDDINGS, "x"), 404, 'model "x" not found, try pulling it first'),
        (came(Route.V1_CHAT, "x"), 404, "model 'x' not found"),
        (came(Route.GENERATE, ""), 404, "model '' not found"),
        (came(Route.GENERATE, None), 404, "model '' not found"),
        (came(Route.CHAT, None), 400, "model is required"),
        (came(Route.EMBED, ""), 400, "model is required"),
        (came(Route.CHAT, "not a name!"), 400, "invalid model name"),
        (came(Route.GENERATE, "not a name!"), 400, "invalid model name"),
    ],
)
def test_what_ollama_says_of_models_that_are_not_there(event: RequestCame, status: int, text: str) -> None:
    refuse = not_found(event, key_or_none(event.model or ""))
    assert (refuse.status, refuse.text) == (status, text)


def test_cloud_models_are_refused_in_ollamas_words() -> None:
    assert cloud_off(came(model="x:cloud")).status == 403
    assert cloud_off(came(model="x:cloud")).text == "ollama cloud is disabled: remote model is unavailable"
    assert cloud_off(came(Route.SHOW, model="x:cloud")).text == "ollama cloud is disabled: remote model details are unavailable"


@pytest.mark.parametrize("failure", [failure for failure in Failure if failure not in (Failure.ANSWERED, Failure.INCOMPLETE)])
def test_giving_up_names_the_node_and_what_it_did(failure: Failure) -> None:
    one = request()
    one.failed = AttemptEnded(request_id=one.id, failure=failure)
    one.verdict = classify(failure)
    refuse = gave_up(one)
    assert refuse.text.startswith("node node ")
    assert refuse.text.endswith("try again")
    assert refuse.status == {Failure.TIMEOUT: 504, Failure.VANISHED: 503}.get(failure, 502)


def test_giving_up_before_any_attempt() -> None:
    one = request()
    one.agent = None
    assert gave_up(one).status == 502


def started(*, stream: bool, told: bool = True, constrained: bool = False) -> tuple[float | None, float | None, float | None]:
    """What `why` tells of a request that waited 2 s, was read in 0.5 s and answered in 1 s."""
    world = World()
    world.backend("n", "m", loaded=("m",))
    world.ask("r", stream=stream, constrained=constrained)
    world.now += 2.5
    world.first("r")
    world.now += 1.0
    effects = world.settle("r", usage=usage(prompt_s=0.5, eval_s=1.0) if told else None)
    why = world.router.why(RequestId("r"))
    assert why is not None
    record = one(effects, Record)
    assert (why.predicted_start_ms, why.observed_start_ms) == (record.predicted_start_ms, record.observed_start_ms)
    return why.predicted_start_ms, why.observed_start_ms, why.start_error_ms


@pytest.mark.parametrize(("stream", "constrained"), [(True, False), (True, True), (False, False)])
def test_the_observed_start_is_kept_beside_the_predicted_one(stream: bool, constrained: bool) -> None:
    assert started(stream=stream, constrained=constrained) == (0.0, pytest.approx(2000.0), pytest.approx(2000.0))


def test_a_node_that_tells_no_times_leaves_the_start_unknown() -> None:
    assert started(stream=True, told=False) == (0.0, None, None)
