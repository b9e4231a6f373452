"""The timing machine against the stories of the recordings (group `sched`, `cancel`), and its invariants under any events."""

import math
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.simulation.node import (
    ABORT_S,
    Came,
    Change,
    Finished,
    Held,
    Left,
    LoadFailed,
    ModelTiming,
    NodeEffect,
    NodeEvent,
    NodeTiming,
    Produced,
    Refused,
    Resumed,
    RunnerChanged,
    SimulatedNode,
    Timing,
    UnloadAsked,
)
from core.simulation.prng import Prng
from core.units import Instant

LOAD_S = 1.0
MODELS = {
    "mid": ModelTiming(weights="b", size_bytes=1000, prefill_tokens_s=1000, decode_tokens_s=100, trained_context=8192),
    "tiny": ModelTiming(weights="a", size_bytes=100, prefill_tokens_s=1000, decode_tokens_s=100),
    "alias": ModelTiming(weights="b", size_bytes=1000, prefill_tokens_s=1000, decode_tokens_s=100, trained_context=8192),
    "embed": ModelTiming(weights="c", size_bytes=100, prefill_tokens_s=1000, decode_tokens_s=100, single=True),
}


class World:
    """A node, what it said, and a clock that stops at every deadline."""

    def __init__(self, **settings: object) -> None:
        usual: dict[str, object] = {"load_base_s": LOAD_S, "load_bytes_s": math.inf, "memory_bytes": 100_000, "batch_slope": 0.0}
        self.node = SimulatedNode(NodeTiming(**(usual | settings)), dict(MODELS), now=Instant(0.0))  # type: ignore[arg-type]
        self.now = 0.0
        self.said: list[tuple[float, NodeEffect]] = []

    def do(self, event: NodeEvent, *, at: float | None = None) -> None:
        self.until(self.now if at is None else at)
        self.said += [(self.now, effect) for effect in self.node.handle(event, now=Instant(self.now))]

    def ask(
        self, request_id: str, model: str = "mid", *, at: float | None = None, prompt: int = 100, out: int = 10, **more: object
    ) -> None:
        event = Came(request_id=request_id, model=model, prompt_tokens=prompt, output_tokens=out, **more)  # type: ignore[arg-type]
        self.do(event, at=at)

    def load(self, model: str = "mid", **more: object) -> None:
        self.ask(f"load {model}", model, prompt=0, out=0, **more)
        self.until(self.now + 2 * LOAD_S)

    def until(self, time: float) -> None:
        while (due := self.node.next_deadline()) is not None and due <= time:
            assert due >= self.now - 1e-9
            self.now = max(self.now, due)
            self.said += [(self.now, effect) for effect in self.node.tick(now=Instant(self.now))]
        self.now = max(self.now, time)

    def timing(self, request_id: str) -> Timing:
        return next(effect.timing for _, effect in self.said if isinstance(effect, Finished) and effect.request_id == request_id)

    def finished(self) -> list[str]:
        return [effect.request_id for _, effect in self.said if isinstance(effect, Finished)]

    def refused(self) -> list[str]:
        return [effect.request_id for _, effect in self.said if isinstance(effect, Refused)]

    def changes(self) -> list[tuple[str, Change, str]]:
        return [(effect.model, effect.change, effect.why) for _, effect in self.said if isinstance(effect, RunnerChanged)]

    def loads(self) -> int:
        return sum(change is Change.LOADING for _, change, _ in self.changes())

    def ps(self) -> list[str]:
        return [row.model for row in self.node.loaded(now=Instant(self.now))]


def test_a_cold_request_waits_for_its_load_then_for_its_prompt_then_for_each_token() -> None:
    world = World()
    world.ask("1", paced=True, out=3)
    assert world.ps() == []  # a model that is being loaded is invisible
    world.until(10)
    timing = world.timing("1")
    assert (timing.came, timing.obtained, timing.started) == (0, LOAD_S, LOAD_S)
    assert timing.first == pytest.approx(1.1)
    assert timing.finished == pytest.approx(1.12)
    tokens = [(at, effect.tokens) for at, effect in world.said if isinstance(effect, Produced)]
    assert tokens == [(pytest.approx(1.1), 1), (pytest.approx(1.11), 2), (pytest.approx(1.12), 3)]
    assert world.ps() == ["mid"]


