"""What was compiled decides as its source does, and runs only where it was made of this source, whole and in time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import native

ROOT = Path(__file__).parents[2]
WORLD = (
    "import sys, native; used = native.use();"
    "from core.simulation.__main__ import main; status = main(['--seed', sys.argv[1], '--seeds', '1', '--steps', '2000']);"
    "assert native.in_use() == used, 'a part of it'; print('compiled' if used else 'as it is'); sys.exit(status)"
)
PUT_BACK = (
    "import sys, native; used = native.use();"
    "import msgspec; from pathlib import Path; from core.snapshot import pack, take, unpack;"
    "from tests.core.test_snapshot import Twins, drawn; made = [];"
    "verdict = drawn(5, make_router=lambda config, *, now: made.append(Twins(config, now=now, turn=97)) or made[-1]).run(1500);"
    "assert verdict.passed, verdict.text; assert native.in_use() == used;"
    "packed = lambda router: msgspec.msgpack.encode([node for part in pack(take(router)) for node in part]);"
    "own = packed(made[0].first); Path(sys.argv[1]).write_bytes(own);"
    "others = [Path(name).read_bytes() for name in sys.argv[2:]];"
    "print(used, [other == own and packed(unpack(msgspec.msgpack.decode(other))) == own for other in (own, *others)])"
)
"""Plays a world with a router that is put back again and again; writes what it held in the end, and reads what others wrote."""


def python(*words: str, **environ: str) -> str:
    """What a Python of its own prints."""
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, **environ}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Path:
    """What `make test` has compiled before; otherwise it is done now."""
    python("-m", "native")
    assert native.place().is_dir()
    return native.place()


@pytest.mark.parametrize("seed", ["11", "12", "13"])
def test_the_worlds_of_a_seed_are_the_same(seed: str) -> None:
    found = [python("-c", WORLD, seed, ROUTER_NATIVE=setting).splitlines() for setting in ("true", "false")]
    assert [lines[-1] for lines in found] == ["compiled", "as it is"]
    digests = [[line for line in lines if line.startswith("digest")] for lines in found]
    assert digests[0] == digests[1] != []


def test_what_a_router_holds_is_the_same_and_either_puts_back_what_the_other_kept(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("compiled", "source", "again")]
    assert python("-c", PUT_BACK, *files[:1]).split("\n")[0] == "True [True]"
    assert python("-c", PUT_BACK, *files[1:2], files[0], ROUTER_NATIVE="false").split("\n")[0] == "False [True, True]"
    assert python("-c", PUT_BACK, files[2], files[1]).split("\n")[0] == "True [True, True]"


def test_a_driver_keeps_time_and_its_tape_as_its_source_does() -> None:
    found = [python("-m", "tests.native.driven", ROUTER_NATIVE=setting).splitlines() for setting in ("true", "false")]
    assert [lines.pop() for lines in found] == ["compiled", "as it is"]
    assert found[0] == found[1]
    assert " True " in found[0][-1]


def test_all_modules_are_there(compiled: Path) -> None:
    for name in native.MODULES:
        package, _, module = name.rpartition(".")
        assert len(list((compiled / native.path_of(package)).glob(f"{module}.*.so"))) == 1, name


def test_too_late_is_not_at_all() -> None:
    told = python("-c", "import core.scoring, native; print(native.use(), native.in_use(), core.scoring.__file__)")
    assert told.split() == ["False", "False", str(ROOT / "core" / "scoring.py")]


def test_other_source_is_not_served_by_what_was_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = native.place()
    for package in native.PACKAGES:
        (tmp_path / native.path_of(package)).mkdir()
        for path in (ROOT / native.path_of(package)).glob("*.py"):
            (tmp_path / native.path_of(package) / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(native, "ROOT", tmp_path)
    assert native.place() == before
    changed = tmp_path / native.path_of(native.MODULES[0])
    changed.with_suffix(".py").write_bytes(changed.with_suffix(".py").read_bytes() + b"\n")
    assert native.place() != before
    assert not native.use()


def test_to_compile_again_does_nothing(compiled: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in compiled.rglob("*.so")}
    python("-m", "native")
    assert {path: path.stat().st_mtime_ns for path in compiled.rglob("*.so")} == before


@pytest.mark.parametrize(
    ("spoiled", "said"),
    [
        ("os.environ['CC'] = 'no-such-compiler'", "Nothing was compiled: there is no C compiler no-such-compiler ("),
        ("sys.modules['mypyc'] = None", "Nothing was compiled: mypyc is missing (pip install"),
        ("sysconfig.get_path = lambda _: '/no/such'", "Nothing was compiled: the headers of Python are missing ("),
        ("program.MODULES = ('core.no_such',)", "Nothing was compiled: mypyc or the C compiler failed, as "),
    ],
)
def test_what_cannot_be_compiled_is_said_in_one_line(spoiled: str, said: str, tmp_path: Path) -> None:
    place = tmp_path / "build" / "x"
    code = (
        f"import os, sys, sysconfig, pathlib, native.__main__ as program; program.place = lambda: pathlib.Path({str(place)!r}); {spoiled}"
    )
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit(program.main())"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(said)
    assert done.stderr.endswith(". The router runs without.\n")
    assert done.stderr.count("\n") == 1
    assert not place.exists()


def test_a_router_that_serves_runs_it_and_the_command_line_too() -> None:
    for module in ("servers.__main__", "agent.__main__"):
        code = (
            f"import sys, {module} as program; sys.argv = ['x', '--help']\n"
            "try: program.main()\n"
            "except SystemExit: pass\n"
            "import native; print(native.in_use())"
        )
        assert python("-c", code).split()[-1] == "True", module
