"""Circuit breakers, rate limits, last good results, dead letters; the ledger keeps every failed attempt."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("runs", sa.Column("namespace", sa.Text))
    op.add_column("effects", sa.Column("agent", sa.Text))
    op.add_column("effects", sa.Column("log", sa.Text))
    op.create_table(
        "breakers",
        sa.Column("target", sa.Text, primary_key=True),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("window_at", sa.Double, nullable=False),
        sa.Column("window_calls", sa.Integer, nullable=False),
        sa.Column("window_failures", sa.Integer, nullable=False),
        sa.Column("opened_at", sa.Double),
        sa.Column("probe_at", sa.Double),
        sa.Column("prober", sa.Text),
        sa.Column("lease_until", sa.Double, nullable=False),
        sa.Column("paused_until", sa.Double, nullable=False),
        sa.Column("held", sa.Integer, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("changed_at", sa.Double, nullable=False),
    )
    op.create_table(
        "limits",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("book", sa.Text, nullable=False),
    )
    op.create_table(
        "last_good",
        sa.Column("tool", sa.Text, primary_key=True),
        sa.Column("tenant", sa.Text, primary_key=True),
        sa.Column("digest", sa.Text, primary_key=True),
        sa.Column("result", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
    )
    op.create_table(
        "dead_letters",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("agent", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("workflow_id", sa.Text, nullable=False),
        sa.Column("key_base", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("cause", sa.Text, nullable=False),
        sa.Column("context", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("closed_at", sa.Double),
        sa.Column("note", sa.Text, nullable=False),
    )
    op.create_index("dead_letters_state", "dead_letters", ["state", "created_at"])
    op.create_index("dead_letters_workflow", "dead_letters", ["workflow_id"])