def test_three_at_once_on_one_slot_are_served_in_turn() -> None:
    world = World()
    world.load()
    for name in "abc":
        world.ask(name)
    world.until(world.now + 10)
    assert world.finished() == ["load mid", "a", "b", "c"]
    assert world.timing("b").started == pytest.approx(world.timing("a").finished)
    assert world.timing("b").obtained == world.timing("b").came  # the wait for a slot is no load
    assert world.loads() == 1


def test_slots_share_the_decode_speed_by_the_batch_slope() -> None:
    world = World(slots=2, batch_slope=0.5)
    world.load()
    world.ask("a", prompt=1, out=11)
    world.ask("b", prompt=1, out=11)
    world.until(world.now + 10)
    alone, together = 10 / 100, 1.5 * 10 / 100
    assert alone < world.timing("b").finished - world.timing("b").first <= together + 0.01


def test_a_long_prefill_stalls_the_stream_beside_it_but_for_a_token_with_each_batch() -> None:
    world = World(slots=3, batch_tokens=500)
    world.load()
    start = world.now
    world.ask("stream", prompt=1, out=50, paced=True)
    world.ask("ends meanwhile", prompt=1, out=12)
    world.ask("long", prompt=2200, out=1, at=start + 0.1)
    world.until(start + 10)
    times = [at for at, effect in world.said if isinstance(effect, Produced) and effect.request_id == "stream"]
    gaps = [after - before for before, after in pairwise(times) if after - before > 0.015]
    assert gaps == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.2], abs=0.02)
    assert len(times) == 50
    assert world.timing("long").first == pytest.approx(start + 2.3)
    assert world.timing("ends meanwhile").finished == pytest.approx(start + 1.1)  # 10 tokens alone, the others with two batches


def test_any_prompt_costs_something_however_well_it_is_known() -> None:
    model = msgspec.structs.replace(MODELS["mid"], prompt_base_s=0.05)
    world = World()
    world.node.models = {"mid": model}
    world.load()
    world.ask("1", conversation="c")
    world.until(world.now + 5)
    world.ask("2", conversation="c")
    world.until(world.now + 5)
    assert world.timing("1").first - world.timing("1").started == pytest.approx(0.15)
    assert world.timing("2").first - world.timing("2").started == pytest.approx(0.051)


def test_who_takes_over_a_slot_knows_the_prompt_that_was_just_read() -> None:
    world = World()
    world.load()
    world.ask("1", conversation="c")
    world.ask("2", conversation="c")
    world.until(world.now + 5)
    assert world.timing("2").cached_tokens == 99


def test_those_who_come_close_together_may_overtake_each_other_others_not() -> None:
    def served(gap_s: float, dice: Prng | None) -> list[int]:
        node = SimulatedNode(NodeTiming(load_base_s=LOAD_S), MODELS, now=Instant(0.0), dice=dice)
        ended = []
        acts = [(0.0, Came(request_id="0", model="mid", prompt_tokens=1, output_tokens=300))]
        acts += [
            (2 + number * gap_s, Came(request_id=str(number), model="mid", prompt_tokens=1, output_tokens=1)) for number in range(1, 31)
        ]
        for at, came in acts:
            node.handle(came, now=Instant(at))
        while (due := node.next_deadline()) is not None and due < 100:
            ended += [int(effect.request_id) for effect in node.tick(now=due) if isinstance(effect, Finished)]
        return ended

    assert served(0.01, None) == list(range(31))
    assert served(0.061, Prng(1)) == list(range(31))
    shuffled = served(0.015, Prng(1))
    assert sorted(shuffled) == list(range(31))
    overtaken = sum(later < earlier for place, earlier in enumerate(shuffled) for later in shuffled[place + 1 :])
    assert 5 <= overtaken <= 30  # recorded: 8 pairs among ten, 6 among twenty
    assert all(abs(number - place) <= 8 for place, number in enumerate(shuffled))


