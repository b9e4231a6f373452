"""The questions that history answers: a page, one record, an export, sums; all read only, in worker threads.

Decides how a question walks along the indexes. Must never know who asks. Invariants: an answer's memory is bounded by what it shows; what
is filtered by model or node walks one index per name ("lane") and merges them, so that a page costs what it shows and not what there is;
a count above `COUNT_MAX` is a floor, and says so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, Connection, Row, Select, and_, exists, func, literal, or_, select, union_all
from sqlalchemy.sql.expression import bindparam

from core.history import BODY_STATES, EDGES, NUMBER_SHIFT, STATUSES, first_number
from core.units import UnixMs
from servers.store.filters import Filters as Filters
from servers.store.tables import bodies, models, nodes, requests

COUNT_MAX: Final = 100_000
LANES_MAX: Final = 12
"""More of them than this and the table is walked from its end instead: so many names are found soon."""
MERGED_MAX: Final = 20_000
"""Rows that each lane may give; deeper pages walk the whole table."""
PIECE: Final = 500
"""Records read at once by an export, at most, and their bodies' bytes, unless one has more."""
PIECE_MAX_BYTES: Final = 4 << 20

FEW: Final = 20
"""Records read at once where their bodies' bytes were not looked at."""

BEYOND: Final = 1 << 62
"""Above every record's number."""

Condition = ColumnElement[bool]
_R: Final = requests.c

SORTS: Final = {
    "timestamp": _R.number,
    "duration_ms": _R.duration_ms,
    "ttft_ms": _R.ttft_ms,
    "queue_ms": _R.queue_ms,
    "prompt_tokens": _R.prompt_tokens,
    "output_tokens": _R.output_tokens,
}


@dataclass(frozen=True, slots=True)
class Page:
    """Records without bodies, how many there are in all, and whether that number is a floor."""

    records: list[dict[str, Any]]
    total_count: int
    is_floor: bool


# ---------------------------------------------------------------- pages


def page(connection: Connection, filters: Filters, *, offset: int, limit: int, sort: str = "-timestamp") -> Page:
    """`limit` records from `offset` on. `sort`: a name of `SORTS`, with a minus for the greatest first."""
    lanes = _lanes(connection, filters)
    if not lanes:
        return Page([], 0, False)
    column, falling = SORTS[sort.removeprefix("-")], sort.startswith("-")
    order = column.desc() if falling else column.asc()
    wanted = offset + limit
    if column is _R.number and 1 < len(lanes) <= LANES_MAX and wanted <= MERGED_MAX:
        parts = [select(select(_R.number).where(lane).order_by(order).limit(wanted).subquery().c.number) for lane in lanes]
        merged = union_all(*parts).subquery()
        by = merged.c.number.desc() if falling else merged.c.number.asc()
        numbers = [row[0] for row in connection.execute(select(merged.c.number).order_by(by).offset(offset).limit(limit))]
        found = _rows(connection, select(_R.number).where(_R.number.in_(numbers)).order_by(order))
    else:
        orders = [order] if column is _R.number else [order.nulls_last(), _R.number.desc()]
        found = _rows(connection, select(_R.number).where(or_(*lanes)).order_by(*orders).offset(offset).limit(limit))
    if filters.q is not None:  # a count would read every body there is
        return Page(found, offset + len(found), len(found) == limit)
    total = _count(connection, lanes)
    return Page(found, min(total, COUNT_MAX), total > COUNT_MAX)


def _count(connection: Connection, lanes: Sequence[Condition]) -> int:
    total = 0
    if len(lanes) > LANES_MAX:
        lanes = [or_(*lanes)]
    for lane in lanes:
        some = select(literal(1)).select_from(requests).where(lane).limit(COUNT_MAX + 1 - total).subquery()
        total += connection.execute(select(func.count()).select_from(some)).scalar_one()
        if total > COUNT_MAX:
            break
    return total


