"""`python -m agent` as a process: how it starts, what it says, how it ends."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.agent.fakes import LIMIT_S, Heard, answer, free_port, serving, until

ROOT = Path(__file__).parents[2]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("ROUTER_", "OLLAMA_", "AGENT_", "COORDINATOR_"))}


def start(tmp_path: Path, **environ: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "agent"], cwd=ROOT, env=CLEAN | {"AGENT_DATA_DIR": str(tmp_path)} | environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"OLLAMA_PORT": "eleven"}, "OLLAMA_PORT takes a port from 1 to 65535, not 'eleven'"),
        ({"COORDINATOR_URL": "ftp://x"}, "COORDINATOR_URL takes a URL such as"),
        ({"AGENT_DATA_DIR": "/dev/null/x"}, "AGENT_DATA_DIR names another directory"),
    ],
)
def test_a_wrong_setting_ends_it_with_one_line(tmp_path: Path, environ: dict[str, str], told: str) -> None:
    process = start(tmp_path, **environ)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1


def test_a_port_in_use_ends_it_with_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(tmp_path, AGENT_API_PORT=str(port), ROUTER_URL=f"http://127.0.0.1:{free_port()}")
        _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert f"AGENT_API_PORT: port {port} cannot be opened" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
async def test_it_registers_reports_and_stops_in_order(tmp_path: Path, ending: signal.Signals) -> None:
    async def coordinator(stream: trio.SocketStream, heard: Heard) -> None:
        registered = {
            "agent_id": "11111111-1111-4111-8111-111111111111",
            "status": "registered",
            "agent_token": "t",
            "gateway_credential": "c",
        }
        await stream.send_all(answer(201, registered) if heard.target == "/api/agents" else answer(200, {"status": "ok"}))

    async with serving(coordinator) as server:
        environ = {
            "ROUTER_URL": server.url,
            "OLLAMA_API_BASE": f"http://127.0.0.1:{free_port()}",
            "AGENT_API_PORT": "0",
            "ROUTER_LOG_FORMAT": "console",
        }
        process = start(tmp_path, **environ)
        try:
            await until(lambda: len(server.heard) >= 2, 20)
            process.send_signal(ending)
            with trio.fail_after(LIMIT_S):
                out, err = await trio.to_thread.run_sync(process.communicate)
        finally:
            process.kill()
    assert (process.returncode, err) == (0, "")
    for said in ("agent started", "Ollama does not answer", "registered with the coordinator", "agent stopped"):
        assert said in out
    assert server.heard[-1].json["draining"]


def test_help_and_version() -> None:
    for option, said in (("--help", "Usage"), ("--version", "ollama-router-agent, version")):
        found = subprocess.run([sys.executable, "-m", "agent", option], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
        assert said in found.stdout
