"""Traces as files: Azure's CSV, Mooncake's JSON lines, one's own history or dump; packed or plain; or the extracts that come with this
package.

Decides how a file is read, and nothing about its rows (`core.simulation.workload`). Invariants: a file that cannot be used is one sentence
with the line at fault; at most `ROWS_MAX` rows are read.
"""

import csv
import functools
import gzip
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from core import dump
from core.errors import RouterError
from core.events import Record, RequestCame
from core.simulation.workload import CODE_MIX, CONVERSATION_MIX, Row, azure_rows, mooncake_rows

ROWS_MAX: Final = 500_000
FORMATS: Final = ("azure", "mooncake", "history", "dump")
CELL_MAX: Final = 64 << 20
"""Characters of one cell of a CSV export, which may hold a whole answer."""
BUILT_IN: Final = {"azure": ("azure2023_code.csv.gz", "azure2023_conv.csv.gz"), "mooncake": ("mooncake_conversation.jsonl.gz",)}
MOONCAKE_JITTER_S: Final = 3.0
"""Its time stamps lie on steps of three seconds."""

_KINDS: Final = {"code": "code", "conv": "conversation"}


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """Where rows come from. No `paths`: the extract of that format that comes with this package."""

    paths: tuple[str, ...] = ()
    form: str = "azure"

    def title(self) -> str:
        """For people."""
        return ", ".join(Path(path).name for path in self.paths) or f"the packaged extract of {self.form}"

    def jitter_s(self) -> float:
        """What to add to its coarse time stamps."""
        return MOONCAKE_JITTER_S if self.form == "mooncake" else 0.0


class TraceError(ValueError):
    """The trace cannot be used; says why, in one sentence."""


def guessed_format(path: Path) -> str:
    """By the file's name, as the router exports it: `history-...`, `.dump`. Other `.csv` is Azure's, other names Mooncake's when they say
    so, else history."""
    name = path.name.removesuffix(".gz")
    if name.startswith("history-"):
        return "history"
    if name.endswith(".dump"):
        return "dump"
    if name.endswith(".csv"):
        return "azure"
    return "mooncake" if "conversation" in name or "mooncake" in name else "history"


@functools.lru_cache(maxsize=4)
def rows(trace: Trace) -> tuple[Row, ...]:
    """All rows, in the order of their times.

    Raises:
        TraceError: a file cannot be read, or is not of that format.
    """
    found: list[Row] = []
    if trace.paths:
        for name in trace.paths:
            path = Path(name)
            try:
                if trace.form == "dump":
                    found += dump_rows(path.read_bytes())
                    continue
                with _opened(path) as lines:
                    found += _parsed(lines, trace.form, path.name)
            except (OSError, UnicodeDecodeError, EOFError, RouterError) as error:
                raise TraceError(f"{path.name} cannot be read: {error}") from None
    else:
        for name in BUILT_IN.get(trace.form, ()):
            with files("servers.study").joinpath("data", name).open("rb") as packed, gzip.open(packed, "rt") as lines:
                found += _parsed(lines, trace.form, name)
    if not found:
        raise TraceError(f"{trace.title()} has no rows")
    return tuple(sorted(found, key=lambda row: row.at_s))


def mixes_of(trace: Trace) -> dict[str, Mapping[str, int]]:
    """Which models each kind of row asks for, by weight: the mix of routing.md, or the models that a history names."""
    kinds = {row.kind for row in rows(trace)}
    if trace.form in ("history", "dump"):
        return {kind: {kind: 1} for kind in sorted(kinds)}
    return {kind: CODE_MIX if kind == "code" else CONVERSATION_MIX for kind in sorted(kinds)}