def _lanes(connection: Connection, filters: Filters) -> list[Condition]:
    """Conditions that together mean `filters`, no record in two of them, each along one index."""
    rest: list[Condition] = []
    if filters.start is not None:
        rest.append(_R.number >= first_number(filters.start))
    if filters.end is not None:
        rest.append(_R.number < first_number(filters.end))
    if filters.client is not None:
        rest.append(_R.client == filters.client)
    if filters.q is not None:
        rest.append(exists().where(bodies.c.number == _R.number, _contains(connection.dialect.name, filters.q)))
    statuses = range(len(STATUSES)) if filters.status is None else [STATUSES.index(filters.status)]
    if filters.agent_id is not None:
        ids = [row[0] for row in connection.execute(select(nodes.c.id).where(nodes.c.agent_id == filters.agent_id))]
        if filters.model is not None:
            rest.append(_R.model_id.in_(_model_ids(connection, filters.model)))
        return [and_(_R.node_id == node, _R.status == number, *rest) for node in ids for number in statuses]
    if filters.model is not None:
        ids = _model_ids(connection, filters.model)
        return [and_(_R.model_id == model, _R.status == number, *rest) for model in ids for number in statuses]
    if filters.status is not None:
        rest.append(_R.status == statuses[0])
    return [and_(True, *rest)]


def _model_ids(connection: Connection, part: str) -> list[int]:
    return [
        row[0] for row in connection.execute(select(models.c.id).where(func.lower(models.c.name).contains(part.lower(), autoescape=True)))
    ]


def _contains(dialect: str, text: str) -> Condition:
    """Whether either body has `text`, as JSON spells it: as it is, or with all but ASCII escaped."""
    plain = msgspec.json.encode(text)[1:-1]
    escaped = "".join(char if char.isascii() else "".join(f"\\u{unit:04x}" for unit in _utf16(char)) for char in plain.decode()).encode()
    found = []
    for needle in dict.fromkeys((plain, escaped)):
        for column in (bodies.c.request_body, bodies.c.response_body):
            value = bindparam(None, needle, type_=column.type)
            where = func.instr(column, value) if dialect == "sqlite" else func.position(value.op("IN")(column))
            found.append(where > 0)
    return or_(*found)


def _utf16(char: str) -> list[int]:
    data = char.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2)]


# ---------------------------------------------------------------- records


def one(connection: Connection, request_id: str) -> dict[str, Any] | None:
    """A record with its bodies, None when there is none of this id."""
    found = _rows(connection, select(_R.number).where(_R.request_id == request_id).limit(1), with_bodies=True)
    return found[0] if found else None


def next_piece(connection: Connection, filters: Filters, below: int) -> tuple[list[dict[str, Any]], int | None]:
    """The newest `PIECE` records below a number that are meant, with bodies, and below which to go on; None: that was all."""
    lanes = _lanes(connection, filters)
    if not lanes:
        return [], None
    wanted = select(_R.number, _R.kept_bytes).where(or_(*lanes), _R.number < below).order_by(_R.number.desc()).limit(PIECE)
    numbers: list[int] = []
    size_bytes = 0
    rows = connection.execute(wanted).all()
    for number, kept_bytes in rows:
        size_bytes += kept_bytes
        if numbers and size_bytes > PIECE_MAX_BYTES:
            break
        numbers.append(number)
    found = _of_numbers(connection, numbers, with_bodies=True)
    return found, numbers[-1] if len(rows) == PIECE or len(numbers) < len(rows) else None


def newest(connection: Connection, limit: int) -> list[tuple[int, int]]:
    """Numbers of the newest records, and the bytes that are kept of each."""
    return [(row[0], row[1]) for row in connection.execute(select(_R.number, _R.kept_bytes).order_by(_R.number.desc()).limit(limit))]


