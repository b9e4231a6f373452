"""The command: what it prints, what it keeps, what it plays, and its exit status."""

import runpy
from pathlib import Path
from typing import Any

import pytest

import core.simulation.__main__ as command
from core.dump import Dump, load, written
from core.router import Router
from core.simulation.world import World
from core.units import Instant
from tests.core.routing import instead
from tests.core.simulation.mutants import answers_twice, leaks_the_lease_of_a_client_that_left, maker, ticks_twice
from tests.core.simulation.test_playback import recorded

CORPUS = Path(__file__).parent / "corpus"


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command whose world has a known-bad router."""

    def spoil(mutant: Any) -> None:
        make = maker(mutant)
        monkeypatch.setattr(command, "World", lambda *given, **named: World(*given, make_router=make, **named))
        real = command.shorten
        monkeypatch.setattr(command, "shorten", lambda *given, **named: real(*given, tries_max=20, make_router=make, **named))

    return spoil


def test_one_world_prints_seed_options_speed_and_digest(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--seed", "3", "--steps", "300", "--lite"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("seed 3, options {")
    assert "steps/s" in first
    assert command.main(["--seed", "3", "--steps", "300", "--lite"]) == 0
    assert first.splitlines()[-1] == capsys.readouterr().out.splitlines()[-1]
    assert first.splitlines()[-1].startswith("digest ")


def test_a_seed_may_be_a_hash_or_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--seed", "deadbeef", "--steps", "100", "--performance", "--nodes", "2"]) == 0
    assert "seed 3735928559" in capsys.readouterr().out
    assert command.main(["--steps", "100", "--nodes", "1", "--seeds", "2", "--every", "4"]) == 0
    assert "PASSED  seeds" in capsys.readouterr().out
    with pytest.raises(SystemExit) as raised:
        command.main(["--seed", "nonsense!"])
    assert raised.value.code == 2
    assert "a number or a hash" in capsys.readouterr().err


def test_a_failure_is_told_kept_and_played_again(spoiled: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoiled(answers_twice)
    kept = tmp_path / "kept.jsonl"
    assert command.main(["--seed", "0", "--steps", "1500", "--save", str(kept)]) == 129
    told = capsys.readouterr().out
    assert "CORRECTNESS  seed 0" in told
    assert "R14" in told
    assert "again: python -m core.simulation --seed 0 --steps 1500 --every 1 --save failure.jsonl" in told
    assert command.main(["--replay", str(kept)]) == 129
    assert "R14" in capsys.readouterr().out
    assert command.main(["--seed", "0", "--steps", "1500", "--save", str(kept), "--no-shrink"]) == 129


def test_a_crash_shows_where(spoiled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def raises(router: Any) -> None:
        instead(router, "statistics", lambda: 1 // 0)

    spoiled(raises)
    assert command.main(["--seed", "5", "--steps", "500"]) == 127
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_a_failure_without_a_file(spoiled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    spoiled(leaks_the_lease_of_a_client_that_left)
    assert command.main(["--seed", "0", "--steps", "1500", "--seeds", "50"]) == 129
    assert "written" not in capsys.readouterr().out


@pytest.mark.parametrize("given", [["--lite", "--nodes", "3"], ["--performance", "--nodes", "3"]])
def test_the_command_that_runs_a_failure_again_says_all_that_was_said(
    given: list[str], spoiled: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled(ticks_twice)
    assert command.main([*given, "--seed", "7", "--seeds", "3", "--steps", "400"]) == 129
    first = capsys.readouterr().out
    again = next(line for line in first.splitlines() if line.startswith("again: "))
    command_line = again.removeprefix("again: python -m core.simulation ").removesuffix(" --save failure.jsonl")
    assert command.main(command_line.split()) == 129
    assert capsys.readouterr().out.endswith(first[first.index("CORRECTNESS") :])


def test_a_script_is_played(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--replay", str(CORPUS / "power-failure.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "loses its power" in out
    assert "PASSED" in out


def test_what_is_no_script_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "absent", tmp_path):
        assert command.main(["--replay", str(path)]) == 2
    (tmp_path / "bad").write_text("{", encoding="utf-8")
    assert command.main(["--replay", str(tmp_path / "bad")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize(("script", "status"), [("power-failure.jsonl", 0), ("no-such-file", 2)])
def test_the_verdict_is_the_exit_status(script: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["simulation", "--replay", str(CORPUS / script)])
    with pytest.raises(SystemExit) as raised:
        runpy.run_path(command.__file__, run_name="__main__")
    assert raised.value.code == status


# ---------------------------------------------------------------- dumps of a running router


def file_of(dump: Dump, place: Path) -> str:
    """The path of a file that holds `dump`."""
    path = place / "router.dump"
    path.write_bytes(b"".join(written(dump)))
    return str(path)


def test_a_dump_of_which_the_same_comes_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--replay", file_of(recorded(), tmp_path)]) == 0
    told, verdict = capsys.readouterr().out.splitlines()
    assert told == "dump of version 1, made at now: 14 steps"
    assert verdict.startswith("PASSED  14 steps, the same effects, digest ")


def test_a_dump_of_which_something_else_comes_fails_and_shows_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump = recorded()
    at, what, _ = dump.steps[4]
    dump.steps[4] = (at, what, ["l", ["something else"]])
    kept = tmp_path / "kept.dump"
    assert command.main(["--replay", file_of(dump, tmp_path), "--save", str(kept)]) == 129
    told = capsys.readouterr().out
    assert "the effects are not those of then" in told
    assert "step 5" in told
    assert "something else" in told
    assert "CORRECTNESS" not in told, "no invariant is broken"
    assert not kept.exists(), "there is nothing to shorten it to"


@pytest.mark.parametrize(("given", "left"), [([], 4), (["--no-shrink"], 14)])
def test_a_dump_that_breaks_an_invariant_is_kept_and_shortened_to_it(
    given: list[str], left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def at_most_two(router: Router, *, now: Instant) -> None:
        if router.statistics().requests_total >= 2:
            raise AssertionError("R99: two were settled")

    monkeypatch.setattr(command, "check", at_most_two)
    kept, path = tmp_path / "kept.dump", file_of(recorded(), tmp_path)
    assert command.main(["--replay", path]) == 129
    assert "written" not in capsys.readouterr().out
    assert command.main(["--replay", path, "--save", str(kept), *given]) == 129
    told = capsys.readouterr().out
    assert "CORRECTNESS  step 6: AssertionError: R99: two were settled" in told
    assert f"{left} of 14 steps written to {kept}" in told
    assert len(load(kept.read_bytes()).steps) == left
    assert command.main(["--replay", str(kept)]) == 129, "what was kept fails in the same way"


def test_a_damaged_dump_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(file_of(recorded(), tmp_path))
    path.write_bytes(path.read_bytes()[:-1])
    assert command.main(["--replay", str(path)]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "the dump is damaged" in told
