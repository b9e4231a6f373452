"""`ollama-router backup` and `restore`: beside a coordinator that runs, and what a person is told."""

import stat
import sys
from pathlib import Path

import trio
from click.testing import CliRunner, Result

from agent.simulated.server import SimulatedOllama
from servers.cli import main
from tests.fleet.fleet import open_fleet

ROOT = "/api/dashboard/request-responses"


def invoke(command: str, file: Path, data_dir: Path) -> Result:
    return CliRunner().invoke(main, [command, str(file)], env={"ROUTER_DATA_DIR": str(data_dir)})


async def run(command: str, file: Path, data_dir: Path) -> str:
    environ = {"ROUTER_DATA_DIR": str(data_dir), "PATH": "/usr/bin"}
    done = await trio.run_process([sys.executable, "-m", "servers.cli", command, str(file)], capture_stdout=True, env=environ)
    return done.stdout.decode()


async def test_a_running_coordinators_memory_comes_back_elsewhere(tmp_path: Path) -> None:
    file, first, second = tmp_path / "all.backup", tmp_path / "first", tmp_path / "second"
    node = SimulatedOllama(models=["m"])
    async with node.serve(), open_fleet([node.port], ROUTER_DATA_DIR=str(first)) as fleet:
        ids = [(await fleet.chat()).headers["x-request-id"] for _ in range(3)]
        key = (await fleet.ask("POST", "/api/keys", {"name": "laptop"})).json()["key"]
        await fleet.wait_settled()
        await fleet.coordinator.memory.store.flush()
        assert (await run("backup", file, first)).startswith("3 records and ")
        assert stat.S_IMODE((await trio.Path(file).stat()).st_mode) == 0o600
    assert (await run("restore", file, second)).startswith("3 records and ")
    async with node.serve(), open_fleet([node.port], ROUTER_DATA_DIR=str(second), ROUTER_REQUIRE_API_KEY="true") as fleet:
        found = (await fleet.ask("GET", ROOT)).json()["records"]
        assert [one["id"] for one in found] == ids[::-1]
        assert (await fleet.ask("GET", "/api/tags", headers={"x-api-key": key})).status == 200
        assert (await run("restore", file, second)).startswith("3 records and ")
        assert (await fleet.ask("GET", ROOT)).json()["total_count"] == 3


def test_what_cannot_be_done_is_one_sentence(tmp_path: Path) -> None:
    nowhere = invoke("backup", tmp_path / "file", tmp_path / "none")
    assert (nowhere.exit_code, "Error: there is no database at" in nowhere.stderr) == (1, True)
    assert "cannot be read: No such file" in invoke("restore", tmp_path / "file", tmp_path / "none").stderr
    (tmp_path / "file").write_bytes(b"not gzip")
    assert "Error: this is no backup, or not all of one" in invoke("restore", tmp_path / "file", tmp_path / "data").stderr
    assert "cannot be written" in invoke("backup", tmp_path / "none" / "file", tmp_path / "data").stderr
