"""The project as others get it: its import contracts, its wheel, its commands."""

import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.house.tree import ROOMS, ROOT, files

COMMANDS = ("ollama-router", "ollama-router-agent")


def test_rooms_import_only_downwards() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"]  # a process of its own: it sets up logging
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_wheel_holds_all_packages_and_nothing_else(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {path.as_posix() for room in (*ROOMS, "nginx") for path in files(under=room) if not path.name.endswith(".pyc")}
    assert inside == expected
    assert {f"{room}/py.typed" for room in ROOMS} <= inside


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_say_how_to_use_them(name: str) -> None:
    (command,) = entry_points(group="console_scripts", name=name)
    assert callable(command.load())
    done = subprocess.run(
        [Path(sys.executable).with_name(name), "--help"], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0
    assert "usage" in done.stdout.lower()