def _opened(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.name.endswith(".gz") else path.open(encoding="utf-8")


def _parsed(lines: IO[str], form: str, name: str) -> list[Row]:
    """The rows of one file. Raises TraceError with the number of the line at fault."""
    reader: Callable[[Iterable[str]], Iterator[Row]]
    if form == "azure":
        kind = next((kind for part, kind in _KINDS.items() if part in name.lower()), "conversation")
        reader = functools.partial(azure_rows, kind=kind)
    elif form == "mooncake":
        reader = mooncake_rows
    else:
        reader = history_rows
    at = 0

    def counted() -> Iterator[str]:
        nonlocal at
        for at, line in enumerate(lines, start=1):  # noqa: B007 - told when a line is at fault
            yield line

    try:
        found = list(itertools.islice(reader(counted()), ROWS_MAX + 1))
    except (ValueError, msgspec.ValidationError, msgspec.DecodeError, KeyError, TypeError, csv.Error) as error:
        raise TraceError(f"line {at} of {name} is not a row of the format {form}: {error}") from None
    if len(found) > ROWS_MAX:
        raise TraceError(f"{name} has more than {ROWS_MAX} rows: cut it")
    return found


def history_rows(lines: Iterable[str]) -> Iterator[Row]:
    """Rows of one's own history, as the router exports it: a JSON list, a record a line, or CSV with a heading. What it must have:
    `timestamp`, `model`, and numbers of tokens.

    Raises:
        ValueError: a record without one of those.
    """
    text = iter(lines)
    first = next(text, "")
    records: Iterator[Any]
    if first.lstrip().startswith("["):
        records = iter(json.loads("".join([first, *text])))
    elif first.lstrip().startswith("{"):
        records = (json.loads(line) for line in itertools.chain([first], text) if line.strip())
    elif not first.strip():
        return
    else:
        records = _table(itertools.chain([first], text))
    for record in records:
        if not isinstance(record, dict) or not isinstance(record.get("model"), str):
            raise ValueError("a record needs a model")
        usage = record.get("usage")
        source = usage if isinstance(usage, dict) else record
        prompt, output = source.get("prompt_tokens"), source.get("output_tokens")
        if isinstance(prompt, int) and isinstance(output, int):  # others were refused or cancelled: they tell nothing about work
            yield Row(
                at_s=_seconds(record.get("timestamp")), input_tokens=max(1, prompt), output_tokens=max(1, output), kind=record["model"]
            )


def _table(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Records of a CSV export. Raises ValueError when the heading lacks a column."""
    csv.field_size_limit(CELL_MAX)
    reader = csv.DictReader(lines)
    missing = [name for name in ("timestamp", "model", "prompt_tokens", "output_tokens") if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"its heading has no {missing[0]}")
    for record in reader:
        tokens = {name: int(record[name]) if record[name] else None for name in ("prompt_tokens", "output_tokens")}
        yield {"timestamp": record["timestamp"], "model": record["model"].removeprefix("'"), **tokens}


def dump_rows(data: bytes) -> list[Row]:
    """Requests of a dump that were served: when they came, and what their nodes said they cost.

    Raises:
        RouterError: it is no dump that can be used.
    """
    came: dict[str, tuple[float, RequestCame]] = {}
    found = []
    for at, what, effects in dump.load(data).steps:
        event = dump.event_of(what)
        if isinstance(event, RequestCame):
            came[event.request_id] = (at, event)
        for record in dump.records_of(effects):
            begun = came.pop(record.request_id, None)
            if begun is not None and record.usage is not None and record.model:
                found.append(_served(*begun, record))
    return found


def _served(at_s: float, event: RequestCame, record: Record) -> Row:
    assert record.usage is not None, "served"
    prompt, output = record.usage.prompt_tokens, record.usage.output_tokens
    return Row(
        at_s=at_s, input_tokens=max(1, prompt), output_tokens=max(1, output), kind=record.model or "", output_limit=event.output_limit
    )


def _seconds(stamp: object) -> float:
    """Unix seconds, milliseconds, or a date in RFC 3339."""
    if isinstance(stamp, (int, float)) and not isinstance(stamp, bool):
        return stamp / 1000 if stamp > 1e11 else float(stamp)
    if isinstance(stamp, str):
        return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()
    raise ValueError("a record needs a timestamp")
