"""Tasks on nodes: states, order, retries, who watches."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import tasks as module
from core.errors import IllegalTransition, RemoteError
from core.events import Note
from core.tasks import (
    FINISHED,
    FINISHED_MAX,
    LEASE_S,
    PAUSE_FIRST_S,
    TRANSITIONS,
    TRIES_MAX,
    Abort,
    Asked,
    AttemptOver,
    Begin,
    Cancelled,
    Changed,
    Effect,
    Event,
    Joined,
    Kind,
    NodesSeen,
    Progressed,
    TaskInput,
    Tasks,
    TaskState,
    TaskView,
    WatcherLeft,
    What,
    advance,
    failures,
)
from core.transfer import Layer
from core.units import AgentId, Instant, UnixMs

A, B = AgentId("a"), AgentId("b")
UNIX = UnixMs(1_000)


class Desk:
    """Tasks with two ready nodes, a clock turned by hand, and every effect so far."""

    def __init__(self, *ready: AgentId) -> None:
        self.tasks = Tasks()
        self.now = Instant(100.0)
        self.seen: list[Effect] = []
        self.numbers = 0
        self.nodes(*(ready or (A, B)))

    def tell(self, event: Event) -> list[Effect]:
        effects = self.tasks.handle(event, now=self.now)
        self.seen += effects
        return effects

    def nodes(self, *ready: AgentId, known: tuple[AgentId, ...] = (A, B)) -> list[Effect]:
        return self.tell(NodesSeen(known=known, ready=ready, now_unix=UNIX))

    def ask(self, model: str = "m", agent: AgentId = A, kind: Kind = Kind.PULL, *, kept: bool = True, **more: Any) -> str:
        self.numbers += 1
        what = What(kind=kind, agent_id=agent, model=model, **more)
        effects = self.tell(Asked(task_id=f"t{self.numbers}", what=what, kept=kept, now_unix=UNIX))
        (joined,) = [effect for effect in effects if isinstance(effect, Joined)]
        return joined.task_id

    def over(self, task_id: str, error: str | None = None, *, lost: bool = False, attempt: int | None = None) -> list[Effect]:
        number = self.view(task_id).attempts if attempt is None else attempt
        return self.tell(AttemptOver(task_id=task_id, attempt=number, error=error, lost=lost, now_unix=UNIX))

    def progress(self, task_id: str, *layers: Layer, phase: str = "", attempt: int | None = None) -> None:
        number = self.view(task_id).attempts if attempt is None else attempt
        self.tell(Progressed(task_id=task_id, attempt=number, phase=phase, layers=layers, now_unix=UNIX))

    def cancel(self, task_id: str, why: str = "cancelled by an admin") -> list[Effect]:
        return self.tell(Cancelled(task_id=task_id, why=why, now_unix=UNIX))

    def tick(self, seconds: float) -> list[Effect]:
        self.now = Instant(self.now + seconds)
        effects = self.tasks.tick(now=self.now, now_unix=UNIX)
        self.seen += effects
        return effects

    def view(self, task_id: str) -> TaskView:
        found = self.tasks.get(task_id)
        assert found is not None
        return found

    def status(self, task_id: str) -> str:
        return self.view(task_id).status.value


def begun(effects: list[Effect]) -> list[tuple[str, int]]:
    return [(effect.task_id, effect.attempt) for effect in effects if isinstance(effect, Begin)]


# ---------------------------------------------------------------- the table


@given(st.sampled_from(TaskState), st.sampled_from(TaskInput))
def test_the_table_is_the_only_door(state: TaskState, given_input: TaskInput) -> None:
    if (state, given_input) in TRANSITIONS:
        assert state not in FINISHED
        assert advance(state, given_input) is TRANSITIONS[state, given_input]
    else:
        with pytest.raises(IllegalTransition, match=state.value):
            advance(state, given_input)


# ---------------------------------------------------------------- one task


def test_a_download_from_its_beginning_to_its_end() -> None:
    desk = Desk()
    task = desk.ask("llama3")
    assert begun(desk.seen) == [(task, 1)]
    assert desk.tasks.on(A) == Begin(task_id=task, attempt=1, what=What(kind=Kind.PULL, agent_id=A, model="llama3"))
    desk.progress(task, Layer("d", 100, 10), phase="pulling d")
    desk.now = Instant(desk.now + 2)
    desk.progress(task, Layer("d", 100, 50))
    view = desk.view(task)
    assert (view.status, view.progress, view.completed_bytes, view.total_bytes) == (TaskState.DOWNLOADING, 0.5, 50, 100)
    assert (view.download_speed_bps, view.phase, view.error) == (20, "pulling d", None)
    effects = desk.over(task)
    assert Changed(task_id=task, status=TaskState.COMPLETED) in effects
    assert (desk.view(task).progress, desk.view(task).download_speed_bps, desk.tasks.on(A)) == (1.0, None, None)
    assert desk.tasks.unfinished == 0


def test_speed_forgets() -> None:
    desk = Desk()
    task = desk.ask()
    for completed in (0, 0, 100):
        desk.progress(task, Layer("d", 1000, completed))
        desk.progress(task, Layer("d", 1000, completed))  # at the same instant: no rate
        desk.now = Instant(desk.now + 1)
    assert desk.view(task).download_speed_bps == 50  # half of the last second's 100, half of the first one's 0


def test_progress_is_not_whole_before_the_end_and_never_goes_back() -> None:
    desk = Desk()
    task = desk.ask()
    desk.progress(task, Layer("big", 100, 100))
    assert desk.view(task).progress == 0.99
    desk.progress(task, Layer("small", 900, 0))
    assert desk.view(task).progress == 0.99


def test_a_node_that_sleeps_gets_its_task_when_it_is_back() -> None:
    desk = Desk(B)
    task = desk.ask(agent=A)
    assert desk.status(task) == "pending"
    assert desk.tasks.next_deadline() is None
    assert begun(desk.nodes(A, B)) == [(task, 1)]


def test_the_tasks_of_a_node_that_is_removed_fail() -> None:
    desk = Desk(B)
    task = desk.ask(agent=A)
    desk.nodes(B, known=(B,))
    assert (desk.status(task), desk.view(task).error) == ("failed", "the node was removed from the fleet")


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(RemoteError, match="invalid model name"):
        Desk().ask("a b")


def test_there_may_not_be_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNFINISHED_MAX", 1)
    desk = Desk()
    desk.ask("x")
    desk.ask("x")  # joins
    with pytest.raises(RemoteError, match="unfinished"):
        desk.ask("y")


# ---------------------------------------------------------------- failing


def test_a_failure_that_may_pass_is_tried_again_after_a_pause_that_doubles() -> None:
    desk = Desk()
    task = desk.ask()
    desk.over(task, "context deadline exceeded")
    view = desk.view(task)
    assert (view.status, view.error, view.next_try_s) == (TaskState.PENDING, "context deadline exceeded", PAUSE_FIRST_S)
    assert desk.tasks.next_deadline() == desk.now + PAUSE_FIRST_S
    assert begun(desk.tick(PAUSE_FIRST_S - 0.1)) == []
    assert begun(desk.tick(0.1)) == [(task, 2)]
    desk.over(task, "context deadline exceeded")
    assert desk.view(task).next_try_s == 2 * PAUSE_FIRST_S


def test_a_failure_that_cannot_pass_is_final() -> None:
    desk = Desk()
    task = desk.ask()
    desk.over(task, "pull model manifest: file does not exist")
    assert (desk.status(task), desk.view(task).error) == ("failed", "pull model manifest: file does not exist")


def test_tries_that_bring_nothing_have_a_limit() -> None:
    desk = Desk()
    task = desk.ask()
    for _ in range(TRIES_MAX - 1):
        desk.over(task, "cut", lost=True)
        desk.tick(400)
    assert desk.view(task).attempts == TRIES_MAX
    desk.over(task, "cut", lost=True)
    assert desk.status(task) == "failed"


def test_tries_that_bring_something_do_not_count() -> None:
    desk = Desk()
    task = desk.ask()
    for number in range(3 * TRIES_MAX):
        desk.progress(task, Layer("d", 1000, number + 1))
        desk.over(task, "cut", lost=True)
        assert desk.view(task).next_try_s == PAUSE_FIRST_S
        desk.tick(PAUSE_FIRST_S)
    assert desk.status(task) == "downloading"


def test_a_deletion_is_repeated_only_when_its_node_was_lost() -> None:
    desk = Desk()
    first, then = desk.ask("x", kind=Kind.DELETE), desk.ask("y", kind=Kind.DELETE)
    desk.over(first, "unexpected EOF")
    assert desk.status(first) == "failed"
    desk.over(then, "connection reset", lost=True)
    assert desk.status(then) == "pending"


def test_work_that_nobody_hears_of_is_given_up_and_begun_anew() -> None:
    desk = Desk()
    task = desk.ask()
    desk.tick(LEASE_S - 1)
    desk.progress(task)
    assert desk.tick(LEASE_S - 1) == []
    desk.tick(1)
    assert desk.status(task) == "pending"
    assert "nothing was heard" in (desk.view(task).error or "")
    desk.progress(task, Layer("d", 5, 5), attempt=1)
    assert desk.view(task).layers == ()
    assert begun(desk.tick(PAUSE_FIRST_S)) == [(task, 2)]
    desk.over(task, attempt=1)
    assert desk.status(task) == "downloading"


def test_words_about_tasks_that_nobody_knows_change_nothing() -> None:
    desk = Desk()
    for event in (
        WatcherLeft(task_id="x", now_unix=UNIX),
        Cancelled(task_id="x", why="", now_unix=UNIX),
        Progressed(task_id="x", attempt=1, now_unix=UNIX),
        AttemptOver(task_id="x", attempt=1, now_unix=UNIX),
    ):
        assert desk.tell(event) == []
    assert desk.tasks.get("x") is None


# ---------------------------------------------------------------- order


def test_a_node_does_one_thing_at_a_time_in_the_order_asked() -> None:
    desk = Desk()
    first, second, other = desk.ask("x"), desk.ask("y"), desk.ask("x", agent=B)
    assert (desk.status(first), desk.status(second), desk.status(other)) == ("downloading", "pending", "downloading")
    assert begun(desk.over(first)) == [(second, 1)]


def test_one_that_pauses_lets_others_pass_but_not_those_about_the_same_model() -> None:
    desk = Desk()
    pull, delete, copy = desk.ask("x"), desk.ask("X:latest", kind=Kind.DELETE), desk.ask("z", kind=Kind.COPY, destination="x")
    other = desk.ask("y")
    assert begun(desk.over(pull, "cut", lost=True)) == [(other, 1)]
    desk.over(other)
    assert [desk.status(task) for task in (pull, delete, copy)] == ["pending"] * 3
    assert begun(desk.tick(PAUSE_FIRST_S)) == [(pull, 2)]
    assert begun(desk.over(pull)) == [(delete, 1)]
    assert begun(desk.over(delete)) == [(copy, 1)]


# ---------------------------------------------------------------- who asks for the same


def test_who_asks_for_the_same_joins() -> None:
    desk = Desk()
    assert desk.ask("llama3") == desk.ask("library/LLAMA3:latest")
    assert desk.ask("llama3", insecure=True) != desk.ask("llama3")
    assert len(desk.tasks.newest(9)) == 3


def test_a_pull_after_a_deletion_is_not_the_pull_before_it() -> None:
    desk = Desk()
    first = desk.ask("x")
    delete = desk.ask("x", kind=Kind.DELETE)
    again = desk.ask("x")
    assert len({first, delete, again}) == 3
    assert desk.ask("x") == again


def test_a_pull_ends_when_the_last_who_watches_it_leaves() -> None:
    desk = Desk()
    task = desk.ask(kept=False)
    assert desk.ask(kept=False) == task
    desk.tell(WatcherLeft(task_id=task, now_unix=UNIX))
    assert desk.status(task) == "downloading"
    effects = desk.tell(WatcherLeft(task_id=task, now_unix=UNIX))
    assert Abort(task_id=task, attempt=1, agent_id=A) in effects
    assert (desk.status(task), desk.view(task).error) == ("cancelled", "the client that asked for it left")


def test_what_an_admin_asked_for_goes_on_when_a_watcher_leaves() -> None:
    desk = Desk()
    task = desk.ask(kept=False)
    assert desk.ask(kept=True) == task
    desk.tell(WatcherLeft(task_id=task, now_unix=UNIX))
    assert desk.status(task) == "downloading"


# ---------------------------------------------------------------- cancelling


def test_a_cancelled_task_occupies_its_node_until_the_work_has_stopped() -> None:
    desk = Desk()
    first, second = desk.ask("x"), desk.ask("y")
    assert Abort(task_id=first, attempt=1, agent_id=A) in desk.cancel(first)
    assert (desk.status(first), desk.status(second)) == ("cancelled", "pending")
    assert desk.tasks.on(A) is None
    desk.progress(first, Layer("d", 1, 1))
    assert desk.view(first).layers == ()
    assert begun(desk.over(first)) == [(second, 1)]
    assert desk.status(first) == "cancelled"


def test_a_task_asked_for_while_the_cancelled_one_stops_is_another() -> None:
    desk = Desk()
    first = desk.ask("x")
    desk.cancel(first)
    again = desk.ask("x")
    assert again != first
    assert begun(desk.over(first)) == [(again, 1)]


def test_a_cancelled_task_whose_end_is_never_told_gives_its_node_free() -> None:
    desk = Desk()
    first, second = desk.ask("x"), desk.ask("y")
    desk.cancel(first)
    assert begun(desk.tick(LEASE_S)) == [(second, 1)]


def test_cancelling_what_waits_or_is_over() -> None:
    desk = Desk(B)
    waiting = desk.ask("x", agent=A)
    assert not any(isinstance(effect, Abort) for effect in desk.cancel(waiting))
    assert desk.status(waiting) == "cancelled"
    assert desk.cancel(waiting, "again") == []
    assert desk.view(waiting).error == "cancelled by an admin"


# ---------------------------------------------------------------- the rest


def test_what_is_in_hand_or_waits_is_busy() -> None:
    desk = Desk()
    desk.over(desk.ask("x"))
    desk.ask("y")
    desk.ask("z", kind=Kind.COPY, destination="z2")
    short = {(agent, key.rpartition("/")[2]) for agent, key in desk.tasks.busy()}
    assert short == {(A, "y:latest"), (A, "z:latest"), (A, "z2:latest")}


def test_finished_tasks_are_forgotten_when_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FINISHED_MAX", 2)
    assert FINISHED_MAX > 2
    desk = Desk(B)
    made = [desk.ask(f"m{number}", agent=A) for number in range(4)]
    for task in made:
        desk.cancel(task)
    assert [task.id for task in desk.tasks.newest(9)] == made[:1:-1]


def test_a_failure_is_noted_with_its_reason() -> None:
    desk = Desk()
    task = desk.ask("llama3")
    notes = [effect for effect in desk.over(task, "invalid model name") if isinstance(effect, Note)]
    assert (notes[0].level, notes[0].event, notes[0].fields["why"], notes[0].fields["model"]) == (
        "warning", "task: pull", "invalid model name", "llama3:latest",
    )  # fmt: skip


def test_failures_are_told_by_the_names_of_their_nodes() -> None:
    desk = Desk()
    good, bad, gone = desk.ask("x"), desk.ask("x", agent=B), desk.ask("y")
    desk.over(good)
    desk.over(bad, "invalid model name")
    desk.cancel(gone)
    assert failures(reversed(desk.tasks.newest(9)), {A: "alpha"}) == "b: invalid model name; alpha: cancelled by an admin"


# ---------------------------------------------------------------- any story

STEPS = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from(["x", "y", "X:latest"]), st.sampled_from([A, B]), st.sampled_from(Kind), st.booleans()),
    st.tuples(st.just("over"), st.integers(1, 8), st.sampled_from([None, "cut", "invalid model name"]), st.booleans()),
    st.tuples(st.just("stale"), st.integers(1, 8)),
    st.tuples(st.just("progress"), st.integers(1, 8), st.integers(0, 10)),
    st.tuples(st.just("cancel"), st.integers(1, 8)),
    st.tuples(st.just("leave"), st.integers(1, 8)),
    st.tuples(st.just("nodes"), st.sets(st.sampled_from([A, B])), st.sets(st.sampled_from([A, B]))),
    st.tuples(st.just("tick"), st.floats(0.1, 100)),
)


@given(st.lists(STEPS, max_size=30))
def test_any_story_keeps_the_rules(story: list[tuple[Any, ...]]) -> None:
    desk = Desk()
    before: dict[str, TaskView] = {}
    for step in story:
        start = len(desk.seen)
        play(desk, step)
        for effect in desk.seen[start:]:
            if isinstance(effect, Begin):
                held, attempt = desk.tasks._in_hand[effect.what.agent_id]
                assert (held.id, attempt) == (effect.task_id, effect.attempt)
        check_order(desk)
        check_views(desk, before)


def play(desk: Desk, step: tuple[Any, ...]) -> None:
    match step:
        case ("ask", model, agent, kind, kept):
            desk.ask(model, agent, kind, kept=kept, **({"destination": "z"} if kind is Kind.COPY else {}))
        case ("cancel", number):
            desk.cancel(f"t{number}")
        case ("leave", number):
            desk.tell(WatcherLeft(task_id=f"t{number}", now_unix=UNIX))
        case ("nodes", ready, known):
            desk.nodes(*sorted(ready & known), known=tuple(sorted(known)))
        case ("tick", seconds):
            desk.tick(seconds)
        case (_, number, *_) if desk.tasks.get(f"t{number}") is None:
            pass
        case ("over", number, error, lost):
            desk.over(f"t{number}", error, lost=lost)
        case ("stale", number):
            assert desk.over(f"t{number}", attempt=99) == []
        case ("progress", number, completed):
            desk.progress(f"t{number}", Layer("d", 10, completed))
        case _:
            raise AssertionError(step)


def check_order(desk: Desk) -> None:
    """What works is what occupies its node, and nothing asked for earlier about the same model waits behind it."""
    tasks = list(desk.tasks._tasks.values())
    in_hand = {agent: task for agent, (task, _) in desk.tasks._in_hand.items()}
    for number, task in enumerate(tasks):
        if task.state is TaskState.DOWNLOADING:
            assert in_hand[task.what.agent_id] is task
            for earlier in tasks[:number]:
                if earlier.what.agent_id == task.what.agent_id and earlier.state is TaskState.PENDING:
                    assert set(earlier.keys).isdisjoint(task.keys)
    assert sorted(task.id for waiting in desk.tasks._waiting.values() for task in waiting.values()) == sorted(
        task.id for task in tasks if task.state is TaskState.PENDING
    )


def check_views(desk: Desk, before: dict[str, TaskView]) -> None:
    for view in desk.tasks.newest(100):
        old = before.get(view.id)
        if old is not None:
            assert view.progress >= old.progress
            assert view.attempts >= old.attempts
            assert old.status not in FINISHED or view.status is old.status
        if view.status in (TaskState.FAILED, TaskState.CANCELLED):
            assert view.error
        if view.status is TaskState.COMPLETED:
            assert view.progress == 1.0
            assert view.error is None
        before[view.id] = view
    deadline = desk.tasks.next_deadline()
    assert deadline is None or deadline > desk.now


# ---------------------------------------------------------------- after a restart


def restarted(before: Desk) -> Desk:
    """Another run that was given what the first one kept, and has not seen a node yet."""
    after = Desk()
    after.tasks = Tasks()
    for number in range(1, before.numbers + 1):
        kept = before.tasks.lasting(f"t{number}")
        if kept is not None:
            after.tell(kept)
            after.tell(kept)  # once more changes nothing
    return after


def test_what_was_not_finished_is_begun_anew_and_what_was_is_as_it_was() -> None:
    before = Desk()
    running, waiting, done, failed = before.ask("a"), before.ask("b"), before.ask("c", B), before.ask("d", B)
    before.over(done)
    before.over(failed, "no such model: file does not exist")
    after = restarted(before)
    assert [after.status(task) for task in (running, waiting, done)] == ["pending", "pending", "completed"]
    assert after.view(failed).error == before.view(failed).error
    assert after.view(done).created_at == before.view(done).created_at
    effects = after.nodes(A, B)
    assert begun(effects) == [(running, 2)]


def test_what_somebody_watched_ends_with_the_run_that_he_watched() -> None:
    before = Desk()
    watched = before.ask("a", kept=False)
    after = restarted(before)
    assert after.status(watched) == "cancelled"
    assert "started anew" in (after.view(watched).error or "")
    assert after.nodes(A, B) == []


def test_nothing_is_kept_of_a_task_that_nobody_knows() -> None:
    assert Desk().tasks.lasting("nothing") is None