def test_contention_makes_two_busy_models_slower_than_half() -> None:
    world = World(contention=5.0)  # recorded on two cores: 72 tokens a second alone, 6 each together
    world.load("mid")
    world.load("tiny")
    start = world.now
    world.ask("m", "mid", prompt=1, out=101)
    world.ask("t", "tiny", prompt=1, out=101)
    world.until(start + 30)
    assert world.timing("m").finished - start == pytest.approx(12.0, rel=0.01)


def test_two_busy_models_share_the_machine() -> None:
    world = World()
    world.load("mid")
    world.load("tiny")
    start = world.now
    world.ask("m", "mid", prompt=1, out=101)
    world.ask("t", "tiny", prompt=1, out=101)
    world.until(start + 10)
    assert world.timing("m").finished - start == pytest.approx(2.0, abs=0.01)


def test_the_queue_limit_is_for_loads_only() -> None:
    world = World(max_queue=2)
    for name in "01234567":  # one is worked on, two wait, the rest is turned away
        world.ask(name, out=2)
    assert world.refused() == list("34567")
    world.until(10)
    assert world.finished() == list("012")
    for number in range(20):
        world.ask(f"hot {number}", out=2)
    assert world.refused() == list("34567")


def test_one_load_blocks_all_others_in_order() -> None:
    world = World()
    world.ask("a", "mid")
    world.ask("b", "tiny")
    world.ask("c", "embed", out=0)
    world.until(10)
    assert [world.timing(name).obtained for name in "abc"] == [1.0, 2.0, 3.0]
    assert world.timing("c").output_tokens == 0
    assert world.timing("c").finished == world.timing("c").first


def test_an_eviction_takes_the_shortest_keep_alive_then_the_first_weights_and_never_a_busy_one() -> None:
    world = World(max_loaded=2)
    world.load("mid", keep_alive_s=10)
    world.load("tiny", keep_alive_s=600)
    world.load("embed")
    assert ("mid", Change.UNLOADED, "evicted") in world.changes()

    world = World(max_loaded=2)
    world.load("mid")
    world.load("tiny")
    world.load("embed")
    assert ("tiny", Change.UNLOADED, "evicted") in world.changes()  # weights "a" come first

    world = World(max_loaded=2)
    world.load("mid")
    world.load("tiny")
    world.ask("busy", "tiny", out=1000)
    world.load("embed")
    assert ("mid", Change.UNLOADED, "evicted") in world.changes()


def test_memory_makes_room_too_and_the_first_model_always_loads() -> None:
    world = World(memory_bytes=1100)
    world.load("mid")
    world.load("tiny")  # 100 bytes of 100 free are more than 80 %
    assert world.ps() == ["tiny"]
    world = World(memory_bytes=500)
    world.load("mid")
    row = world.node.loaded(now=Instant(world.now))[0]
    assert (row.size_bytes, row.in_memory_bytes) == (1000, 500)


def test_the_unloaded_memory_must_be_free_before_the_next_load() -> None:
    world = World(max_loaded=1, unload_s=0.5)
    world.load("mid")
    start = world.now
    world.ask("t", "tiny")
    world.until(start + 5)
    assert world.timing("t").obtained == pytest.approx(start + 0.5 + LOAD_S)


def test_steady_traffic_starves_a_load_until_it_ends() -> None:
    world = World(max_loaded=1, slots=2)
    world.load("mid")
    start = world.now
    world.ask("0", out=101)
    world.ask("cold", "tiny", at=start + 0.5)
    for number in range(1, 10):  # each overlaps the one before
        world.ask(str(number), out=101, at=start + 0.8 * number)
    world.until(start + 30)
    last = max(world.timing(str(number)).finished for number in range(10))
    assert world.timing("cold").obtained == pytest.approx(last + LOAD_S)


