"""Trace files: three formats, packed or plain, and what is said of those that are none."""

import gzip
import json
from pathlib import Path

import pytest

from core.dump import Step, frames
from core.events import Ending, RequestCame, Route, Settled
from core.snapshot import take
from core.units import Instant, RequestId
from servers.study import traces
from servers.study.traces import Trace, TraceError, guessed_format, mixes_of, rows
from tests.core.routing import World, usage

HISTORY = [
    {"timestamp": "2026-01-01T00:00:01Z", "model": "m:1b", "prompt_tokens": 10, "output_tokens": 5},
    {"timestamp": 1767225603000, "model": "n:1b", "usage": {"prompt_tokens": 20, "output_tokens": 0}},
    {"timestamp": 1767225600.5, "model": "m:1b", "prompt_tokens": None, "output_tokens": None},
]


def write(path: Path, text: str) -> Trace:
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return Trace(paths=(str(path),), form=guessed_format(path))


def test_the_extracts_are_there() -> None:
    azure, mooncake = rows(Trace()), rows(Trace(form="mooncake"))
    assert (len(azure), len(mooncake)) == (1972, 800)
    assert {row.kind for row in azure} == {"code", "conversation"}
    assert [row.at_s for row in azure] == sorted(row.at_s for row in azure)
    assert mixes_of(Trace()).keys() == {"code", "conversation"}
    assert (Trace().jitter_s(), Trace(form="mooncake").jitter_s()) == (0.0, 3.0)
    assert "extract of azure" in Trace().title()


@pytest.mark.parametrize(("name", "form"), [
    ("x_code.csv", "azure"), ("x.csv.gz", "azure"), ("conversation_trace.jsonl", "mooncake"), ("mine.jsonl", "history"),
    ("history-2026-01-01.csv", "history"), ("history-2026-01-01.json", "history"), ("router.dump", "dump"),
])  # fmt: skip
def test_the_format_shows_in_the_name(name: str, form: str) -> None:
    assert guessed_format(Path(name)) == form


@pytest.mark.parametrize("name", ["my_code.csv", "my_code.csv.gz"])
def test_azure_files(tmp_path: Path, name: str) -> None:
    trace = write(
        tmp_path / name, "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,4808,10\n2023-11-16 18:15:46.68,374,44\n"
    )
    assert [(row.kind, row.input_tokens) for row in rows(trace)] == [("code", 374), ("code", 4808)]
    assert trace.title() == name


@pytest.mark.parametrize("text", ["\n".join(map(json.dumps, HISTORY)), json.dumps(HISTORY, indent=1)])
def test_a_history_names_its_own_models(tmp_path: Path, text: str) -> None:
    trace = write(tmp_path / "mine.json", text)
    assert [(row.at_s, row.kind, row.input_tokens, row.output_tokens) for row in rows(trace)] == [
        (1767225601.0, "m:1b", 10, 5),
        (1767225603.0, "n:1b", 20, 1),
    ]
    assert mixes_of(trace) == {"m:1b": {"m:1b": 1}, "n:1b": {"n:1b": 1}}


@pytest.mark.parametrize(("name", "text", "says"), [
    ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnonsense\n", "line 2 of a.csv is not a row of the format azure"),
    ("mooncake.jsonl", '{"timestamp": 1}\n', "line 1 of mooncake.jsonl is not a row"),
    ("h.jsonl", '{"timestamp": 1}\n', "a record needs a model"),
    ("h.jsonl", '{"model": "m", "prompt_tokens": 1, "output_tokens": 1}\n', "a record needs a timestamp"),
    ("h.jsonl", '{"model": "m", "timestamp": true, "prompt_tokens": 1, "output_tokens": 1}\n', "a record needs a timestamp"),
    ("h.jsonl", "[1,\n", "is not a row"),
    ("h.jsonl", "", "has no rows"),
])  # fmt: skip
def test_what_is_no_trace_is_told(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(TraceError, match=says):
        rows(write(tmp_path / name, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"gone\.csv cannot be read"):
        rows(Trace(paths=(str(tmp_path / "gone.csv"),)))
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress(b"TIMESTAMP,ContextTokens,GeneratedTokens\n" * 100)[:-12])
    with pytest.raises(TraceError, match="cannot be read"):
        rows(Trace(paths=(str(cut),)))


def test_endless_files_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "ROWS_MAX", 3)
    with pytest.raises(TraceError, match="more than 3 rows"):
        rows(write(tmp_path / "a.csv", "2023-11-16 18:17:03.97,1,1\n" * 4))


EXPORT = (
    "id,timestamp,completed_at,model,status,prompt_tokens,output_tokens,response_body\r\n"
    f'1,2026-01-01T00:00:01Z,2026-01-01T00:00:02Z,m:1b,success,10,5,"{"long, " * 50_000}\n"\r\n'
    "2,2026-01-01T00:00:03Z,2026-01-01T00:00:04Z,'@odd/n:1b,success,20,0,\r\n"
    "3,2026-01-01T00:00:05Z,2026-01-01T00:00:06Z,m:1b,cancelled,,,\r\n"
)


@pytest.mark.parametrize("name", ["history-2026-01-01.csv", "history-2026-01-01.csv.gz"])
def test_an_export_as_a_table_names_its_own_models(tmp_path: Path, name: str) -> None:
    trace = write(tmp_path / name, EXPORT)
    assert [(row.at_s, row.kind, row.input_tokens, row.output_tokens) for row in rows(trace)] == [
        (1767225601.0, "m:1b", 10, 5),
        (1767225603.0, "@odd/n:1b", 20, 1),
    ]
    assert mixes_of(trace) == {"m:1b": {"m:1b": 1}, "@odd/n:1b": {"@odd/n:1b": 1}}


@pytest.mark.parametrize("text", ["timestamp,prompt_tokens\n1,2\n", "timestamp,model,prompt_tokens,output_tokens\n1,m,many,2\n"])
def test_a_table_that_is_no_export_is_said(tmp_path: Path, text: str) -> None:
    with pytest.raises(TraceError, match=r"line . of history-1\.csv is not a row of the format history"):
        rows(write(tmp_path / "history-1.csv", text))


def test_a_dump_is_a_trace(tmp_path: Path) -> None:
    world = World()
    world.backend("n", "m", loaded=("m",))
    steps: list[Step] = []
    for number, limit in enumerate((7, None, None)):
        came = RequestCame(request_id=RequestId(f"r{number}"), route=Route.CHAT, model="m", output_limit=limit)
        steps.append((Instant(world.now), came, world.do(came)))
        settled = Settled(request_id=came.request_id, ending=Ending.SUCCESS, usage=usage() if number < 2 else None)
        world.now += 2
        steps.append((Instant(world.now), settled, world.do(settled)))
    path = tmp_path / "router.dump"
    path.write_bytes(b"".join(frames(take(world.router), steps, version="1", made_at="now")))
    trace = Trace(paths=(str(path),), form="dump")
    assert [(row.at_s, row.kind, row.input_tokens, row.output_tokens, row.output_limit) for row in rows(trace)] == [
        (100.0, "m", 20, 50, 7),
        (102.0, "m", 20, 50, None),
    ]
    assert mixes_of(trace) == {"m": {"m": 1}}


def test_what_is_no_dump_is_said(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="this is no dump of the router"):
        rows(write(tmp_path / "router.dump", "nothing"))
