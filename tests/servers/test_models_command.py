"""`ollama-router models`, `pull` and `tasks` against a coordinator's own words."""

from typing import Any

import pytest
from click.testing import CliRunner, Result

from servers.cli import main

AGENTS = [
    {"id": "1", "name": "alpha", "status": "online", "installed_models": ["m:latest", "x[red]:1b"], "loaded_models": ["M"]},
    {"id": "2", "name": "be\x1bta", "status": "online", "installed_models": ["m:latest"], "loaded_models": []},
    {"id": "3", "name": "gamma", "status": "offline", "installed_models": [], "loaded_models": []},
]
DRIFT = {
    "model": "m:latest", "canonical": "a" * 64,
    "digests": [{"agent_id": "1", "agent_name": "alpha", "digest": "a" * 64}, {"agent_id": "2", "agent_name": "beta", "digest": "b" * 64}],
}  # fmt: skip
TASK = {
    "id": "t1", "kind": "pull", "model": "m", "agent_id": "1", "agent_name": "alpha", "status": "downloading", "progress": 0.4,
    "completed_bytes": 40, "total_bytes": 100, "download_speed_bps": 2_500_000, "phase": "pulling d", "attempts": 1, "error": None,
    "next_try_s": None,
}  # fmt: skip


class Coordinator:
    """Answers in order; the last answer for a path stays."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any]] = []
        self.tasks = [TASK, {**TASK, "status": "completed", "progress": 1.0}]
        self.drift: list[Any] = [DRIFT]
        self.agents: list[Any] = AGENTS

    def call(self, _: object, method: str, path: str, body: Any = None) -> Any:
        self.calls.append((method, path, body))
        if path == "/api/models/drift":
            return {"drift": self.drift}
        if path == "/api/agents":
            return self.agents
        if path == "/api/models/distribute":
            return {"task_ids": ["t1"]}
        if path.startswith("/api/tasks?"):
            return [TASK, {**TASK, "id": "t2", "status": "pending", "error": "cut", "next_try_s": 4.0, "download_speed_bps": None}]
        if method == "DELETE":
            return {**TASK, "status": "cancelled"}
        return self.tasks.pop(0) if len(self.tasks) > 1 else self.tasks[0]


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    made = Coordinator()
    monkeypatch.setattr("servers.remote.Remote.call", lambda *given: made.call(*given))
    monkeypatch.setattr("servers.models_command.LOOK_S", 0)
    return made


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_models_are_listed_with_where_they_are_and_where_they_differ(coordinator: Coordinator) -> None:
    output = invoke("models").output
    assert "alpha*, be?ta" in output
    assert "x[red]:1b" in output
    assert "aaaaaaaaaaaa; beta bbbbbbbbbbbb" in output
    assert "different versions" in output
    coordinator.drift = []
    assert "different versions" not in invoke("models").output


def test_a_pull_goes_to_the_nodes_that_are_meant(coordinator: Coordinator) -> None:
    for arguments, meant in ((), ["1", "2"]), (("--all",), ["1", "2", "3"]), (("--on", "gamma", "--on", "1"), ["3", "1"]):
        result = invoke("pull", "m", *arguments)
        assert (result.exit_code, result.stdout) == (0, "alpha: m is there.\n")
        body = next(body for _, path, body in reversed(coordinator.calls) if path == "/api/models/distribute")
        assert body == {"model_name": "m", "target": "specific", "agent_ids": meant, "insecure": False}


def test_a_pull_that_fails_says_where_and_why(coordinator: Coordinator) -> None:
    coordinator.tasks = [TASK, {**TASK, "status": "failed", "error": "no space left\x1b"}]
    result = invoke("pull", "m")
    assert result.exit_code == 1
    assert "Error: alpha: no space left?" in result.stderr


def test_what_cannot_be_meant_is_said_before_anything_begins(coordinator: Coordinator) -> None:
    assert invoke("pull", "m", "--all", "--on", "alpha").exit_code == 2
    assert "there is no agent 'delta'" in invoke("pull", "m", "--on", "delta").stderr
    coordinator.agents = [AGENTS[2]]
    assert "no node is online" in invoke("pull", "m").stderr
    assert not any(path == "/api/models/distribute" for _, path, _ in coordinator.calls)


def test_who_stops_watching_reads_that_it_goes_on(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("servers.models_command.watch", leave)
    assert "the downloads go on" in invoke("pull", "m").stderr


def test_tasks_are_listed_and_stopped(coordinator: Coordinator) -> None:
    output = invoke("tasks").output
    for text in ("40%", "2.5 MB/s", "cut; again in 4 s", "alpha"):
        assert text in output
    assert invoke("tasks", "--cancel", "t1").output == "pull of m on alpha is cancelled.\n"
    assert coordinator.calls[-1] == ("DELETE", "/api/tasks/t1", None)
