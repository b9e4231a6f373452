"""`python -m servers.store.export`: prints the records that are meant, with their bodies, as JSON or CSV.

Decides the form of a record, here and in lists. Must never know who asks. Invariants: it reads a piece at a time, so its memory does not
grow with the answer, and each piece is a question of its own, so no transaction stays open as long as a slow reader reads; no cell of a
CSV begins as a formula would.
"""

import csv
import io
import os
import sys
from typing import IO, Any, Final

import msgspec
from sqlalchemy import Engine, event
from sqlalchemy.engine import make_url

from servers import clock
from servers.aside import NOT_NOW, asked
from servers.records import body_value
from servers.store import queries
from servers.store.engine import errors_of, known_engine
from servers.store.filters import Filters

COLUMNS: Final = (
    "id", "timestamp", "completed_at", "request_type", "path", "model", "agent_id", "agent_name", "client", "key_id", "status", "message",
    "http_status", "duration_ms", "queue_ms", "ttft_ms", "predicted_start_ms", "observed_start_ms", "prompt_tokens", "output_tokens",
    "load_ms", "attempts", "edge", "chunks", "body_bytes", "bodies", "request_body", "response_body",
)  # fmt: skip
"""Of a CSV export, and the order of a record's fields."""
CACHE_KIB: Final = 4096


class Wanted(msgspec.Struct):
    """What is to be exported. `form`: `json` or `csv`."""

    url: str
    filters: Filters
    form: str


def shown(record: dict[str, Any]) -> dict[str, Any]:
    """A record as JSON shows it: bodies as JSON where they are, else as text."""
    found = {
        **record,
        "timestamp": clock.rfc3339(record["at_ms"]),
        "completed_at": clock.rfc3339(record["completed_at_ms"]),
    }
    for name in ("request_body", "response_body"):
        if name in record:
            found[name] = body_value(record[name])
    return {name: found[name] for name in COLUMNS if name in found}


class _JsonList:
    """An export as one JSON list."""

    def __init__(self) -> None:
        self._begun = False

    def piece(self, records: list[dict[str, Any]]) -> bytes:
        """Some more records."""
        texts = b",\n".join(msgspec.json.encode(shown(record)) for record in records)
        lead, self._begun = (b",\n" if self._begun else b"["), True
        return lead + texts

    def end(self) -> bytes:
        """What closes it."""
        return b"]\n" if self._begun else b"[]\n"


class _Csv:
    """An export as a table with a heading."""

    def __init__(self) -> None:
        self._begun = False

    def piece(self, records: list[dict[str, Any]]) -> bytes:
        """Some more records."""
        out = io.StringIO(newline="")
        writer = csv.writer(out)
        if not self._begun:
            writer.writerow(COLUMNS)
            self._begun = True
        for record in records:
            values = shown(record)
            writer.writerow([_cell(values.get(name)) for name in COLUMNS])
        return out.getvalue().encode()

    def end(self) -> bytes:
        """What closes it: the heading where there was no record."""
        return b"" if self._begun else self.piece([])


def _cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    if value is None or isinstance(value, (int, float)):
        return value
    text = bytes(value).decode("utf-8", "replace") if isinstance(value, msgspec.Raw) else value
    if not isinstance(text, str):
        text = msgspec.json.encode(text).decode()
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") else text


def write(engine: Engine, filters: Filters, form: str, out: IO[bytes]) -> None:
    """The export, piece by piece."""
    writer: _JsonList | _Csv = _Csv() if form == "csv" else _JsonList()
    below: int | None = queries.BEYOND
    while below is not None:
        with engine.connect() as connection:
            records, below = queries.next_piece(connection, filters, below)
        if records:
            out.write(writer.piece(records))
            out.flush()
    out.write(writer.end())
    out.flush()


def main() -> None:
    """Export what standard input wants."""
    wanted = msgspec.msgpack.decode(asked(), type=Wanted)
    engine = known_engine(make_url(wanted.url))
    if engine.dialect.name == "sqlite":  # who reads each page once needs no large cache
        event.listen(engine, "connect", lambda connection, _: connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}"))
    try:
        write(engine, wanted.filters, wanted.form, sys.stdout.buffer)
    except errors_of(engine):
        os._exit(NOT_NOW)
    except BrokenPipeError:  # nobody wants the rest
        os._exit(1)
    engine.dispose()


if __name__ == "__main__":
    main()