def test_a_keep_alive_of_its_own_undoes_the_mark_and_the_load_waits_for_the_timer() -> None:
    world = World(max_loaded=1, slots=2)
    world.load("mid")
    start = world.now
    world.ask("0", out=101)
    world.ask("cold", "tiny", at=start + 0.5)
    world.ask("1", out=10, at=start + 0.8, keep_alive_s=300)
    world.until(start + 200)
    assert "cold" not in world.finished()
    world.until(start + 400)
    idle = world.timing("0").finished
    assert world.timing("cold").obtained == pytest.approx(idle + 300 + LOAD_S)


def test_another_context_size_reloads_and_a_busy_runner_makes_it_wait() -> None:
    world = World()
    world.load()
    start = world.now
    world.ask("plain", out=101)
    world.ask("wide", num_ctx=8192)
    world.ask("behind", "tiny")
    world.until(start + 20)
    assert ("mid", Change.UNLOADED, "evicted") in world.changes()
    assert world.timing("wide").obtained == pytest.approx(world.timing("plain").finished + LOAD_S)
    assert world.timing("behind").obtained > world.timing("wide").obtained
    assert world.node.loaded(now=Instant(world.now))[-1].context in (4096, 8192)
    world.ask("wide again", num_ctx=100_000)  # clamped to the trained context: no reload
    world.until(world.now + 5)
    loads = world.loads()
    world.ask("other", options="num_batch=1")
    world.until(world.now + 5)
    assert world.loads() == loads + 1
    assert ("mid", Change.UNLOADED, "reload") in world.changes()


def test_models_with_the_same_weights_share_a_runner_under_the_first_name() -> None:
    world = World()
    world.load("mid")
    world.ask("1", "alias")
    world.until(world.now + 5)
    assert world.loads() == 1
    assert world.ps() == ["mid"]


def test_a_keep_alive_sticks_runs_from_the_last_end_and_can_be_endless() -> None:
    world = World()
    world.load(keep_alive_s=5)
    world.ask("1", out=1)
    world.until(world.now + 1)
    end = world.timing("1").finished
    assert world.node.loaded(now=Instant(world.now))[0].expires_at == pytest.approx(end + 5)
    world.until(end + 4.9)
    assert world.ps() == ["mid"]
    world.until(end + 5.1)
    assert ("mid", Change.UNLOADED, "expired") in world.changes()

    world = World()
    world.load(keep_alive_s=-1)
    world.until(1e6)
    assert world.node.loaded(now=Instant(world.now))[0].expires_at == math.inf
    assert world.node.next_deadline() is None

    world = World()
    world.ask("once", keep_alive_s=0)
    world.until(5)
    assert world.ps() == []


def test_an_unload_waits_for_the_work_and_later_requests_still_get_in() -> None:
    world = World(slots=2)
    world.do(UnloadAsked("mid"))
    world.do(UnloadAsked("nosuch"))
    world.load()
    start = world.now
    world.ask("a", out=101)
    world.do(UnloadAsked("mid"), at=start + 0.5)
    row = world.node.loaded(now=Instant(world.now))[0]
    assert row.expires_at == world.now
    assert row.in_flight == 1
    world.ask("b", out=10, at=start + 0.6)
    world.until(start + 10)
    assert world.finished()[-2:] == ["b", "a"] or world.finished()[-2:] == ["a", "b"]
    assert world.ps() == []
    world.load()
    world.do(UnloadAsked("mid"))
    assert world.changes()[-1] == ("mid", Change.UNLOADED, "asked")


def test_who_started_a_load_takes_it_along_and_the_next_one_starts_again() -> None:
    world = World()
    world.ask("a")
    world.ask("b", at=0.1)
    world.do(Left("a"), at=0.3)
    world.until(10)
    assert ("mid", Change.ABORTED, "a") in world.changes()
    assert world.timing("b").obtained == pytest.approx(0.3 + ABORT_S + LOAD_S)
    assert "a" not in world.finished()


