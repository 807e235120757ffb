"""The ledger keeps the position from which a call that is not ready continues."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("effects", sa.Column("position", sa.Text))
