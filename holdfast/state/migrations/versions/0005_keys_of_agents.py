"""A request key belongs to an agent: the same key given to two agents is two runs.

Older code still works with this schema; it refuses a key that another agent has used.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    key = ["agent", "request_key"]
    if op.get_bind().dialect.name == "postgresql":
        # IF EXISTS: a store that was restored from a dump of tables may have no primary key.
        op.execute("ALTER TABLE runs DROP CONSTRAINT IF EXISTS runs_pkey")
        op.create_primary_key("runs_pkey", "runs", key)
        return
    # SQLite cannot change a primary key: the table is copied.
    op.rename_table("runs", "runs_before")
    columns = [
        sa.Column("request_key", sa.Text, nullable=False),
        sa.Column("workflow_id", sa.Text, nullable=False),
        sa.Column("agent", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("requested_by", sa.Text, nullable=False),
        sa.Column("input_digest", sa.Text, nullable=False),
        sa.Column("trace_id", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("outcome", sa.Text),
        sa.Column("result", sa.Text),
        sa.Column("ended_at", sa.Double),
        sa.Column("namespace", sa.Text),
    ]
    unique = sa.UniqueConstraint("workflow_id", name="runs_workflow_id_key")
    table = op.create_table("runs", *columns, sa.PrimaryKeyConstraint(*key), unique)
    names = ", ".join(column.name for column in table.columns)
    op.execute(f"INSERT INTO runs ({names}) SELECT {names} FROM runs_before")
    op.drop_table("runs_before")
