"""`ollama-router simulate` as a person uses it: tables, plots, mistakes, and the end by Ctrl-C."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from servers.cli import main
from servers.study import cells, command, plots
from servers.study.cells import Cell, Summary, run


def summary(strategy: str = "auto", **changes: object) -> Summary:
    fields: dict[str, object] = {
        "strategy": strategy, "seed": 1, "rate_per_s": 1.0, "requests": 100, "refused": 0,
        "ttft_s": {percent: percent / 10 for percent in cells.PERCENTS}, "loads_per_1000": 5.0, "goodput": 0.9, "utilisation": 0.5,
        "over_time": [(float(60 * n), 0.5, 0.9) for n in range(10)], "unstable": False,
    }  # fmt: skip
    return Summary(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run in this process."""

    def run_all(jobs: list[Cell], *, progress: object) -> Iterator[tuple[int, Summary]]:
        yield from enumerate(map(run, jobs))

    monkeypatch.setattr(cells, "run_all", run_all)


def simulate(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["simulate", *arguments])


@pytest.mark.usefixtures("here")
def test_a_study_of_the_built_in_fleet(tmp_path: Path) -> None:
    made = simulate(
        "--format", "mooncake", "--strategies", "auto,random", "--load", "0.2", "--seeds", "2", "--plots", str(tmp_path / "new")
    )
    assert made.exit_code == 0, made.output
    assert "8 nodes, the packaged extract of mooncake, its own timing" in made.output
    assert "load 0.20" in made.output
    rows = [line.split() for line in made.output.splitlines() if line.strip().startswith(("auto", "random"))]
    assert [row[0] for row in rows] == ["auto", "random"]
    assert "Plots: ttft.svg, loads.svg, goodput.svg, utilisation.svg" in made.output
    for name in ("ttft", "loads", "goodput", "utilisation"):
        text = (tmp_path / "new" / f"{name}.svg").read_text()
        assert {"auto", "random"} <= {found.text for found in ElementTree.fromstring(text).iter() if found.text}


@pytest.mark.usefixtures("here")
def test_a_fleet_of_ones_own_at_a_rate(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text("[[node]]\ngpu = 'rtx-4090'\nmodels = ['llama3.1:8b']\n")
    history = tmp_path / "mine.jsonl"
    history.write_text(
        "".join(f'{{"timestamp": {n}, "model": "llama3.1:8b", "prompt_tokens": 100, "output_tokens": 20}}\n' for n in range(50))
    )
    made = simulate(str(fleet), "--trace", str(history), "--rate", "0.5", "--poisson", "--strategies", "auto")
    assert made.exit_code == 0, made.output
    assert "1 nodes, mine.jsonl, Poisson timing, 0.5 requests/s" in made.output
    assert re.search(r"auto .* s .* 20\.0 ", made.output)  # one load for fifty requests


@pytest.mark.parametrize(("arguments", "says"), [
    (("--load", "0.5", "--rate", "1"), "give --load or --rate, not both"),
    (("--strategies", "best"), "there is no strategy 'best': use auto, metrics"),
    (("--strategies", ","), "name at least one of auto"),
    (("--format", "history"), "a history is a file of yours"),
    (("nowhere.toml",), "does not exist"),
    (("--seeds", "0"), "is not in the range"),
])  # fmt: skip
def test_wrong_arguments_are_told(arguments: tuple[str, ...], says: str) -> None:
    made = simulate(*arguments)
    assert made.exit_code == 2
    assert says in made.output


def test_wrong_files_are_one_line(tmp_path: Path) -> None:
    fleet, trace = tmp_path / "fleet.toml", tmp_path / "a.csv"
    fleet.write_text("[[node]]\ngpu = 'x'")
    trace.write_text("what")
    for arguments, says in (((str(fleet),), "the gpu 'x' is not known"), (("--trace", str(trace)), "line 1 of a.csv")):
        made = simulate(*arguments)
        assert (made.exit_code, made.output.count("\n")) == (1, 1)
        assert says in made.output


def test_a_fleet_whose_memory_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text("[[node]]\ngpu = 'rtx-3060'\nmodels = ['llama3.1:8b']\n[mix.code]\n'llama3.1:8b' = 1\n")
    monkeypatch.setattr("core.placement.Supply.fits", lambda *_: False)
    assert "no machine has the memory" in simulate(str(fleet)).output


def test_what_cannot_be_warm_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text("[[node]]\ngpu = 'rtx-3060'\nmax_loaded = 1\n")
    monkeypatch.setattr(cells, "run_all", lambda jobs, progress: iter([(0, summary())]))
    assert "cannot be kept warm anywhere: the memory is needed" in simulate(str(fleet), "--strategies", "auto").output


def test_an_interrupted_study_shows_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (0, summary()),
        (1, summary("metrics", complete=False, unstable=True, refused=5, ttft_s=dict.fromkeys(cells.PERCENTS, math.inf))),
    ]
    monkeypatch.setattr(cells, "run_all", lambda jobs, progress: iter(found))
    made = simulate("--strategies", "auto,metrics,random")
    assert made.exit_code == command.INTERRUPTED
    assert "interrupted: these are the figures so far" in made.output
    assert "unstable: its queue still grows, incomplete" in made.output
    assert "refused" in made.output
    assert "5.0%" in made.output


def test_a_study_that_was_interrupted_at_once_has_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "run_all", lambda jobs, progress: iter(()))
    made = simulate("--strategies", "auto")
    assert made.exit_code == command.INTERRUPTED
    assert "TTFT" not in made.output


def test_plots_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cells, "run_all", lambda jobs, progress: iter([(0, summary())]))
    made = simulate("--strategies", "auto", "--plots", str(tmp_path / "file" / "below"))
    assert made.exit_code == 1
    assert "the plots cannot be written" in made.output


def test_plots_are_the_same_for_the_same_figures_and_know_dark_pages(tmp_path: Path) -> None:
    many = [summary(), summary("metrics", ttft_s=dict.fromkeys(cells.PERCENTS, math.inf))]
    one, two = ([path.read_bytes() for path in plots.write(tmp_path / name, many)] for name in ("one", "two"))
    assert one == two
    assert all(b"prefers-color-scheme:dark" in text and b"<!--" not in text and b"<script" not in text for text in one)


@pytest.mark.parametrize(("value", "text"), [(0.123, "0.12 s"), (12.34, "12.3 s"), (1234.5, "1234 s"), (math.inf, "refused")])
def test_seconds_for_people(value: float, text: str) -> None:
    assert command.seconds(value) == text
