"""When a request's prompt was read, as its node told it, beside when that was expected."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """A column more; what was recorded before does not know it. Neither database writes its rows anew for that."""
    op.add_column("requests", sa.Column("observed_start_ms", sa.Float))
