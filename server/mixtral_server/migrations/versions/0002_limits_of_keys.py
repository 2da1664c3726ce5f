"""Limits of keys: rates, running jobs, priority."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("keys", sa.Column("requests_per_minute", sa.Integer))
    op.add_column("keys", sa.Column("tokens_per_minute", sa.BigInteger))
    op.add_column("keys", sa.Column("max_running", sa.Integer))
    op.add_column("keys", sa.Column("priority", sa.Integer, nullable=False, server_default="0"))
