"""What an impression says of its task, and of the experiment in which the user is; an old one says nothing."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    for name in ("task", "experiment", "arm"):
        op.add_column("impressions", sa.Column(name, sa.Text))
