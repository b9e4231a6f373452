"""The harness of the tables: marks, bars, one cell on the packaged extract."""

import math
from pathlib import Path

import msgspec
import pytest

from servers.study.cells import PERCENTS, Summary
from tests.prove import routing_table
from tests.prove.routing_table import Kept, Table, bars, main, plain_cell, short, tables, trace_of, written


def summary(strategy: str, p50: float, p95: float, p99: float, *, loads: float = 5.0, unstable: bool = False) -> Summary:
    ttft = {**dict.fromkeys(PERCENTS, p50), 95: p95, 99: p99}
    return Summary(
        strategy=strategy, seed=1, rate_per_s=1.0, requests=10, refused=0, ttft_s=ttft, loads_per_1000=loads, goodput=1.0, utilisation=0.5,
        over_time=[], unstable=unstable,
    )  # fmt: skip


def figures(table: Table, **of_auto: float) -> dict[tuple[str, float], list[Summary]]:
    found = {(strategy, load): [summary(strategy, 10.0, 20.0, 40.0)] for strategy in table.strategies for load in table.loads}
    for load in table.loads:
        found["auto", load] = [summary("auto", 1.0, 5.0, 10.0, **of_auto)]
    return found


def named(name: str) -> Table:
    return next(table for table in tables() if table.name == name)


def test_the_page_has_marks_for_every_table() -> None:
    page = routing_table.PAGE.read_text("utf-8")
    for table in tables():
        assert "new text" in written(page, table.name, "new text")
    with pytest.raises(AssertionError, match="has lost the marks"):
        written("", "mixed", "")


def test_bars_that_are_met_and_missed() -> None:
    mixed = named("mixed")
    assert not any(line.startswith("MISSED") for line in bars(mixed, figures(mixed)))
    assert [line for line in bars(mixed, figures(mixed, loads=11.0)) if line.startswith("MISSED")] == [
        "MISSED: mixed: 10 / loads per 1000 of auto at 0.35 0.91, at least 1"
    ]
    assert any("stable" in line for line in bars(mixed, figures(mixed, unstable=True)) if line.startswith("MISSED"))
    for name in ("mooncake", "equal-nodes", "one-slot", "advice", "regrouping"):
        assert bars(named(name), figures(named(name)))


def test_loads_are_parts_of_the_computed_bound() -> None:
    cell, bound = plain_cell(named("mixed"), None)
    assert bound == pytest.approx(5.76, rel=0.01)
    assert not cell.limits
    assert plain_cell(named("one-slot"), None)[1] < bound / 1.5


def test_figures_that_were_kept_are_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    cell, _ = plain_cell(named("mixed"), None)
    other = msgspec.structs.replace(cell, seed=2)
    Kept(path).add(cell, summary("auto", 1.0, 2.0, math.inf))
    Kept().add(other, summary("auto", 1.0, 2.0, 3.0))
    found = Kept(path).find(cell)
    assert found is not None
    assert (found.ttft_s[95], short(found.ttft_s[99])) == (2.0, "∞")
    assert Kept(path).find(other) is None
    assert Kept(path, ["auto"]).find(cell) is None


def test_one_cell_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = routing_table.PAGE.read_text("utf-8")
    assert main(["--only", "mooncake", "--strategies", "auto", "--loads", "0.2", "--seeds", "1"]) == 0
    assert "| auto | " in capsys.readouterr().out
    assert routing_table.PAGE.read_text("utf-8") == before


def test_traces_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no traces of the form azure"):
        trace_of("azure", tmp_path)
    (tmp_path / "conversation_trace.jsonl").write_text("")
    assert trace_of("mooncake", tmp_path).title() == "conversation_trace.jsonl"


@pytest.mark.parametrize(("value", "text"), [(0.123, "0.12"), (12.34, "12.3"), (1234.0, "1234"), (math.inf, "∞")])
def test_short_figures(value: float, text: str) -> None:
    assert short(value) == text
