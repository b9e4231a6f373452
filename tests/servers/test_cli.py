"""The command line: against a coordinator in a process of its own, and without one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import structlog
from click.testing import CliRunner, Result

from servers.cli import main

LIMIT_S = 30


@dataclass
class Serving:
    """A coordinator that runs, and the environment to talk to it."""

    process: "subprocess.Popen[str]"
    url: str
    env: dict[str, str]


def environment(data: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ROUTER_", "OLLAMA_", "AGENT_"))}
    return {**kept, "ROUTER_DATA_DIR": str(data), "ROUTER_HOST": "127.0.0.1", "ROUTER_PORT": "0", "ROUTER_LOG_FORMAT": "json", **more}


def start(env: dict[str, str], *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-m", *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    env = environment(tmp_path_factory.mktemp("router"))
    with start(env, "servers") as process:
        assert process.stderr is not None
        port = json.loads(process.stderr.readline())["ports"][0]
        yield Serving(process, f"http://127.0.0.1:{port}", {**env, "ROUTER_PORT": str(port)})
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0


def invoke(serving: Serving, *arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, env={name: serving.env[name] for name in ("ROUTER_DATA_DIR", "ROUTER_PORT")})


def test_a_fleet_is_managed_from_the_command_line(serving: Serving) -> None:
    assert invoke(serving, "agents", "add", "http://127.0.0.1:9", "--name", "box[red]").output == "box[red] is added.\n"
    listed = invoke(serving, "agents", "list")
    assert listed.exit_code == 0
    assert "box[red]" in listed.output
    assert "127.0.0.1:9" in listed.output
    assert "takes nothing new" in invoke(serving, "agents", "drain", "box[red]").output
    assert "is used again" in invoke(serving, "agents", "connect", "box[red]").output
    assert "is held offline" in invoke(serving, "agents", "disconnect", "box[red]").output
    assert "total agents" in invoke(serving, "status").output
    assert "is forgotten" in invoke(serving, "agents", "remove", "box[red]").output
    assert invoke(serving, "agents", "list").output.count("\n") == 1


def test_placement_of_a_fleet_that_nobody_asked(serving: Serving) -> None:
    assert invoke(serving, "placement").output == "Nothing was asked for yet: there is nothing to place.\n"


def test_placement_is_shown_as_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    placed = {"node": "big[red]", "model": "m\x1b", "share": 0.75, "time_share": 0.5, "loaded": False, "why": "the fastest"}
    plan = {
        "placed": [placed],
        "unloads": [{"node": "big", "model": "old"}],
        "unheld": [{"model": "huge", "rate_per_s": 0.25, "why": "no node has it on disk"}],
        "rate_per_s": 1.5, "capacity_per_s": 4.0, "rates_per_s": {"m": 1.5}, "memory_guessed": ["big", "small"],
    }  # fmt: skip
    monkeypatch.setattr("servers.remote.Remote.call", lambda *_: plan)
    output = CliRunner().invoke(main, ["placement"]).output
    for text in (
        "big[red]",
        "m?",
        "75%",
        "50%",
        "the fastest",
        "old should leave big",
        "huge (0.25 requests/s) stays cold",
        "carries 4.",
        "big, small",
    ):
        assert text in output


def test_an_agent_is_approved_by_its_code(serving: Serving) -> None:
    registration = {
        "machine_name": "stranger\x1b[31m", "ip_address": "192.168.1.9", "ollama_version": "0.33.0", "ollama_port": 11434,
        "gpu_available": True, "gpu_devices": [{"model": "x"}],
    }  # fmt: skip
    answer = httpx.post(f"{serving.url}/api/agents", json=registration, headers={"X-Forwarded-For": "192.168.1.9"}, trust_env=False)
    assert answer.status_code == 202
    listed = invoke(serving, "agents", "list").output
    assert f"pending ({answer.json()['code']})" in listed
    assert "\x1b" not in listed
    assert "is approved" in invoke(serving, "agents", "approve", answer.json()["code"]).output
    assert "pending" not in invoke(serving, "agents", "list").output
    assert invoke(serving, "agents", "remove", answer.json()["agent_id"]).exit_code == 0


def test_tokens(serving: Serving) -> None:
    admin = invoke(serving, "token", "admin").output.strip()
    assert (Path(serving.env["ROUTER_DATA_DIR"]) / "admin-token").read_text().strip() == admin
    join = invoke(serving, "token", "join")
    assert join.exit_code == 0
    assert len(join.stdout.strip()) >= 40


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("agents", "drain", "nobody"), "no agent 'nobody'"),
        (("agents", "approve", "ABCD-0000"), "no agent waits with this code"),
        (("agents", "add", "ftp://x"), "ftp:// is not http://"),
        (("status", "--url", "http://127.0.0.1:1"), "no router answers at http://127.0.0.1:1"),
        (("status", "--url", "http://["), "no router answers"),
    ],
)
def test_what_cannot_be_done_is_one_line(serving: Serving, arguments: tuple[str, ...], word: str) -> None:
    result = invoke(serving, *arguments)
    assert result.exit_code == 1
    assert word in result.output
    assert result.output.count("\n") == 1


def test_without_a_coordinator_there_is_no_admin_token_yet(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["token", "admin"], env={"ROUTER_DATA_DIR": str(tmp_path / "none")})
    assert (result.exit_code, "first start" in result.output) == (1, True)


def test_help_lists_every_setting_and_says_what_is_not_used() -> None:
    result = CliRunner().invoke(main, ["serve", "--help"], terminal_width=200)
    assert "ROUTER_QUEUE_TIMEOUT" in result.output
    assert "nodes without an agent" in result.output
    assert "checked, but not used in this version" in result.output
    assert CliRunner().invoke(main, ["--version"]).output.startswith("ollama-router, version ")


@pytest.mark.parametrize(
    ("env", "status", "word"),
    [
        ({"ROUTER_PORT": "eighty"}, 2, "ROUTER_PORT takes"),
        ({"OLLAMA_ROUTER_CONFIG": "/nowhere/router.toml"}, 2, "cannot be read"),
        ({"ROUTER_QUEUE_MAX": "1", "ROUTER_QUEUE_PER_CLIENT": "2"}, 2, "ROUTER_QUEUE_PER_CLIENT"),
        ({"ROUTER_HOST": "192.0.2.1"}, 1, "cannot listen on 192.0.2.1"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "up"])
def test_a_start_that_cannot_be_is_one_line(tmp_path: Path, command: str, env: dict[str, str], status: int, word: str) -> None:
    result = CliRunner().invoke(main, [command], env=environment(tmp_path, **env))
    structlog.reset_defaults()
    assert (result.exit_code, result.stdout) == (status, "")
    assert result.stderr.startswith("ollama-router: ")
    assert word in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_port_in_use_is_one_line(serving: Serving) -> None:
    with start(serving.env, "servers") as process:
        _, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, err.count("\n")) == (1, 1)
    assert f"port {serving.env['ROUTER_PORT']}" in err