def test_a_waiting_one_that_leaves_changes_nothing() -> None:
    world = World()
    world.ask("a")
    world.ask("b", at=0.1)
    world.do(Left("b"), at=0.3)
    world.do(Left("b"))
    world.do(Left("nobody"))
    world.until(10)
    assert world.loads() == 1
    assert world.finished() == ["a"]

    world.ask("c")
    world.ask("d")
    world.ask("e")
    world.do(Left("d"))
    world.until(20)
    assert world.finished() == ["a", "c", "e"]


def test_a_client_that_left_may_still_evict_but_not_load() -> None:
    world = World(max_loaded=1)
    world.load("mid")
    start = world.now
    world.ask("a", out=101)
    world.ask("cold", "tiny", at=start + 0.1)
    world.do(Left("cold"), at=start + 0.2)
    world.until(start + 10)
    assert ("mid", Change.UNLOADED, "evicted") in world.changes()
    assert world.loads() == 1


def test_leaving_during_decode_frees_the_slot_at_once_during_prefill_after_the_batch() -> None:
    world = World()
    world.load()
    start = world.now
    world.ask("a", out=1000)
    world.ask("b")
    world.do(Left("a"), at=start + 1)
    world.until(start + 5)
    assert world.timing("b").started == pytest.approx(start + 1)

    start = world.now
    world.ask("c", prompt=2000)
    world.ask("d")
    world.do(Left("c"), at=start + 0.6)  # 600 tokens read, the second batch of 512 ends at 1.024 s
    world.until(start + 5)
    assert world.timing("d").started == pytest.approx(start + 1.024)
    assert world.node.in_flight == 0


def test_leaving_behind_another_prefill_frees_the_slot_at_once() -> None:
    world = World(slots=2)
    world.load()
    start = world.now
    world.ask("a", prompt=1000)
    world.ask("b", prompt=1000)
    world.ask("c", prompt=1000)
    world.do(Left("b"), at=start + 0.1)
    world.until(start + 10)
    assert world.timing("c").started == pytest.approx(start + 0.1)


def test_a_failed_load_fails_its_request_only() -> None:
    world = World()
    world.ask("a", load_error="bad tensor layout")
    world.ask("b")
    world.until(10)
    assert [effect for _, effect in world.said if isinstance(effect, LoadFailed)] == [LoadFailed("a", "bad tensor layout")]
    assert ("mid", Change.FAILED, "a") in world.changes()
    assert world.timing("b").obtained == 2 * LOAD_S


def test_a_model_that_is_deleted_while_a_request_waits_is_not_found() -> None:
    world = World()
    world.ask("a")
    world.ask("b", "tiny")
    del world.node.models["tiny"]  # type: ignore[attr-defined]
    world.until(10)
    assert [effect for _, effect in world.said if isinstance(effect, LoadFailed)] == [LoadFailed("b", "model 'tiny' not found")]


def test_a_held_request_keeps_its_slot_until_it_is_resumed() -> None:
    world = World()
    world.load()
    start = world.now
    world.ask("a", out=10, hold_at=3, paced=True)
    world.ask("b")
    world.until(start + 100)
    assert [effect.tokens for _, effect in world.said if isinstance(effect, Produced)] == [1, 2, 3]
    assert [effect for _, effect in world.said if isinstance(effect, Held)] == [Held("a")]
    assert "b" not in world.finished()
    world.do(Resumed("a"))
    world.do(Resumed("nobody"))
    world.until(start + 200)
    assert world.finished()[-2:] == ["a", "b"]
    assert world.timing("a").finished == pytest.approx(start + 100 + 0.07)


def test_a_hold_before_the_first_token_and_a_resume_that_comes_early() -> None:
    world = World()
    world.load()
    world.ask("a", hold_at=0)
    world.until(world.now + 1)
    assert Held("a") in [effect for _, effect in world.said]
    world.do(Resumed("a"))
    world.until(world.now + 1)
    assert "a" in world.finished()
    world.ask("b", hold_at=5)
    world.do(Resumed("b"))
    world.until(world.now + 1)
    assert "b" in world.finished()
    world.ask("c", hold_at=0)
    world.until(world.now + 1)
    world.do(Left("c"))
    assert world.node.in_flight == 0


