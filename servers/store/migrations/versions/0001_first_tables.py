"""The first tables.

Their form stands here once more, and not in `servers.store.tables` alone: a migration says what was, whatever the tables become later.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "models",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
    )
    op.create_table(
        "nodes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("agent_id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.UniqueConstraint("agent_id", "name"),
    )
    _requests()
    op.create_table(
        "bodies",
        sa.Column("number", NUMBER, primary_key=True, autoincrement=False),
        sa.Column("request_body", sa.LargeBinary),
        sa.Column("response_body", sa.LargeBinary),
        postgresql_partition_by="RANGE (number)",
    )
    op.create_table(
        "things",
        sa.Column("kind", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("coordinator_id", sa.Text, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger, nullable=False),
    )


def _requests() -> None:
    op.create_table(
        "requests",
        sa.Column("number", NUMBER, primary_key=True, autoincrement=False),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("coordinator_id", sa.Text, nullable=False),
        sa.Column("completed_at_ms", sa.BigInteger, nullable=False),
        sa.Column("request_type", sa.Text, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("model_id", sa.Integer),
        sa.Column("node_id", sa.Integer),
        sa.Column("client", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text),
        sa.Column("status", sa.SmallInteger, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("http_status", sa.SmallInteger, nullable=False),
        sa.Column("duration_ms", sa.Float, nullable=False),
        sa.Column("queue_ms", sa.Float, nullable=False),
        sa.Column("ttft_ms", sa.Float),
        sa.Column("predicted_start_ms", sa.Float),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("output_tokens", sa.Integer, nullable=False),
        sa.Column("load_ms", sa.Float, nullable=False),
        sa.Column("attempts", sa.LargeBinary, nullable=False),
        sa.Column("edge", sa.SmallInteger, nullable=False),
        sa.Column("chunks", sa.Integer, nullable=False),
        sa.Column("body_bytes", sa.BigInteger, nullable=False),
        sa.Column("kept_bytes", sa.BigInteger, nullable=False),
        sa.Column("bodies", sa.SmallInteger, nullable=False),
        postgresql_partition_by="RANGE (number)",
    )
    op.create_index("requests_by_id", "requests", ["request_id"])
    op.create_index("requests_by_model", "requests", ["model_id", "status", "number"])
    op.create_index("requests_by_status", "requests", ["status", "number"])
    op.create_index("requests_by_node", "requests", ["node_id", "status", "number"])
    op.create_index("requests_by_client", "requests", ["client", "number"])
