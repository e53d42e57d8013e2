"""Products and merchandising rules that come between two trainings; what an impression says of its making.

Both tables start empty, and the two new columns of an old impression say nothing.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "products",
        sa.Column("item_id", sa.Text, primary_key=True),
        sa.Column("attributes", sa.JSON),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
    )
    op.create_index("products_seq", "products", ["seq"])
    op.create_table(
        "rules",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("document", sa.JSON),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
    )
    for name in ("propensities", "rules"):
        op.add_column("impressions", sa.Column(name, sa.JSON))
