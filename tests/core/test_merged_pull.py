"""Pulls on several nodes, told as one."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from core.merged_pull import MergedPull
from core.tasks import Kind, TaskState, TaskView
from core.transfer import Layer
from core.units import AgentId, UnixMs

NAMES = {AgentId("a"): "alpha", AgentId("b"): "beta"}


def view(
    agent: str, *layers: Layer, phase: str = "pulling x", status: TaskState = TaskState.DOWNLOADING, error: str | None = None
) -> TaskView:
    return TaskView(
        id=f"t-{agent}", kind=Kind.PULL, agent_id=AgentId(agent), model="m", destination="", origin="admin", status=status, progress=0.0,
        completed_bytes=0, total_bytes=0, download_speed_bps=None, phase=phase, layers=layers, attempts=1, created_at=UnixMs(0),
        updated_at=UnixMs(0), error=error, next_try_s=None,
    )  # fmt: skip


def done(agent: str, *layers: Layer) -> TaskView:
    return view(agent, *layers, phase="success", status=TaskState.COMPLETED)


def words(lines: list[dict[str, Any]]) -> list[str]:
    return [str(line.get("status") or line["error"]) for line in lines]


def test_a_layer_is_as_far_as_on_the_slowest_node() -> None:
    merged = MergedPull(NAMES)
    first = merged.lines([view("a", Layer("sha256:1", 100, 80)), view("b", Layer("sha256:1", 100, 30))])
    assert words(first) == ["pulling manifest", "pulling 1"]
    assert first[1] == {"status": "pulling 1", "digest": "sha256:1", "total": 100, "completed": 30}
    assert merged.lines([view("a", Layer("sha256:1", 100, 90)), view("b", Layer("sha256:1", 100, 30))]) == []
    assert merged.lines([done("a", Layer("sha256:1", 100, 90)), view("b", Layer("sha256:1", 100, 70))])[0]["completed"] == 70


def test_a_node_that_went_on_has_the_layer_said_or_not() -> None:
    merged = MergedPull(NAMES)
    one, two = Layer("sha256:1", 100, 40), Layer("sha256:2", 10, 3)
    said = merged.lines([view("a", one, two), view("b", Layer("sha256:2", 10, 5))])
    assert said[1:] == [
        {"status": "pulling 1", "digest": "sha256:1", "total": 100, "completed": 100},
        {"status": "pulling 2", "digest": "sha256:2", "total": 10, "completed": 3},
    ]


def test_zero_and_empty_are_left_out_as_ollama_does() -> None:
    merged = MergedPull(NAMES)
    said = merged.lines([view("a", Layer("sha256:1", 100), Layer("sha256:2"))])
    assert said[1:] == [
        {"status": "pulling 1", "digest": "sha256:1", "total": 100, "completed": 100},
        {"status": "pulling 2", "digest": "sha256:2"},
    ]
    assert MergedPull(NAMES).lines([view("a", Layer("sha256:1", 100))])[1] == {"status": "pulling 1", "digest": "sha256:1", "total": 100}


def test_a_stage_is_reached_when_the_last_node_reached_it() -> None:
    merged = MergedPull(NAMES)
    layer = Layer("sha256:1", 10, 10)
    assert words(merged.lines([view("a", layer, phase="verifying sha256 digest"), view("b")])) == ["pulling manifest", "pulling 1"]
    both = [view("a", layer, phase="writing manifest"), view("b", layer, phase="verifying sha256 digest")]
    assert words(merged.lines(both)) == ["pulling 1", "verifying sha256 digest"]
    assert words(merged.last([done("a", layer), done("b", layer)])) == ["writing manifest", "success"]


def test_a_pull_too_quick_to_be_seen_is_still_told_in_order() -> None:
    assert words(MergedPull(NAMES).last([done("a"), done("b")])) == [
        "pulling manifest", "verifying sha256 digest", "writing manifest", "success",
    ]  # fmt: skip


def test_an_error_names_each_node_that_failed_and_is_the_only_end() -> None:
    tasks = [done("a"), view("b", status=TaskState.FAILED, error="no space left on device")]
    assert MergedPull(NAMES).last(tasks) == [{"error": "beta: no space left on device"}]
    cancelled = view("c", status=TaskState.CANCELLED)
    assert MergedPull(NAMES).last([*tasks, cancelled])[0]["error"] == "beta: no space left on device; c: cancelled"


LAYERS = st.lists(
    st.builds(Layer, st.sampled_from(["sha256:1", "sha256:2"]), st.just(10), st.integers(0, 10)), max_size=2, unique_by=lambda x: x.digest
)
VIEWS = st.builds(
    lambda agent, layers, phase, status: view(agent, *layers, phase=phase, status=status),
    st.sampled_from("ab"),
    LAYERS,
    st.sampled_from(["", "pulling manifest", "pulling 1", "verifying sha256 digest", "writing manifest", "success"]),
    st.sampled_from([TaskState.PENDING, TaskState.DOWNLOADING, TaskState.COMPLETED]),
)


@given(st.lists(st.lists(VIEWS, min_size=1, max_size=3), max_size=8))
def test_no_bar_goes_back_and_no_line_comes_twice(story: list[list[TaskView]]) -> None:
    merged = MergedPull(NAMES)
    said = [line for tasks in story for line in merged.lines(tasks)]
    shown: dict[str, int] = {}
    for line in said:
        if "digest" in line:
            assert line.get("completed", 0) >= shown.get(line["digest"], 0)
            shown[line["digest"]] = line.get("completed", 0)
    stages = [line["status"] for line in said if "digest" not in line]
    assert stages == ["pulling manifest", "verifying sha256 digest", "writing manifest"][: len(stages)]
    assert len({str(line) for line in said}) == len(said)
