"""The questions that history answers: a page, one record, an export, sums; all read only, in worker threads.

Decides how a question walks along the indexes. Must never know who asks. Invariants: an answer's memory is bounded by what it shows; what
is filtered by model or node walks one index per name ("lane") and merges them, so that a page costs what it shows and not what there is;
a count above `COUNT_MAX` is a floor, and says so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, Connection, FromClause, Row, Select, and_, exists, func, literal, or_, select, union_all
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
PIECE_MAX_BYTES: Final = 1 << 20

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


def page(connection: Connection, filters: Filters, *, offset: int, limit: int, sort: str = "-timestamp", many: bool = False) -> Page:
    """`limit` records from `offset` on. `sort`: a name of `SORTS`, with a minus for the greatest first. `many`: it is known that there are
    more than `COUNT_MAX`."""
    meant = _meant(connection, filters)
    if meant is None:
        return Page([], 0, False)
    column, falling = SORTS[sort.removeprefix("-")], sort.startswith("-")
    order = column.desc() if falling else column.asc()
    wanted = offset + limit
    if column is _R.number:
        orders = [order]
        deep = wanted > MERGED_MAX
        which = select(_R.number).where(meant.walked).order_by(order) if deep else _along(meant, wanted, falling=falling)
        which = which.offset(offset).limit(limit)
    else:
        orders = [order.nulls_last(), _R.number.desc()]
        which = select(_R.number).where(meant.whole).order_by(*orders).offset(offset).limit(limit)
    found = _rows(connection, which, orders)
    if filters.q is not None:  # a count would read every body there is
        return Page(found, offset + len(found), len(found) == limit)
    if many:
        return Page(found, COUNT_MAX, True)
    some = select(literal(1)).select_from(requests).where(meant.whole).limit(COUNT_MAX + 1).subquery()
    total = connection.execute(select(func.count()).select_from(some)).scalar_one()
    return Page(found, min(total, COUNT_MAX), total > COUNT_MAX)


@dataclass(frozen=True, slots=True)
class _Meant:
    """What filters mean, said in three ways."""

    lanes: list[Condition]
    """Together, no record in two of them, each along one index."""
    whole: Condition
    """In one."""
    walked: Condition
    """In one that holds no index against a walk along the numbers."""


def _along(meant: _Meant, limit: int, *, falling: bool = True) -> Select[Any]:
    """The numbers of the first `limit` records that are meant, the newest first (`falling`) or the oldest."""
    order = _R.number.desc() if falling else _R.number.asc()
    if not 1 < len(meant.lanes) <= LANES_MAX:
        return select(_R.number).where(meant.walked if meant.lanes[1:] else meant.whole).order_by(order).limit(limit)
    parts = [select(select(_R.number).where(lane).order_by(order).limit(limit).subquery().c.number) for lane in meant.lanes]
    merged = union_all(*parts).subquery()
    by = merged.c.number.desc() if falling else merged.c.number.asc()
    return select(merged.c.number).order_by(by).limit(limit)


def _meant(connection: Connection, filters: Filters) -> _Meant | None:
    """None: nothing is."""
    rest: list[Condition] = []
    if filters.start is not None:
        rest.append(_R.number >= first_number(filters.start))
    if filters.end is not None:
        rest.append(_R.number < first_number(filters.end))
    if filters.client is not None:
        rest.append(_R.client == filters.client)
    if filters.q is not None:
        rest.append(exists().where(bodies.c.number == _R.number, _contains(connection.dialect.name, filters.q)))
    model_ids = None if filters.model is None else _model_ids(connection, filters.model)
    statuses = list(range(len(STATUSES)) if filters.status is None else [STATUSES.index(filters.status)])
    if filters.agent_id is not None:
        column, ids = _R.node_id, [row[0] for row in connection.execute(select(nodes.c.id).where(nodes.c.agent_id == filters.agent_id))]
        if model_ids is not None:
            rest.append(_R.model_id.in_(model_ids))
    elif model_ids is not None:
        column, ids = _R.model_id, model_ids
    else:
        if filters.status is not None:
            rest.append(_R.status == statuses[0])
        condition = and_(True, *rest)
        return _Meant([condition], condition, condition)
    if not ids or model_ids == []:
        return None
    of_status = _R.status.in_(statuses)
    return _Meant(
        [and_(column == one, _R.status == status, *rest) for one in ids for status in statuses],
        and_(column.in_(ids), of_status, *rest),
        and_((column + 0).in_(ids), (_R.status + 0).in_(statuses), *rest),
    )


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
    found = _rows(connection, select(_R.number).where(_R.request_id == request_id).limit(1), [], with_bodies=True)
    return found[0] if found else None


def next_piece(connection: Connection, filters: Filters, below: int) -> tuple[list[dict[str, Any]], int | None]:
    """The newest `PIECE` records below a number that are meant, with bodies, and below which to go on; None: that was all."""
    meant = _meant(connection, filters)
    if meant is None:
        return [], None
    below_it = _Meant(
        [and_(lane, _R.number < below) for lane in meant.lanes], and_(meant.whole, _R.number < below), and_(meant.walked, _R.number < below)
    )
    along = _along(below_it, PIECE).subquery()
    wanted = select(_R.number, _R.kept_bytes).join(along, along.c.number == _R.number).order_by(_R.number.desc())
    numbers: list[int] = []
    size_bytes = 0
    rows = connection.execute(wanted).all()
    for number, kept_bytes in rows:
        size_bytes += kept_bytes
        if numbers and size_bytes > PIECE_MAX_BYTES:
            break
        numbers.append(number)
    found = _of_numbers(connection, numbers)
    return found, numbers[-1] if len(rows) == PIECE or len(numbers) < len(rows) else None


def newest(connection: Connection, limit: int) -> list[tuple[int, int]]:
    """Numbers of the newest records, and the bytes that are kept of each."""
    return [(row[0], row[1]) for row in connection.execute(select(_R.number, _R.kept_bytes).order_by(_R.number.desc()).limit(limit))]


def some(connection: Connection, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The records of these numbers with their bodies, in this order, a few at a time."""
    for at in range(0, len(numbers), FEW):
        yield from _of_numbers(connection, numbers[at : at + FEW])