def some(connection: Connection, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The records of these numbers with their bodies, in this order, a few at a time."""
    for at in range(0, len(numbers), FEW):
        yield from _of_numbers(connection, numbers[at : at + FEW], with_bodies=True)


def numbers_of(connection: Connection, filters: Filters, *, limit: int) -> list[int]:
    """The numbers of at most `limit` records that are meant, oldest first."""
    lanes = _lanes(connection, filters)
    if not lanes:
        return []
    return [row[0] for row in connection.execute(select(_R.number).where(or_(*lanes)).order_by(_R.number).limit(limit))]


def _rows(connection: Connection, which: Select[Any], *, with_bodies: bool = False) -> list[dict[str, Any]]:
    """The records whose numbers `which` selects, in its order."""
    return _of_numbers(connection, [row[0] for row in connection.execute(which)], with_bodies=with_bodies)


def _of_numbers(connection: Connection, numbers: Sequence[int], *, with_bodies: bool) -> list[dict[str, Any]]:
    if not numbers:
        return []
    columns = [*requests.c, models.c.name.label("model"), nodes.c.agent_id, nodes.c.name.label("agent_name")]
    source = requests.outerjoin(models, models.c.id == _R.model_id).outerjoin(nodes, nodes.c.id == _R.node_id)
    if with_bodies:
        columns += [bodies.c.request_body, bodies.c.response_body]
        source = source.outerjoin(bodies, bodies.c.number == _R.number)
    found = {row.number: row for row in connection.execute(select(*columns).select_from(source).where(_R.number.in_(numbers)))}
    return [_shown(found[number], with_bodies) for number in numbers if number in found]


def _shown(row: Row[Any], with_bodies: bool) -> dict[str, Any]:
    record = {
        "number": row.number,
        "id": row.request_id,
        "coordinator_id": row.coordinator_id,
        "at_ms": row.number >> NUMBER_SHIFT,
        "completed_at_ms": row.completed_at_ms,
        "request_type": row.request_type,
        "path": row.path,
        "model": row.model,
        "agent_id": row.agent_id,
        "agent_name": row.agent_name,
        "client": row.client,
        "key_id": row.key_id,
        "status": STATUSES[row.status],
        "message": row.message,
        "http_status": row.http_status,
        "duration_ms": row.duration_ms,
        "queue_ms": row.queue_ms,
        "ttft_ms": row.ttft_ms,
        "predicted_start_ms": row.predicted_start_ms,
        "observed_start_ms": row.observed_start_ms,
        "prompt_tokens": row.prompt_tokens,
        "output_tokens": row.output_tokens,
        "load_ms": row.load_ms,
        "attempts": msgspec.json.decode(row.attempts),
        "edge": EDGES[row.edge],
        "chunks": row.chunks,
        "body_bytes": row.body_bytes,
        "bodies": BODY_STATES[row.bodies],
    }
    if with_bodies:
        record["request_body"], record["response_body"] = row.request_body, row.response_body
    return record


# ---------------------------------------------------------------- sums


def minutes(connection: Connection, since: UnixMs) -> list[tuple[int, str, int]]:
    """Per minute (Unix, in minutes) and status, how many requests came since then."""
    minute = (_R.number // (60_000 << NUMBER_SHIFT)).label("minute")
    rows = connection.execute(
        select(minute, _R.status, func.count()).where(_R.number >= first_number(since)).group_by("minute", _R.status).order_by("minute")
    )
    return [(int(at), STATUSES[status], count) for at, status, count in rows]


GROUPS: Final = {"model": models.c.name, "node": nodes.c.name, "client": _R.client, "type": _R.request_type}


def sums(connection: Connection, since: UnixMs, by: str) -> list[dict[str, Any]]:
    """Per model, node, client or type since then: requests, errors, tokens, mean and greatest times; the busiest 200."""
    name = GROUPS[by].label("name")
    errors = func.sum(func.abs(func.sign(_R.status - STATUSES.index("success"))))
    source = requests.outerjoin(models, models.c.id == _R.model_id).outerjoin(nodes, nodes.c.id == _R.node_id)
    rows = connection.execute(
        select(
            name,
            func.count().label("requests"),
            errors.label("not_successful"),
            func.sum(_R.prompt_tokens).label("prompt_tokens"),
            func.sum(_R.output_tokens).label("output_tokens"),
            func.avg(_R.duration_ms).label("mean_duration_ms"),
            func.max(_R.duration_ms).label("max_duration_ms"),
            func.avg(_R.ttft_ms).label("mean_ttft_ms"),
            func.avg(_R.queue_ms).label("mean_queue_ms"),
        )
        .select_from(source)
        .where(_R.number >= first_number(since))
        .group_by(name)
        .order_by(func.count().desc(), name)
        .limit(200)
    )
    return [
        {key: float(value) if key.startswith("mean") and value is not None else value for key, value in row._mapping.items()}
        for row in rows
    ]


PERCENTILES: Final = (50, 95, 99)


def percentiles(connection: Connection, since: UnixMs, column: str) -> dict[str, float | None]:
    """p50, p95 and p99 of a time (`duration_ms`, `ttft_ms`, `queue_ms`) since then: nearest rank over the newest `COUNT_MAX` records."""
    value = SORTS[column]
    some = select(value.label("v")).where(_R.number >= first_number(since), value.is_not(None)).order_by(_R.number.desc()).limit(COUNT_MAX)
    values = some.subquery()
    count = connection.execute(select(func.count()).select_from(values)).scalar_one()
    found: dict[str, float | None] = {}
    for percent in PERCENTILES:
        rank = max(0, -(-count * percent // 100) - 1)
        row = connection.execute(select(values.c.v).order_by(values.c.v).offset(rank).limit(1)).first()
        found[f"p{percent}"] = None if row is None else float(row[0])
    return found
