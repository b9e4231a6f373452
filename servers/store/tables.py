"""The tables, for SQLite and PostgreSQL alike.

Decides what is stored in which column. Invariants: a record is found by its number, which grows with time, so that every list is a walk
along an index; names of models and nodes stand in tables of their own; bodies lie apart from what lists show; rows that one of several
coordinators owns carry its id.
"""

from typing import Final

from sqlalchemy import BigInteger, Column, Float, Index, Integer, LargeBinary, MetaData, SmallInteger, Table, Text, UniqueConstraint

metadata: Final = MetaData()

Number: Final = BigInteger().with_variant(Integer, "sqlite")
"""64 bits; on SQLite an `INTEGER PRIMARY KEY` is the row's own id, which costs no index."""

models: Final = Table("models", metadata, Column("id", Integer, primary_key=True), Column("name", Text, nullable=False, unique=True))
"""Names as clients spelled them."""

nodes: Final = Table(
    "nodes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("agent_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    UniqueConstraint("agent_id", "name"),
)
"""Every name that an agent ever had while it answered."""

requests: Final = Table(
    "requests",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=False),
    Column("request_id", Text, nullable=False),
    Column("coordinator_id", Text, nullable=False),
    Column("completed_at_ms", BigInteger, nullable=False),
    Column("request_type", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("model_id", Integer),
    Column("node_id", Integer),
    Column("client", Text, nullable=False),
    Column("key_id", Text),
    Column("status", SmallInteger, nullable=False),
    Column("message", Text, nullable=False),
    Column("http_status", SmallInteger, nullable=False),
    Column("duration_ms", Float, nullable=False),
    Column("queue_ms", Float, nullable=False),
    Column("ttft_ms", Float),
    Column("predicted_start_ms", Float),
    Column("prompt_tokens", Integer, nullable=False),
    Column("output_tokens", Integer, nullable=False),
    Column("load_ms", Float, nullable=False),
    Column("attempts", LargeBinary, nullable=False),
    Column("edge", SmallInteger, nullable=False),
    Column("chunks", Integer, nullable=False),
    Column("body_bytes", BigInteger, nullable=False),
    Column("kept_bytes", BigInteger, nullable=False),
    Column("bodies", SmallInteger, nullable=False),
    Column("observed_start_ms", Float),
    Index("requests_by_id", "request_id"),
    Index("requests_by_model", "model_id", "status", "number"),
    Index("requests_by_status", "status", "number"),
    Index("requests_by_node", "node_id", "status", "number"),
    Index("requests_by_client", "client", "number"),
    postgresql_partition_by="RANGE (number)",
)
"""One row per request. `at_ms` is `number >> 20` (`core.history.number_of`)."""

bodies: Final = Table(
    "bodies",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=False),
    Column("request_body", LargeBinary),
    Column("response_body", LargeBinary),
    postgresql_partition_by="RANGE (number)",
)

things: Final = Table(
    "things",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("coordinator_id", Text, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
)
"""Few small things by kind and name, as JSON: agents (so that what is known of a node outlives its sleep), keys, tasks,
policy, counters, backends, what was imported."""