def numbers_of(connection: Connection, filters: Filters, *, limit: int) -> list[int]:
    """The numbers of at most `limit` records that are meant, oldest first."""
    meant = _meant(connection, filters)
    return [] if meant is None else [row[0] for row in connection.execute(_along(meant, limit, falling=False))]


_COLUMNS: Final = (*requests.c, models.c.name.label("model"), nodes.c.agent_id, nodes.c.name.label("agent_name"))
_BODIES: Final = (bodies.c.request_body, bodies.c.response_body)


def _rows(
    connection: Connection, which: Select[Any], orders: Sequence[ColumnElement[Any]], *, with_bodies: bool = False
) -> list[dict[str, Any]]:
    """The records whose numbers `which` selects, in the order `orders`."""
    wanted = which.subquery()
    source = requests.join(wanted, wanted.c.number == _R.number)
    return [_shown(row, with_bodies) for row in connection.execute(_with_names(source, with_bodies).order_by(*orders))]


def _of_numbers(connection: Connection, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """The records of these numbers with their bodies, in this order."""
    if not numbers:
        return []
    rows = connection.execute(_with_names(requests, True).where(_R.number.in_(numbers)))
    found = {row.number: row for row in rows}
    return [_shown(found[number], True) for number in numbers if number in found]


def _with_names(source: FromClause, with_bodies: bool) -> Select[Any]:
    source = source.outerjoin(models, models.c.id == _R.model_id).outerjoin(nodes, nodes.c.id == _R.node_id)
    if with_bodies:
        source = source.outerjoin(bodies, bodies.c.number == _R.number)
    return select(*_COLUMNS, *(_BODIES if with_bodies else ())).select_from(source)


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