def test_the_prompt_cache_shortens_a_known_prompt_and_forgets_with_the_runner() -> None:
    world = World()
    world.load()
    world.ask("a", prompt=1000, conversation="x")
    world.until(world.now + 5)
    world.ask("b", prompt=1100, conversation="x")
    world.until(world.now + 5)
    assert world.timing("b").cached_tokens == 1010
    world.do(UnloadAsked("mid"))
    world.ask("c", prompt=1100, conversation="x")
    world.until(world.now + 5)
    assert world.timing("c").cached_tokens == 0
    for number in range(70):
        world.ask(f"other {number}", prompt=10, out=1, conversation=str(number))
    world.until(world.now + 50)
    world.ask("d", prompt=1000, conversation="x")
    world.until(world.now + 5)
    assert world.timing("d").cached_tokens == 0

    world = World(prompt_cache=False)
    world.ask("a", conversation="x")
    world.ask("b", conversation="x")
    world.until(world.now + 5)
    assert world.timing("b").cached_tokens == 0


def test_a_late_call_changes_no_instant() -> None:
    def run(*, late: bool) -> list[Timing]:
        world = World()
        for name, at in (("a", 0.0), ("b", 0.05), ("c", 0.1)):
            world.ask(name, at=at)
        if late:
            world.said += [(9.0, effect) for effect in world.node.tick(now=Instant(9.0))]
        world.until(9)
        return [world.timing(name) for name in "abc"]

    assert run(late=True) == run(late=False)


def test_a_load_that_takes_no_time_happens_in_the_same_call() -> None:
    world = World(load_base_s=0.0)
    world.ask("1", prompt=0, out=0)
    assert world.finished() == ["1"]
    assert world.node.pending == 0


@given(
    st.lists(
        st.tuples(
            st.floats(0, 0.7),
            st.sampled_from(["ask", "ask", "ask", "leave", "unload", "resume"]),
            st.integers(0, 12),
            st.sampled_from(sorted(MODELS)),
            st.sampled_from([None, 0.0, 1.0, -1.0]),
            st.sampled_from([None, 512]),
        ),
        max_size=40,
    ),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_whatever_happens_every_request_ends_once_and_no_limit_is_passed(
    script: list[tuple[float, str, int, str, float | None, int | None]], slots: int, max_loaded: int
) -> None:
    world = World(slots=slots, max_loaded=max_loaded, max_queue=3, unload_s=0.1)
    left: set[str] = set()
    for number, (pause, what, target, model, keep_alive_s, num_ctx) in enumerate(script):
        world.until(world.now + pause)
        if what == "ask":
            hold_at = 2 if target == 12 else None
            world.ask(str(number), model, prompt=target * 100, out=target, keep_alive_s=keep_alive_s, num_ctx=num_ctx, hold_at=hold_at)
        elif what == "leave":
            left.add(str(number - target))
            world.do(Left(str(number - target)))
        elif what == "resume":
            world.do(Resumed(str(number - target)))
        else:
            world.do(UnloadAsked(model))
        assert len(world.ps()) <= max_loaded
    for number in range(len(script)):
        world.do(Resumed(str(number)))
    world.until(world.now + 2000)
    over = world.finished() + world.refused()
    assert len(over) == len(set(over))
    asked = {str(number) for number, step in enumerate(script) if step[1] == "ask"}
    endless = any(row.expires_at == math.inf for row in world.node.loaded(now=Instant(world.now)))
    held = {effect.request_id for _, effect in world.said if isinstance(effect, Held)}
    if not endless and not held:
        assert asked - left <= set(over)
        assert world.node.in_flight == 0
    for _, effect in world.said:
        if isinstance(effect, Finished):
            timing = effect.timing
            assert timing.came <= timing.obtained <= timing.started <= timing.first <= timing.finished
